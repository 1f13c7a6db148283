# SPDX-License-Identifier: Apache-2.0
"""lm-eval's own `--model vllm`, by the literal command: a merged checkpoint, and an adapter on a quantized base."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import transformers
from engines import make_adapter, make_model, merge

# A name below lm_eval: a folder of tests alone would pass for a package called so.
pytest.importorskip("lm_eval.api", reason="needs lm-eval: pip install 'spon-plugin[lm-eval]'")

pytestmark = pytest.mark.slow

TASK = """
task: tiny_choice
dataset_path: json
dataset_kwargs: {data_files: {test: "%s"}}
test_split: test
output_type: multiple_choice
doc_to_text: "Question: {{question}}\\nAnswer:"
doc_to_choice: choices
doc_to_target: answer
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""
DOCUMENTS = [
    {"question": "What is the capital of France?", "choices": ["London", "Paris", "Rome"], "answer": 1},
    {"question": "Which animal says meow?", "choices": ["The cat", "The dog"], "answer": 0},
]


def logprobs(work: Path, name: str, *arguments: str, **environment: str) -> list[float]:
    """The log-likelihood of every choice, by one run of the command."""
    command = [Path(sys.executable).parent / "lm_eval", *arguments, "--include_path", work, "--tasks", "tiny_choice"]
    subprocess.run(
        [*command, "--log_samples", "--output_path", work / name],
        check=True,
        cwd=work,
        env={**os.environ, "HF_DATASETS_CACHE": str(work / "cache"), "VLLM_CPU_KVCACHE_SPACE": "1", **environment},
    )
    (samples,) = (work / name).rglob("samples_*.jsonl")
    rows = sorted((json.loads(line) for line in samples.read_text().splitlines()), key=lambda row: row["doc_id"])
    return [float(response[0][0]) for row in rows for response in row["resps"]]


VLLM = ("--model", "vllm", "--model_args")
HF = ("--model", "hf", "--device", "cpu", "--model_args")
OPTIONS = "dtype=float32,enforce_eager=True,max_model_len=256"


@pytest.fixture
def task(tmp_path):
    """The task's files, and a model with a tokenizer."""
    model = make_model(tmp_path / "base")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "base")
    tokenizer.eos_token = "!"  # lm-eval wants one, any one
    tokenizer.save_pretrained(tmp_path / "base")
    (tmp_path / "documents.jsonl").write_text("".join(json.dumps(document) + "\n" for document in DOCUMENTS))
    (tmp_path / "tiny_choice.yaml").write_text(TASK % (tmp_path / "documents.jsonl"))
    return model


def test_lm_eval_runs_the_checkpoint_in_vllm(tmp_path, task):
    model = task
    for prefix in (0, 1):  # a merge with dense first positions holds the dense biases too, which `decode` needs
        make_adapter(tmp_path / f"adapter{prefix}", model, tmp_path / "base", dense_prefix=prefix)
        merge(tmp_path / "base", tmp_path / f"adapter{prefix}", tmp_path / f"merged{prefix}")
    masked = f"pretrained={tmp_path / 'merged0'},quantization=spon,{OPTIONS}"
    sparse = logprobs(tmp_path, "all", *VLLM, masked, SPON_TOKEN_MODE="all")
    prompts_dense = f"pretrained={tmp_path / 'merged1'},quantization=spon,{OPTIONS}"
    dense = logprobs(tmp_path, "decode", *VLLM, prompts_dense, SPON_TOKEN_MODE="decode")
    merged = logprobs(tmp_path, "hf", *HF, f"pretrained={tmp_path / 'merged0'},dtype=float32")
    base = logprobs(tmp_path, "base", *HF, f"pretrained={tmp_path / 'base'},dtype=float32")
    assert sparse == pytest.approx(merged, abs=1e-2)
    assert dense == pytest.approx(base, abs=1e-3)
    assert max(abs(a - b) for a, b in zip(sparse, dense, strict=True)) > 0.1


def test_lm_eval_runs_an_adapter_on_a_quantized_base_in_vllm(tmp_path, task):
    pytest.importorskip("compressed_tensors", reason="pip install 'spon-plugin[quantize]'")
    from spon_transformers.quantize import Rounding, quantize, save_quantized

    base = tmp_path / "w8"
    make_adapter(tmp_path / "adapter", task, base)
    quantize(task, Rounding(8, 32))
    save_quantized(task, base)
    transformers.AutoTokenizer.from_pretrained(tmp_path / "base").save_pretrained(base)
    vllm = f"pretrained={base},quantization=spon,{OPTIONS}"
    own = {"SPON_ADAPTER": str(tmp_path / "adapter"), "SPON_TOKEN_MODE": "all", "SPON_HEAD": "none"}  # as ours has it
    served = logprobs(tmp_path, "vllm", *VLLM, vllm, **own)
    ours = ("--model", "spon-hf", "--device", "cpu", "--model_args")
    expected = logprobs(tmp_path, "ours", *ours, f"pretrained={base},spon={tmp_path / 'adapter'},dtype=float32")
    dense = logprobs(tmp_path, "dense", *HF, f"pretrained={base},dtype=float32")
    assert served == pytest.approx(expected, abs=1e-2)
    assert max(abs(a - b) for a, b in zip(served, dense, strict=True)) > 0.1
