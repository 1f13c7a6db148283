# SPDX-License-Identifier: Apache-2.0
"""The product on SmolLM2-135M, as a user types it: real commands in processes of their own."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from masks import alphas_of
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from spon_plugin import read_adapter

pytestmark = pytest.mark.slow
SPON = str(Path(sys.executable).with_name("spon"))
IDS = torch.arange(1, 129).view(1, -1) * 37 % 40_000


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory) -> tuple[Path, dict]:
    """The directory of a short `spon quickstart`, and what it printed with ``--json``."""
    directory = tmp_path_factory.mktemp("work") / "quickstart"
    command = [SPON, "quickstart", "--windows", "20", "--json", "-o", str(directory)]
    alone = {**os.environ, "PATH": "/usr/bin:/bin"}  # with no host's command, it names three of ours
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=alone)
    assert done.returncode == 0, done.stderr
    return directory, json.loads(done.stdout)


def base(directory: Path, dtype=torch.float32):
    return AutoModelForCausalLM.from_pretrained(directory / "model", dtype=dtype).eval()


def test_quickstart_trains_an_adapter_that_beats_its_own_masks(quickstart):
    directory, shown = quickstart
    adapter = read_adapter(directory / "adapter")
    assert len(adapter.masks) == len(alphas_of(adapter)) == 210
    assert adapter.base_model == str(directory / "model")
    evaluation = shown["evaluation"]
    assert evaluation["perplexity"]["dense"] < evaluation["perplexity"]["spon"] < evaluation["perplexity"]["teal"]
    assert evaluation["sparsity"]["achieved"] == pytest.approx(0.5, abs=0.05)
    assert "test part" in evaluation["text"]
    assert sorted(p.name for p in directory.iterdir()) == ["adapter", "model"]


def test_a_process_that_imports_only_transformers_and_peft_computes_the_same_bits(quickstart, tmp_path):
    directory, _ = quickstart
    with torch.no_grad():
        expected = PeftModel.from_pretrained(base(directory), directory / "adapter")(input_ids=IDS).logits
    code = f"""
import torch
from peft import PeftModel
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
torch.set_num_threads({torch.get_num_threads()})
base = AutoModelForCausalLM.from_pretrained({str(directory / "model")!r}, dtype=torch.float32)
model = PeftModel.from_pretrained(base, {str(directory / "adapter")!r})
with torch.no_grad():
    logits = model(input_ids=torch.arange(1, 129).view(1, -1) * 37 % 40_000).logits
save_file({{"logits": logits.contiguous()}}, {str(tmp_path / "logits.safetensors")!r})
"""
    # -I: neither this folder nor PYTHONPATH helps the process to find us, only the installation does.
    subprocess.run([sys.executable, "-I", "-c", code], check=True, cwd=tmp_path)
    assert torch.equal(load_file(tmp_path / "logits.safetensors")["logits"], expected)


def test_a_merged_model_is_saved_and_loaded_bit_for_bit(quickstart, tmp_path):
    directory, _ = quickstart
    merged = PeftModel.from_pretrained(base(directory, torch.bfloat16), directory / "adapter").merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto")
    assert type(again.get_submodule("model.layers.3.mlp.down_proj")).__name__ == "SparseLinear"
    with torch.no_grad():
        assert torch.equal(again(input_ids=IDS).logits, merged(input_ids=IDS).logits)


def test_peft_and_the_hooks_of_the_core_compute_the_same(quickstart):
    from spon_plugin import sparse_inputs

    directory, _ = quickstart
    adapter = read_adapter(directory / "adapter")
    with torch.no_grad():
        model = base(directory)
        with sparse_inputs(model, adapter.masks, adapter.fields.dense_prefix):
            expected = model(input_ids=IDS).logits.log_softmax(-1)
        found = PeftModel.from_pretrained(model, directory / "adapter")(input_ids=IDS).logits.log_softmax(-1)
    # An entry that rounding moves across its threshold changes a logit; on average nothing may move.
    assert (found - expected).abs().mean().item() < 1e-3


@pytest.mark.parametrize("index", range(3))
def test_the_next_three_commands_work_as_printed(quickstart, index):
    program, *arguments = shlex.split(quickstart[1]["next"][index])
    assert program == "spon"
    done = subprocess.run([SPON, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_generate_example(quickstart):
    directory, _ = quickstart
    example = Path(__file__).parents[2] / "examples" / "generate.py"
    command = [sys.executable, str(example), str(directory / "model"), str(directory / "adapter"), "The capital is"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "sparse: " in done.stdout and "dense:  " in done.stdout


def test_the_trainer_example(tiny_model_dir, tmp_path):
    (tmp_path / "text.txt").write_text("".join(f"Line {i} of a text.\n" for i in range(4000)))
    example = Path(__file__).parents[2] / "examples" / "train_with_trainer.py"
    command = [sys.executable, str(example), str(tiny_model_dir), str(tmp_path / "text.txt"), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert read_adapter(tmp_path / "out").has_alpha
