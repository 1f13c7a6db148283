# SPDX-License-Identifier: Apache-2.0
"""What PEFT saves beside masks (trained modules, resized embeddings, a targeted head) is read by PEFT and the core."""

import pytest
import torch
from commands import run
from peft import PeftModel, get_peft_model
from spon_models import ids, layers, logits, tiny
from transformers import AutoModelForCausalLM

from spon_peft import SponConfig, collect_adapter
from spon_plugin import read_adapter, write_adapter

CONFIGS = {
    "a trained head": dict(modules_to_save=["lm_head"]),
    "trained norms, by the end of their names": dict(modules_to_save=["norm"]),
    "a targeted head": dict(target_modules=["lm_head", "down_proj"]),
    "resized embeddings": dict(),
}


@pytest.fixture(params=CONFIGS)
def made(request, tmp_path):
    """A trained model, how its base is made, and where both are saved."""
    tiny().save_pretrained(tmp_path / "base")

    def base():
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()
        if request.param == "resized embeddings":
            torch.manual_seed(7)
            model.resize_token_embeddings(72)
        return model

    model = get_peft_model(base(), SponConfig(task_type="CAUSAL_LM", init_weights=False, **CONFIGS[request.param]))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name:
                parameter.add_(torch.randn_like(parameter))
    model.save_pretrained(tmp_path / "adapter")
    return model.eval(), base, tmp_path


def test_peft_reads_it(made):
    model, base, path = made
    again = PeftModel.from_pretrained(base(), path / "adapter").eval()
    assert torch.equal(logits(again), logits(model))


def test_what_the_core_writes_is_what_it_read(made):
    model, base, path = made
    adapter = read_adapter(path / "adapter")
    assert adapter.saved
    write_adapter(adapter, path / "copy")
    again = PeftModel.from_pretrained(base(), path / "copy").eval()
    assert torch.equal(logits(again), logits(model))
    trained = collect_adapter(model).saved
    assert trained.keys() == (adapter.saved.keys() if adapter.peft["modules_to_save"] else set())
    assert all(torch.equal(adapter.saved[key], tensor) for key, tensor in trained.items())


def test_merging_puts_it_in_place(made):
    model, _, path = made
    expected = logits(model)
    model.merge_and_unload().save_pretrained(path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(path / "merged").eval()
    torch.testing.assert_close(logits(merged), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("command", ["eval", "train", "analyze"])
def test_commands_that_run_masks_by_hooks_refuse_it(made, command):
    _, _, path = made
    arguments = {"train": [path / "adapter", "-o", path / "out"]}
    given = arguments.get(command, [path / "base", "--adapter", path / "adapter"])
    code, out, err = run(command, *given)
    assert (code, out) == (2, "")
    assert "takes masks and alphas alone" in " ".join(err.split())


def test_inspect_reads_it(made):
    code, _, err = run("inspect", made[2] / "adapter", "--json")
    assert code == 0, err


def test_a_sparse_head_is_trained_on_its_own_logits():
    from spon_plugin.decoder.head import find_head

    config = SponConfig(task_type="CAUSAL_LM", target_modules=["lm_head", "down_proj"], alpha_modules=["down_proj"])
    model = get_peft_model(tiny(), config)
    assert any(layer.out_features == 64 for layer in layers(model))
    with pytest.warns(UserWarning, match="its output head is sparse"):
        assert find_head(model.get_base_model(), {"input_ids": ids()}) is None
