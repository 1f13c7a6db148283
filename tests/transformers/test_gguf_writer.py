# SPDX-License-Identifier: Apache-2.0
import sys

import pytest
import torch
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from spon_plugin import SponError
from spon_transformers.formats import check_format, is_masked, load_format, rounding_of
from spon_transformers.gguf_writer import bytes_read, check_kind, gguf_kinds, write_gguf
from spon_transformers.loading import load_model
from spon_transformers.quantize import Rounding

SIZES = dict(
    vocab_size=64, hidden_size=64, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=64, rms_norm_eps=1e-5, initializer_range=0.3,
    rope_parameters={"rope_type": "default", "rope_theta": 5000.0},
)  # fmt: skip
IDS = torch.randint(0, 64, (2, 20), generator=torch.Generator().manual_seed(0))
KINDS = {
    "llama": (LlamaForCausalLM, LlamaConfig, {}),
    "llama, tied": (LlamaForCausalLM, LlamaConfig, {"tie_word_embeddings": True}),
    "llama, biases": (LlamaForCausalLM, LlamaConfig, {"attention_bias": True}),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, {"tie_word_embeddings": True}),
    "gemma3": (Gemma3ForCausalLM, Gemma3TextConfig, {"head_dim": 16, "sliding_window": 8, "num_hidden_layers": 6,
               "rope_parameters": {kind: {"rope_type": "default", "rope_theta": base} for kind, base in
                                   (("full_attention", 5000.0), ("sliding_attention", 10000.0))}}),
}  # fmt: skip


def make(kind):
    cls, config, changes = KINDS[kind]
    torch.manual_seed(0)
    model = cls(config(**{**SIZES, **changes})).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if name.endswith("bias") or (kind == "gemma3" and name.endswith("norm.weight")):
            parameter.normal_()
        parameter.copy_(parameter.bfloat16())
    return model


@pytest.mark.parametrize("kind", ["llama", "qwen2", "llama, tied", "gemma3"])
def test_transformers_reads_back_the_same_model(tmp_path, kind):
    model = make(kind)
    file = write_gguf(model, tmp_path / "m.gguf", "BF16")
    again = load_model(str(file), "float32")
    rope = again.config.rope_parameters
    assert rope.get("full_attention", rope)["rope_theta"] == 5000.0
    assert again.config.rms_norm_eps == pytest.approx(1e-5)
    # Gemma's norms are stored with one added, which rounds them in float32.
    close = {"rtol": 1e-4, "atol": 1e-4} if kind == "gemma3" else {"rtol": 0, "atol": 0}
    torch.testing.assert_close(again(input_ids=IDS).logits, model(input_ids=IDS).logits, **close)
    size, weights = bytes_read(file)
    plain = sum(p.numel() for p in model.parameters() if p.dim() > 1)
    vectors = sum(p.numel() for p in model.parameters() if p.dim() == 1)
    table = 0 if model.config.tie_word_embeddings else model.model.embed_tokens.weight.numel()
    assert weights == plain + vectors - table and size == 2 * (plain - table) + 4 * vectors


@pytest.mark.parametrize("kind_of_model", ["llama", "gemma3"])
def test_llama_cpp_rounds_it(tmp_path, kind_of_model):
    pytest.importorskip("llama_cpp")
    model = make(kind_of_model)
    truth, before = model(input_ids=IDS).logits, 0.0
    for kind, low, high in (("Q8_0", 8.4, 8.7), ("Q4_K_M", 4.5, 6.5), ("Q2_K", 2.5, 5.0)):
        file = write_gguf(model, tmp_path / f"{kind}.gguf", kind)
        size, weights = bytes_read(file)
        assert low < 8 * size / weights < high
        error = float((load_model(str(file), "float32")(input_ids=IDS).logits - truth).abs().mean())
        assert before < error < 1.5 * float(truth.std())
        before = error
    assert {path.name for path in tmp_path.iterdir()} == {"Q8_0.gguf", "Q4_K_M.gguf", "Q2_K.gguf"}


def test_kinds_are_those_that_need_no_importance_matrix():
    pytest.importorskip("llama_cpp")
    assert {"Q2_K", "Q3_K_M", "Q4_K_M", "Q8_0"} <= set(gguf_kinds()) and not any("IQ" in k for k in gguf_kinds())
    with pytest.raises(SponError, match="format: got 'gguf:IQ2_XS', expected gguf: and one of"):
        check_kind("IQ2_XS")


