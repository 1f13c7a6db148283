# SPDX-License-Identifier: Apache-2.0
"""Wrong input is refused while vLLM's configuration is made, in words that say what to do."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
import transformers
from engines import make_adapter, make_model, merge, override, saving

from spon_plugin import Mask, SponError, write_adapter
from spon_plugin.adapter.merged import Announced
from spon_vllm.checks import check_fit
from spon_vllm.settings import Settings


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    path = tmp_path_factory.mktemp("errors")
    model = make_model(path / "base")
    return path / "base", path / "adapter", make_adapter(path / "adapter", model, path / "base")


def configure(model, **arguments):
    """Make vLLM's configuration, as every server does before it starts an engine."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    return EngineArgs(model=str(model), max_model_len=256, dtype="float32", **arguments).create_engine_config()


def edited(adapter, path, **changes):
    """A copy of an adapter directory with another field in its config."""
    shutil.copytree(adapter, path)
    config = json.loads((path / "adapter_config.json").read_text())
    config.update(changes)
    (path / "adapter_config.json").write_text(json.dumps(config))
    return path


def test_no_adapter(llama):
    with pytest.raises(ValueError, match="adapter: got None.*--hf-overrides.*SPON_ADAPTER.*spon merge"):
        configure(llama[0], quantization="spon")


def test_directory_missing(llama, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="nowhere.*an existing adapter directory.*Check the path"):
        configure(llama[0], **override(tmp_path / "nowhere"))
    monkeypatch.setenv("SPON_ADAPTER", str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="nowhere.*an existing adapter directory"):
        configure(llama[0])


def test_directory_without_an_adapter(llama, tmp_path):
    with pytest.raises(ValueError, match=r"a directory with adapter_config\.json in it"):
        configure(llama[0], **override(tmp_path))


def test_adapter_for_another_model(llama, tmp_path):
    other = make_model(tmp_path / "other", hidden_size=64, num_attention_heads=2, num_key_value_heads=1)
    make_adapter(tmp_path / "adapter", other, tmp_path / "other")
    with pytest.raises(ValueError, match=r"spon_alpha: got \(64,\).*was made for .*other"):
        configure(llama[0], **override(tmp_path / "adapter"))
    deeper = make_model(tmp_path / "deeper", num_hidden_layers=3)
    make_adapter(tmp_path / "deep-adapter", deeper, tmp_path / "deeper")
    with pytest.raises(ValueError, match=r"7 sparsified layers such as model\.layers\.2.*was made for"):
        configure(llama[0], **override(tmp_path / "deep-adapter"))


def without(adapter, path, *modules):
    masks = {name: mask for name, mask in adapter.masks.items() if name not in modules}
    return write_adapter(replace(adapter, masks=masks), path)


def test_threshold_missing_for_a_fused_shard(llama, tmp_path):
    path = without(llama[2], tmp_path / "part", "model.layers.1.self_attn.k_proj")
    expected = (
        r"model\.layers\.1\.self_attn\.k_proj\.spon_threshold.*q_proj, k_proj, v_proj in one layer.*target_modules"
    )
    with pytest.raises(ValueError, match=expected):
        configure(llama[0], **override(path))


def test_threshold_missing_in_a_merged_checkpoint(llama, tmp_path):
    path = merge(llama[0], llama[1], tmp_path / "merged")
    config = json.loads((path / "config.json").read_text())
    del config["quantization_config"]["thresholds"]["model.layers.0.mlp.up_proj"]
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"model\.layers\.0\.mlp\.up_proj.*gate_proj, up_proj in one layer"):
        configure(path)


def test_a_merged_linear_that_vllm_keeps_dense(llama):
    path = "model.layers.0.self_attn.kv_b_proj"
    settings = Settings(adapter=None, modules=(path,), announced={path: Announced(0.1)})
    with pytest.raises(
        SponError, match=rf"threshold of {path}: got 'one'.*vLLM keeps this linear dense.*target_modules"
    ):
        check_fit(settings, transformers.AutoConfig.from_pretrained(llama[0]), "merged")


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        pytest.param("format_version", 99, "format_version: got 99, expected 1 or 2.*Upgrade", id="newer"),
        pytest.param("format_version", None, "format_version: got None, expected 1", id="no version"),
        pytest.param("sparsity", 1.5, "sparsity: got 1.5", id="sparsity"),
        pytest.param("tokens", "some", "tokens: got 'some'.*all, decode", id="tokens"),
        pytest.param("dense_prefix", "1", "dense_prefix: got '1'", id="dense prefix"),
    ],
)
@pytest.mark.parametrize("overridden", [False, True], ids=["as it is", "with an override"])
def test_damaged_merged_checkpoint(llama, tmp_path, field, value, message, overridden):
    path = merge(llama[0], llama[1], tmp_path / "merged")
    config = json.loads((path / "config.json").read_text())
    stored = config["quantization_config"]
    stored[field] = value
    if value is None:
        del stored[field]
    (path / "config.json").write_text(json.dumps(config))
    fields = {"quant_method": "spon", "token_mode": "all"} if overridden else {}
    with pytest.raises(ValueError, match=message):
        configure(path, hf_overrides={"quantization_config": fields} if fields else {})


