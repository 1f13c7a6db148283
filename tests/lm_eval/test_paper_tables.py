# SPDX-License-Identifier: Apache-2.0
"""The script of examples/ that makes the paper's tables: what it says before it begins, and one small run of it all."""

import importlib.util
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("typer", reason="needs the command line: pip install 'spon-plugin[cli]'")

from commands import run

SCRIPT = Path(__file__).parents[2] / "examples" / "paper_tables.py"


@pytest.fixture(scope="module")
def paper_tables():
    spec = importlib.util.spec_from_file_location("paper_tables", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["paper_tables"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["paper_tables"]


@pytest.fixture
def no_command(paper_tables, monkeypatch):
    """The commands that would have run; every one succeeds."""
    ran = []
    done = SimpleNamespace(returncode=0)
    fake = SimpleNamespace(run=lambda command, **_: ran.append(list(command)) or done)
    monkeypatch.setattr(paper_tables, "subprocess", fake)
    return ran


def test_a_dry_run_says_what_both_models_cost_and_touches_nothing(paper_tables, no_command, tmp_path, capsys):
    assert paper_tables.main([str(tmp_path / "out"), "--dry-run", "--yes"]) == 0
    text = capsys.readouterr().out
    for model, gigabytes in (("meta-llama/Meta-Llama-3-8B", "16.1"), ("Qwen/Qwen3-8B", "16.4")):
        assert f"\n{model}\n" in text and f"download {gigabytes} GB; memory about 26 GB of a GPU's" in text
    assert text.count("hours by how fast this machine multiplies: table 1 ") == 2
    assert text.count("python -m spon_cli compare ") == 2 and text.count("python -m spon_cli train ") == 4
    assert text.count("python -m spon_lm_eval --model hf ") == 2
    assert text.count("python -m spon_lm_eval --model spon-hf ") == 8
    assert "commonsense_qa,truthfulqa_mc1,truthfulqa_mc2,openbookqa,medmcqa,mmlu,mathqa,gsm8k" in text
    assert not no_command and not (tmp_path / "out").exists()


@pytest.fixture
def small(tiny_model_dir, tmp_path):
    """Arguments that make every step as small as can be, for a model with an end token, as lm-eval wants."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(10)
    base = tmp_path / "base"
    tokenizer.save_pretrained(base)
    AutoModelForCausalLM.from_pretrained(tiny_model_dir).save_pretrained(base)
    text, tasks = tmp_path / "text.txt", tmp_path / "tasks"
    text.write_text(" ".join(str(number) for number in range(4000)))
    tasks.mkdir()
    document = {"question": "Is it?", "choices": ["Yes", "No"], "answer": 0}
    (tmp_path / "documents.jsonl").write_text(json.dumps(document) + "\n")
    (tasks / "tiny.yaml").write_text(
        f'task: tiny\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: "{tmp_path}/documents.jsonl"}}}}\n'
        "test_split: test\noutput_type: multiple_choice\ndoc_to_text: question\ndoc_to_choice: choices\n"
        "doc_to_target: answer\nmetric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\n"
    )
    return [
        str(tmp_path / "out"), "--models", str(base), "--methods", "teal", "--sparsity", "0.5", "--windows", "2",
        "--window", "32", "--preset", "fast", "--max-tokens", "1024", "--text", str(text), "--test", str(text),
        "--tasks", "tiny", "--task-dir", str(tasks), "--dtype", "float32",
    ]  # fmt: skip


def test_without_yes_a_model_that_is_here_takes_a_first_step_and_no_more(paper_tables, no_command, small, capsys):
    assert paper_tables.main(small) == 2
    text = capsys.readouterr().out
    assert "download 0.0 GB" in text and "hours by a first step here: table 1 " in text
    assert "Nothing was begun. Add --yes to begin." in text and not no_command


def test_steps_that_are_done_are_not_done_again_and_training_goes_on(paper_tables, no_command, small, tmp_path):
    out = tmp_path / "out" / "base"
    (out / "rows" / "dense" / "any").mkdir(parents=True)
    (out / "rows" / "dense" / "any" / "results_1.json").touch()
    (out / "spon50.training").mkdir()
    with pytest.raises(FileNotFoundError):  # no table came of commands that did nothing
        paper_tables.main([*small, "--yes"])
    names = [command[2:4] for command in no_command]
    assert names == [
        ["spon_cli", "compare"],
        ["spon_cli", "train"],
        *[["spon_lm_eval", "--model"]] * 2,
        ["spon_cli", "report"],
    ]
    assert "--resume" in no_command[1] and "--resume" not in no_command[0]


@pytest.mark.parametrize("measured", [False, True], ids=["reckoned", "measured"])
def test_hours_follow_what_is_to_be_done(paper_tables, measured, tmp_path):
    given = paper_tables.arguments([str(tmp_path), "--methods", "teal", "--sparsity", "0.5"])
    speed = paper_tables.Speed(1000.0, 100.0, 5.0, None, measured)
    hours = paper_tables.hours(given, speed)
    # Calibrated on 8,192 tokens; dense, off, mean and on evaluated; trained on 300 windows of 256.
    assert hours["table 1"] * 3600 == pytest.approx((8192 + 4 * 300_000) / 1000 + 300 * 256 / 100)
    rows = 3 * (paper_tables.TASK_TOKENS / 1000 + paper_tables.GENERATED_STEPS / 5)
    assert hours["table 2 and figure 2"] * 3600 == pytest.approx(rows + 10 * 2048 * 128 / 100)


def in_this_process(command, **_):
    """Run a step here: every process of its own would import torch and lm-eval again."""
    _, module, *words = command[1:]
    code = 0
    if module == "spon_cli":
        code, _, err = run(*words)
        assert code == 0, err
    else:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", ["lm_eval", *words])
            importlib.import_module(f"{module}.__main__").main()
    return SimpleNamespace(returncode=code)


@pytest.mark.slow
def test_the_whole_of_it_on_a_tiny_model(paper_tables, small, tmp_path, monkeypatch, capsys):
    pytest.importorskip("lm_eval.api", reason="needs lm-eval: pip install 'spon-plugin[lm-eval]'")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    ran = []
    fake = SimpleNamespace(run=lambda step, **_: ran.append(step) or in_this_process(step))
    monkeypatch.setattr(paper_tables, "subprocess", fake)  # the module's own: lm-eval runs git by the real one
    assert paper_tables.main([*small, "--yes"]) == 0
    assert len(ran) == 6
    page = (tmp_path / "out" / "tables.md").read_text()
    assert "| 50% | TEAL | off |" in page and "| 50% | TEAL | trained |" in page
    for row in ("dense", "TEAL 50%", "SPON 50%"):
        assert f"| {row} |" in page
    assert (tmp_path / "out" / "base" / "table2" / "plot.png").is_file() and "base/table2/plot.png" in page
    monkeypatch.setattr(paper_tables, "first_step", lambda *_: pytest.fail("next to nothing is left to measure for"))
    ran.clear()
    capsys.readouterr()
    assert paper_tables.main([*small, "--yes"]) == 0
    assert [step[3] for step in ran] == ["compare", "report"]
    assert capsys.readouterr().out.count("  done: ") == 4
