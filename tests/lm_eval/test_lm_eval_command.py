# SPDX-License-Identifier: Apache-2.0
"""The literal `lm_eval` command in a process of its own, with a real model, offline, and `spon report` on its files."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from masks import make_masks

from spon_plugin import Adapter, SponFields, find_sites, write_adapter
from spon_plugin.decoder.sites import target_names

# A name below lm_eval: a folder of tests alone would pass for a package called so.
pytest.importorskip("lm_eval.api", reason="needs lm-eval: pip install 'spon-plugin[lm-eval]'")

pytestmark = pytest.mark.slow

COMMAND = str(Path(sys.executable).parent / "lm_eval")
TASKS = "tiny_choice,tiny_generate,tiny_rolling"
DOCUMENTS = [
    {"question": "What is the capital of France?", "choices": ["London", "Paris", "Rome"], "answer": 1},
    {
        "question": "Which animal says meow?",
        "choices": ["The cat", "The dog", "The cow, in some countries"],
        "answer": 0,
    },
    {"question": "How many legs has a spider?", "choices": ["Two", "Four", "Eight"], "answer": 2},
]
YAML = {
    "tiny_choice": """
output_type: multiple_choice
doc_to_text: "Question: {{question}}\\nAnswer:"
doc_to_choice: choices
doc_to_target: answer
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
""",
    "tiny_generate": """
output_type: generate_until
doc_to_text: "Question: {{question}}\\nAnswer:"
doc_to_target: "{{choices[answer]}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 8}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
""",
    "tiny_rolling": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{question}} {{choices[answer]}}."
metric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]
""",
}


@pytest.fixture(scope="module")
def work(tmp_path_factory, smollm2_dir) -> Path:
    """A folder with tasks and two adapters for SmolLM2: `empty` (no mask, no alpha) and `spon50`."""
    from transformers import AutoModelForCausalLM

    path = tmp_path_factory.mktemp("command")
    (path / "tasks").mkdir()
    (path / "documents.jsonl").write_text("".join(json.dumps(document) + "\n" for document in DOCUMENTS))
    for name, body in YAML.items():
        source = f'dataset_path: json\ndataset_kwargs: {{data_files: {{test: "{path}/documents.jsonl"}}}}\n'
        (path / "tasks" / f"{name}.yaml").write_text(f"task: {name}\n{source}test_split: test\n{body}")
    model = AutoModelForCausalLM.from_pretrained(smollm2_dir)
    sites = find_sites(model)
    peft = {
        "base_model_name_or_path": str(smollm2_dir),
        "target_modules": target_names(sites, model),
        "task_type": "CAUSAL_LM",
    }
    for name, threshold, scale in (("empty", 0.0, 0.0), ("spon50", 0.2, 0.02)):
        thresholds = {module: torch.tensor([threshold]) for site in sites for module in site.modules}
        alphas = {module: scale * torch.ones(site.in_features) for site in sites for module in site.modules}
        write_adapter(Adapter(SponFields(0.5), make_masks(thresholds, alphas), peft), path / name)
    return path


def run(work: Path, *words: str, **variables: str) -> subprocess.CompletedProcess:
    ours = ("SPON_AUTOLOAD", "PYTHONPATH")
    env = {key: value for key, value in os.environ.items() if key not in ours}
    env |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_DATASETS_CACHE": str(work / "cache"), **variables}
    words = (*words, "--include_path", "tasks", "--device", "cpu", "--batch_size", "2")
    return subprocess.run(words, cwd=work, env=env, capture_output=True, text=True, timeout=600)


def evaluate(work: Path, output: str, model: str, arguments: str, tasks: str = TASKS, command=(COMMAND,)) -> dict:
    words = (*command, "--model", model, "--model_args", arguments, "--tasks", tasks, "--output_path", output)
    result = run(work, *words)
    assert result.returncode == 0, result.stderr
    (file,) = (work / output).rglob("results_*.json")
    return json.loads(file.read_text())


@pytest.fixture(scope="module")
def dense(work, smollm2_dir) -> dict:
    return evaluate(work, "dense", "hf", f"pretrained={smollm2_dir},dtype=bfloat16")


def test_no_mask_and_no_alpha_is_hf_to_the_last_digit(work, smollm2_dir, dense):
    got = evaluate(work, "same", "spon-hf", f"pretrained={smollm2_dir},spon=empty,dtype=bfloat16")
    assert got["results"] == dense["results"]
    assert set(got["results"]) == set(TASKS.split(","))
    assert got["config"]["spon"]["sparsity"]["measured"] < 0.01
    assert got["n-samples"]["tiny_choice"]["effective"] == len(DOCUMENTS)