def test_decode_needs_the_dense_biases(llama, tmp_path):
    old = replace(llama[2], fields=replace(llama[2].fields, format_version=1, dense_prefix=0, alpha_scale={}))
    merged = merge(llama[0], write_adapter(old, tmp_path / "format1"), tmp_path / "merged")
    assert configure(merged).quant_config.settings.token_mode == "all"
    again = merge(llama[0], llama[1], tmp_path / "again")
    assert configure(again).quant_config.settings.token_mode == "decode"
    fields = {"quant_method": "spon", "token_mode": "decode"}
    with pytest.raises(ValueError, match="token_mode.*lacks the dense model's biases.*Serve the adapter"):
        configure(merged, hf_overrides={"quantization_config": fields})


def test_layer_that_is_not_linear(llama, tmp_path):
    norm = Mask(torch.ones(1), alpha=torch.ones(128))
    path = write_adapter(replace(llama[2], masks={**llama[2].masks, "model.norm": norm}), tmp_path / "norm")
    with pytest.raises(ValueError, match=r"model\.norm.*linears that"):
        configure(llama[0], **override(path))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        pytest.param({"token_mode": "some"}, "token_mode: got 'some'.*all, decode", id="token mode"),
        pytest.param({"max_sparse_tokens": 0}, "max_sparse_tokens: got 0", id="no tokens"),
        pytest.param({"max_sparse_tokens": "many"}, "max_sparse_tokens: got 'many'", id="words"),
        pytest.param({"weights": "columns"}, "weights: got 'columns'.*auto, rows, beside", id="weights"),
        pytest.param({"exact": "yes"}, "exact: got 'yes'.*true or false", id="exact"),
        pytest.param({"head": "int3"}, "head: got 'int3'.*none, int8", id="head"),
        pytest.param({"tau": 1}, "tau.*fields among", id="unknown field"),
    ],
)
def test_wrong_setting(llama, settings, message):
    with pytest.raises(ValueError, match=message):
        configure(llama[0], **override(llama[1], **settings))


def test_another_quantization_for_an_adapter(llama):
    with pytest.raises(ValueError, match="--quantization: got 'fp8'.*spon"):
        configure(llama[1], quantization="fp8")


def test_adapter_whose_base_has_moved(llama, tmp_path):
    path = edited(llama[1], tmp_path / "moved", base_model_name_or_path=str(tmp_path / "gone"))
    with pytest.raises(ValueError, match="gone.*vllm serve BASE --quantization spon --hf-overrides"):
        configure(path)
    path = edited(llama[1], tmp_path / "nameless", base_model_name_or_path=None)
    with pytest.raises(ValueError, match="the base model's name or path.*vllm serve BASE"):
        configure(path)


def test_two_adapters(llama, tmp_path, monkeypatch):
    merged = merge(llama[0], llama[1], tmp_path / "merged")
    monkeypatch.setenv("SPON_ADAPTER", str(llama[1]))
    assert configure(merged).quant_config.settings.merged  # the same one: harmless
    monkeypatch.setenv("SPON_ADAPTER", str(write_adapter(llama[2].without_alpha(), tmp_path / "teal")))
    with pytest.raises(ValueError, match="another one merged into it.*Serve the base model"):
        configure(merged)


def test_damaged_adapter(llama, tmp_path):
    path = edited(llama[1], tmp_path / "newer", format_version=99)
    with pytest.raises(ValueError, match="format_version: got 99.*Upgrade"):
        configure(path)


def test_dotted_arguments(llama):
    from vllm.engine.arg_utils import EngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    dotted = "--hf-overrides.quantization_config"
    words = ["--model", str(llama[0]), "--quantization", "spon", f"{dotted}.quant_method", "spon"]
    words += [f"{dotted}.adapter", str(llama[1]), f"{dotted}.max_sparse_tokens", "4"]
    arguments = EngineArgs.from_cli_args(EngineArgs.add_cli_args(FlexibleArgumentParser()).parse_args(words))
    settings = arguments.create_engine_config().quant_config.settings
    assert (settings.adapter, settings.limit) == (str(llama[1]), 4)


def test_the_compile_cache_tells_adapters_and_modes_apart(llama, tmp_path):
    base, adapter, _ = llama
    other = make_adapter(tmp_path / "other", make_model(tmp_path / "base"), base, alpha=0.5)
    assert other.digest != llama[2].digest
    sources = [override(adapter), override(tmp_path / "other"), override(adapter, token_mode="all")]
    sources += [override(adapter, max_sparse_tokens=3), override(adapter, head="int8")]
    hashes = {configure(base, **source).compute_hash() for source in sources}
    assert len(hashes) == 5 and configure(base, **override(adapter)).compute_hash() in hashes