def test_what_the_file_cannot_hold_is_refused(tmp_path):
    other = MistralForCausalLM(MistralConfig(**{k: v for k, v in SIZES.items() if k != "rope_parameters"}))
    with pytest.raises(
        SponError, match="model: got 'mistral', expected for a .gguf file, one of llama, qwen2, gemma3_text"
    ):
        write_gguf(other, tmp_path / "m.gguf")
    with pytest.raises(SponError, match="a Llama with biases"):
        write_gguf(make("llama, biases"), tmp_path / "m.gguf")
    model = make("llama")
    model.config.rope_parameters = {"rope_type": "llama3", "rope_theta": 5000.0}
    with pytest.raises(SponError, match="rope_type llama3"):
        write_gguf(model, tmp_path / "m.gguf")
    for name, value in (("query_pre_attn_scalar", 168), ("final_logit_softcapping", 30.0)):
        model = make("gemma3")
        setattr(model.config, name, value)
        with pytest.raises(SponError, match=f"model's {name}: got '?{value}'?, expected for a .gguf file"):
            write_gguf(model, tmp_path / "m.gguf")


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    with pytest.raises(SponError, match=r"that package\. pip install 'spon-plugin\[llama-cpp\]'"):
        check_format("gguf:Q4_K_M")


def test_formats_are_known_by_name():
    for name in ("bf16", "int8", "int4", "int4-g32", "int4-g32-asym"):
        check_format(name)
        assert is_masked(name)
    check_format("int3-g32-asym")
    assert not is_masked("gguf:Q2_K") and not is_masked("int3-g32-asym")
    with pytest.raises(SponError, match="format: got 'fp3', expected bf16, int8, int4, int3 .*, or gguf:"):
        check_format("fp3")
    assert rounding_of("int8") == Rounding(8, None) and rounding_of("bf16") is None
    assert (
        rounding_of("int4-g32-asym") == Rounding(4, 32, symmetric=False) == rounding_of("int4-g32-asym", make("qwen2"))
    )
    assert rounding_of("int4", make("qwen2")) == Rounding(4, 64)


@pytest.mark.parametrize(
    ("format", "options"),
    [
        ("int8", ["--bits", 8]),
        ("int4", ["--bits", 4, "--group", 64]),
        ("int4-g32-asym", ["--bits", 4, "--group", 32, "--asymmetric"]),
    ],
)
def test_a_rounded_model_has_the_values_of_spon_quantize(tmp_path, format, options):
    """Layer by layer those that transformers loads of the checkpoint; the head is the dense one's, rounded to int8."""
    from commands import run
    from tiny_models import make_byte_tokenizer
    from transformers import AutoModelForCausalLM

    make("llama").to(torch.bfloat16).save_pretrained(tmp_path / "m")
    make_byte_tokenizer().save_pretrained(tmp_path / "m")
    code, _, err = run("quantize", tmp_path / "m", *options, "-o", tmp_path / "q")
    assert code == 0, err
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "q", dtype=torch.bfloat16)
    theirs(input_ids=IDS)  # decodes
    stored = load_format(str(tmp_path / "m"), format)
    for path in stored.bytes.codes:
        ours, weight = stored.model.get_submodule(path).weight, theirs.get_submodule(path).weight
        assert torch.equal(ours.bfloat16(), weight.bfloat16())
    head, full = stored.model.lm_head.weight, make("llama").lm_head.weight
    assert 0 < (head - full).abs().max() < full.abs().max() / 127
    assert type(stored.model.lm_head) is torch.nn.Linear and stored.model.dtype == torch.float32
    assert load_format(str(tmp_path / "m"), format, dtype="bfloat16").model.dtype == torch.bfloat16


@pytest.mark.parametrize("format", ["int3", "int3-g32-asym"])
def test_three_bits_are_values_of_eight_levels_a_group(tmp_path, format):
    model = make("llama").to(torch.bfloat16)
    model.save_pretrained(tmp_path / "m")
    stored = load_format(str(tmp_path / "m"), format)
    group = 32 if "g32" in format else 64
    for path, size in stored.bytes.codes.items():
        values, full = stored.model.get_submodule(path).weight, model.get_submodule(path).weight
        groups = values.unflatten(1, (-1, group)).flatten(0, 1)
        assert all(len(row.unique()) <= 8 for row in groups)
        assert size == full.numel() * 3 // 8 and 0 < (values - full).abs().mean() < 0.3 * full.abs().mean()
    dense = load_format(str(tmp_path / "m"), "int4-g32-asym" if "g32" in format else "int4").bytes
    scales = sum(stored.bytes.codes.values()) // 24 if "asym" in format else 0  # a bit less of each zero point
    assert stored.bytes.weights == dense.weights and stored.bytes.rest < dense.rest + (not scales)