def test_teal_and_spon_and_their_report(work, smollm2_dir, dense, tmp_path):
    """By the command and by its wrapper; one flag between the rows."""
    spon = evaluate(work, "spon", "spon-hf", f"pretrained={smollm2_dir},spon=spon50,dtype=bfloat16")
    wrapper = (sys.executable, "-m", "spon_lm_eval")
    arguments = f"pretrained={smollm2_dir},spon=spon50,alpha=off,tokens=decode,dtype=bfloat16"
    teal = evaluate(work, "teal", "spon-hf", arguments, command=wrapper)
    for result, alpha, tokens in ((spon, "on", "all"), (teal, "off", "decode")):
        block = result["config"]["spon"]
        assert (block["adapter"], block["alpha"], block["tokens"]) == ("spon50", alpha, tokens)
        assert 0.05 < block["sparsity"]["measured"] < 0.95 and len(block["sparsity"]["sites"]) == 120
        assert result["results"]["tiny_rolling"] != dense["results"]["tiny_rolling"]
    pytest.importorskip("typer", reason="needs the command line: pip install 'spon-plugin[cli]'")
    words = (sys.executable, "-m", "spon_cli", "report", "dense", "teal", "spon", "-o", str(tmp_path), "--json")
    shown = subprocess.run(words, cwd=work, capture_output=True, text=True, timeout=300)
    assert shown.returncode == 0, shown.stderr
    rows = json.loads(shown.stdout)["rows"]
    assert [row["label"] for row in rows] == ["dense", "TEAL 50%, decode", "SPON 50%"]
    assert [row["scores"]["tiny_choice"]["value"] for row in rows] == [
        result["results"]["tiny_choice"]["acc,none"] for result in (dense, teal, spon)
    ]
    assert rows[2]["commands"] == [
        f"lm_eval --model spon-hf --model_args pretrained={smollm2_dir},spon=spon50,dtype=bfloat16"
        f" --tasks {','.join(spon['results'])} --batch_size 2 --device cpu"
    ]
    assert "word_perplexity" in (tmp_path / "table.md").read_text()
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_wrong_arguments_end_the_wrapper_with_one_line(work):
    words = (
        sys.executable,
        "-m",
        "spon_lm_eval",
        "--model",
        "spon-hf",
        "--model_args",
        "spon=nowhere",
        "--tasks",
        TASKS,
    )
    result = run(work, *words)
    assert result.returncode == 2
    assert result.stderr.splitlines()[-1].startswith("error: adapter: got 'nowhere', expected a directory")


def test_switched_off(work):
    """Without registration at start-up lm-eval does not know the model; the wrapper still does."""
    words = ("--model", "spon-hf", "--model_args", "tokens=all", "--tasks", TASKS)
    result = run(work, COMMAND, *words, SPON_AUTOLOAD="0")
    assert result.returncode != 0 and "spon-hf" in result.stderr and "spon: got None" not in result.stderr
    result = run(work, sys.executable, "-m", "spon_lm_eval", *words, SPON_AUTOLOAD="0")
    assert result.returncode == 2 and "spon: got None, expected an adapter directory" in result.stderr


def test_example_on_local_tasks(work, tiny_model_dir, tmp_path):
    """The script of examples/, in its offline form, on a tiny model; what is there already is not made again."""
    pytest.importorskip("typer", reason="needs the command line: pip install 'spon-plugin[cli]'")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base = tmp_path / "base"
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(tiny_model_dir),
        AutoTokenizer.from_pretrained(tiny_model_dir),
    )
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(10)
    model.save_pretrained(base)
    tokenizer.save_pretrained(base)
    sites = find_sites(model)
    thresholds = {module: torch.tensor([0.3]) for site in sites for module in site.modules}
    alphas = {module: 0.1 * torch.ones(site.in_features) for site in sites for module in site.modules}
    peft = {"target_modules": target_names(sites, model), "task_type": "CAUSAL_LM"}
    write_adapter(Adapter(SponFields(0.5), make_masks(thresholds, alphas), peft), tmp_path / "adapter")
    script = Path(__file__).parents[2] / "examples" / "zero_shot.sh"
    env = os.environ | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "HF_DATASETS_CACHE": str(tmp_path / "cache"),
        "DTYPE": "float32",
        "LIMIT": "2",
        "DEVICE": "cpu",
    }
    words = ("bash", str(script), str(base), str(tmp_path / "adapter"), str(tmp_path / "out"), str(work / "tasks"))
    result = subprocess.run(words, env=env, capture_output=True, text=True, timeout=900)
    assert result.returncode == 0, result.stderr
    table = (tmp_path / "out" / "table.md").read_text()
    assert [line.split(" |")[0] for line in table.splitlines()[2:5]] == ["| dense", "| TEAL 50%", "| SPON 50%"]
    assert "acc, n=2" in table and (tmp_path / "out" / "plot.png").is_file()
    again = subprocess.run(words, env=env, capture_output=True, text=True, timeout=300)
    assert again.returncode == 0 and again.stderr.count("is there already") == 3