def test_register_never_raises(monkeypatch, caplog):
    import logging

    import spon_vllm
    from spon_vllm import engine as engine_arguments

    monkeypatch.setattr(spon_vllm, "_registered", False)
    monkeypatch.setattr(engine_arguments, "install", lambda: 1 / 0)
    logging.getLogger("vllm").propagate = True
    spon_vllm.register()
    assert not spon_vllm._registered and "cannot be registered" in caplog.text


def test_register_is_idempotent():
    from vllm.engine.arg_utils import EngineArgs

    import spon_vllm

    spon_vllm.register()
    once = EngineArgs.create_engine_config
    spon_vllm._registered = False
    spon_vllm.register()
    assert EngineArgs.create_engine_config is once and spon_vllm._registered


@pytest.mark.parametrize(("sparsity", "limit"), [(0.5, 2), (0.6, 2), (0.7, 3), (0.8, 6)], ids="{}".format)
@pytest.mark.parametrize("merged", [False, True], ids=["adapter", "merged"])
def test_steps_are_sparse_while_their_tokens_skip_enough(llama, tmp_path, sparsity, limit, merged):
    fields = replace(llama[2].fields, sparsity=sparsity)
    adapter = write_adapter(replace(llama[2], fields=fields), tmp_path / "adapter")
    if merged:
        config = configure(merge(llama[0], adapter, tmp_path / "merged"))
    else:
        config = configure(llama[0], **override(adapter))
    assert config.quant_config.settings.max_sparse_tokens == limit


@pytest.mark.parametrize(
    ("path", "shape", "message"),
    [
        pytest.param(
            "model.norm", (128,), "modules_to_save: got 'model.norm'.*embedding or the output head", id="norm"
        ),
        pytest.param("lm_head", (300, 128), r"lm_head.weight: got \(300, 128\).*base model's", id="resized"),
        pytest.param("lm_head", (256, 128), None, id="output head"),
    ],
)
def test_trained_modules_are_served_or_named(llama, tmp_path, path, shape, message):
    adapter = saving(llama[1], tmp_path / "saved", {f"{path}.weight": torch.zeros(shape)})
    if message is None:
        assert configure(llama[0], **override(adapter)).quant_config.trained["lm_head"]["weight"].shape == shape
        with pytest.raises(ValueError, match="modules_to_save: got 'lm_head'.*--pipeline-parallel-size"):
            configure(llama[0], **override(adapter), pipeline_parallel_size=2)
        return
    with pytest.raises(ValueError, match=message):
        configure(llama[0], **override(adapter))


def test_trained_output_head_of_tied_embeddings(tmp_path):
    model = make_model(tmp_path / "base", tie_word_embeddings=True)
    make_adapter(tmp_path / "adapter", model, tmp_path / "base")
    adapter = saving(tmp_path / "adapter", tmp_path / "saved", {"lm_head.weight": torch.zeros(256, 128)})
    with pytest.raises(ValueError, match="modules_to_save: got 'lm_head'.*are one tensor"):
        configure(tmp_path / "base", **override(adapter))


def test_batch_invariance_is_not_promised(llama, monkeypatch):
    import vllm.envs as envs

    monkeypatch.setattr(envs, "VLLM_BATCH_INVARIANT", True, raising=False)
    with pytest.raises(ValueError, match="VLLM_BATCH_INVARIANT: got '1'.*on the other requests in it"):
        configure(llama[0], **override(llama[1]))


def test_base_that_vllm_reads_by_a_loader_of_its_own(llama, tmp_path):
    shutil.copytree(llama[0], tmp_path / "base")
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="quant_method: got 'bitsandbytes'.*default loader.*another format"):
        configure(tmp_path / "base", **override(llama[1]))


def test_the_environment_names_an_adapter_and_the_arguments_another_method(llama, monkeypatch):
    monkeypatch.setenv("SPON_ADAPTER", str(llama[1]))
    with pytest.raises(ValueError, match="--quantization: got 'fp8'.*'spon', as SPON_ADAPTER names an adapter"):
        configure(llama[0], quantization="fp8")


def test_a_method_that_vllm_chooses_itself_leaves_no_adapter_out(llama, monkeypatch):
    """As vLLM does for GGUF files: it overwrites `--quantization`."""
    from vllm.engine.arg_utils import EngineArgs

    make = EngineArgs.create_model_config

    def overwrite(self, *args, **kwargs):
        self.quantization, self.hf_overrides = None, {}
        return make(self, *args, **kwargs)

    monkeypatch.setattr(EngineArgs, "create_model_config", overwrite)
    with pytest.raises(ValueError, match="--quantization: got None, expected 'spon'"):
        configure(llama[0], **override(llama[1]))


def test_the_least_gpu_is_that_of_the_kernels():
    from spon_plugin.kernels.triton.launch import LEAST_CAPABILITY
    from spon_vllm.config import SponConfig

    assert LEAST_CAPABILITY == (8, 0) and SponConfig.get_min_capability() == 80
