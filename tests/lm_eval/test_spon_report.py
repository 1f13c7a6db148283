# SPDX-License-Identifier: Apache-2.0
"""`spon report` on the result files of this repository, as lm-eval wrote them, and on altered copies."""

import copy
import json
from pathlib import Path

import commands
import pytest

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "zero_shot"
TASK = "openbookqa_local"


def run(*arguments: object) -> tuple[int, str, str]:
    return commands.run("report", *arguments, COLUMNS="400")


def rows(*arguments: object) -> dict[str, dict]:
    code, out, err = run(*arguments, "--json")
    assert code == 0, err
    return {row["label"]: row for row in json.loads(out)["rows"]}


class Folder:
    """Result files of one task to change and report on."""

    def __init__(self, path: Path):
        self.path = path
        self.files = {
            name: json.loads((RESULTS / name / "openbookqa.json").read_text()) for name in ("dense", "teal", "spon")
        }

    def __getitem__(self, name: str) -> dict:
        return self.files[name]

    def add(self, name: str, like: str) -> dict:
        self.files[name] = copy.deepcopy(self.files[like])
        return self.files[name]

    def write(self) -> Path:
        for name, result in self.files.items():
            (self.path / f"{name}.json").write_text(json.dumps(result))
        return self.path

    def error(self) -> str:
        code, out, err = run(self.write())
        assert (code, out) == (2, ""), out
        return " ".join(err.split())


@pytest.fixture
def folder(tmp_path) -> Folder:
    return Folder(tmp_path)


# --- the table ---


def test_the_table_of_the_repository_is_that_of_its_files(tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")  # no cell is wrapped
    code, out, err = run(RESULTS, "-o", tmp_path / "made" / "here")
    assert code == 0, err
    assert (tmp_path / "made" / "here" / "table.md").read_text() == (RESULTS / "table.md").read_text()
    assert (tmp_path / "made" / "here" / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert "SPON 50%" in out and "Table and plot written" in err
    assert run(RESULTS, "-o", tmp_path / "made" / "here")[0] == 0, "again, over its own files"


def test_rows_and_cells(folder):
    found = rows(folder.write())
    assert list(found) == ["dense", "TEAL 50%", "SPON 50%"]
    for label, name in zip(found, ("dense", "teal", "spon"), strict=True):
        result, score = folder[name]["results"][TASK], found[label]["scores"][TASK]
        assert (score["metric"], score["value"], score["stderr"]) == (
            "acc",
            result["acc,none"],
            result["acc_stderr,none"],
        )
        assert score["n"] == folder[name]["n-samples"][TASK]["effective"] == 500
        share = result["acc,none"] / folder["dense"]["results"][TASK]["acc,none"]
        assert found[label]["relative"] == {TASK: pytest.approx(share)}
    assert found["dense"]["sparsity"] is None
    assert found["SPON 50%"]["sparsity"] == pytest.approx(folder["spon"]["config"]["spon"]["sparsity"]["measured"])


def test_markdown_cells(folder, tmp_path):
    folder["dense"]["results"][TASK] |= {"acc,none": 0.4, "acc_stderr,none": 0.0212}
    folder["spon"]["results"][TASK] |= {"acc,none": 0.36, "acc_stderr,none": "N/A"}
    folder["spon"]["config"]["spon"]["sparsity"]["measured"] = 0.4987
    assert run(folder.write(), "-o", tmp_path / "out")[0] == 0
    head, _, dense, _, spon, *_ = (tmp_path / "out" / "table.md").read_text().splitlines()
    assert head == f"|  | {TASK}<br>acc, n=500 | mean relative | measured sparsity |"
    assert dense == "| dense | 40.0 ± 2.1 | 1.000 | - |"
    assert spon == "| SPON 50% | 36.0 (0.90) | 0.900 | 49.9% |"


def test_files_of_one_model_make_one_row(folder):
    other = json.loads(json.dumps(folder["spon"]).replace(TASK, "another_task"))
    other["config"]["spon"]["sparsity"] |= {"measured": 0.8, "masked_tokens": 300}
    folder["spon"]["config"]["spon"]["sparsity"] |= {"measured": 0.4, "masked_tokens": 100}
    folder.files["more"] = other
    found = rows(folder.write())
    assert list(found) == ["dense", "TEAL 50%", "SPON 50%"]
    assert sorted(found["SPON 50%"]["scores"]) == ["another_task", TASK]
    assert found["SPON 50%"]["sparsity"] == pytest.approx(0.7), "weighted by tokens"
    (command,) = found["SPON 50%"]["commands"]
    assert f"--tasks another_task,{TASK} " in command
    code, out, _ = run(folder.path, "--json")
    assert code == 0 and json.loads(out)["mean_over"] == [TASK], "only what every row has"


def test_different_limits_of_different_tasks_are_different_commands(folder):
    other = json.loads(json.dumps(folder["spon"]).replace(TASK, "another_task"))
    other["config"]["limit"] = 100.0
    folder.files["more"] = other
    commands = rows(folder.write())["SPON 50%"]["commands"]
    assert [("--limit 100" in command, f"--tasks {TASK}" in command) for command in commands] == [
        (True, False),
        (False, True),
    ]


@pytest.mark.parametrize(
    ("metric", "expected"),
    [pytest.param((), "acc", id="default"), pytest.param(("--metric", "acc_norm"), "acc_norm", id="acc_norm")],
)
def test_metric(folder, metric, expected):
    assert rows(folder.write(), *metric)["dense"]["scores"][TASK]["metric"] == expected


def test_metric_where_less_is_better_has_no_share(folder):
    for name in ("dense", "teal", "spon"):
        folder[name]["results"][TASK] = {"perplexity,none": 12.345, "perplexity_stderr,none": 0.5, "alias": TASK}
        folder[name]["higher_is_better"][TASK] = {"perplexity": False}
    found = rows(folder.write())
    assert found["SPON 50%"]["scores"][TASK]["value"] == 12.345 and found["SPON 50%"]["relative"] == {}
    assert "12.35 ± 0.50" in run(folder.path)[1]


def test_a_group_stands_for_its_members(folder):
    for name in ("dense", "teal", "spon"):
        result = folder[name]
        for part, size in (("part_a", 30), ("part_b", 12)):
            result["results"][part] = {"acc,none": 0.1}
            result["n-samples"][part] = {"original": 99, "effective": size}
            result["n-shot"][part] = 0
        result["results"]["half"] = {"acc,none": 0.1}
        result["results"]["whole"] = {"acc,none": 0.25, "acc_stderr,none": 0.03}
        result["group_subtasks"] = {"whole": ["half", "part_b"], "half": ["part_a"]}
        result["higher_is_better"]["whole"] = {"acc": True}
    found = rows(folder.write())["dense"]["scores"]
    assert set(found) == {TASK, "whole"}
    assert (found["whole"]["value"], found["whole"]["n"], found["whole"]["shots"]) == (0.25, 42, 0)


def test_without_a_dense_row_there_are_no_shares(folder, tmp_path):
    del folder.files["dense"]
    found = rows(folder.write())
    assert all(row["relative"] == {} for row in found.values())
    assert run(folder.path, "-o", tmp_path / "out")[0] == 0
    assert "Mean over: none (no dense row)." in (tmp_path / "out" / "table.md").read_text()


def test_arguments_as_they_were_written(folder):
    """lm-eval keeps what `simple_evaluate` was given, which may be a string."""
    for name, result in [("spon", folder["spon"]), ("other", folder.add("other", "spon"))]:
        result["config"]["spon"]["adapter"] = f"/somewhere/{name}"
        result["config"]["model_args"] = f"pretrained=/base,spon=/somewhere/{name}"
    found = rows(folder.write())
    assert sum(label.endswith(("(spon)", "(other)")) for label in found) == 2


def test_rows_that_would_have_one_label(folder):
    decode = folder.add("decode", "spon")
    decode["config"]["model_args"]["tokens"] = decode["config"]["spon"]["tokens"] = "decode"
    other = folder.add("other", "spon")
    other["config"]["model_args"]["spon"] = other["config"]["spon"]["adapter"] = "runs/other"
    labels = list(rows(folder.write()))
    name = Path(folder["spon"]["config"]["spon"]["adapter"]).name
    assert labels == ["dense", "TEAL 50%", "SPON 50% (other)", f"SPON 50% ({name})", "SPON 50%, decode"]


def test_command(folder):
    result = folder["spon"]
    result["config"] |= {
        "model_args": {"spon": "my adapter", "alpha": "off"},
        "batch_size": "auto:4",
        "device": "cuda:0",
        "limit": 0.5,
        "gen_kwargs": {"temperature": 0.7},
        "fewshot_seed": 5,
    }
    result |= {"n-shot": {TASK: 5}, "chat_template": "{{ messages }}", "fewshot_as_multiturn": True}
    (command,) = rows(folder.write() / "spon.json")["SPON 50%"]["commands"]
    assert command == (
        f"lm_eval --model spon-hf --model_args 'spon=my adapter,alpha=off' --tasks {TASK} --num_fewshot 5"
        " --batch_size auto:4 --device cuda:0 --limit 0.5 --gen_kwargs temperature=0.7 --seed 0,1234,1234,5"
        " --apply_chat_template --fewshot_as_multiturn"
    )


# --- what is refused ---


@pytest.mark.parametrize(
    ("content", "message"),
    [
        pytest.param("{", "bad.json', expected JSON", id="not-json"),
        pytest.param("[1]", "expected a result file of lm-eval", id="a-list"),
        pytest.param('{"loss": 1}', "(no results, config, n-samples", id="other-json"),
        pytest.param(None, "expected a file that exists", id="missing"),
    ],
)
def test_files_that_are_no_results(tmp_path, content, message):
    if content is not None:
        (tmp_path / "bad.json").write_text(content)
    code, out, err = run(tmp_path / "bad.json")
    assert (code, out) == (2, "") and message in " ".join(err.split())


def test_results_without_a_model(folder):
    del folder["teal"]["config"]["model_args"]
    assert "(no config: model_args)" in folder.error()


def test_empty_directory(tmp_path):
    code, _, err = run(tmp_path)
    assert code == 2 and "expected a directory with .json files of lm-eval in it" in " ".join(err.split())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param(
            lambda r: r["n-samples"].update({TASK: {"original": 500, "effective": 100}}),
            f"{TASK}: documents (limit): got 100, expected 500",
            id="limit",
        ),
        pytest.param(lambda r: r["n-shot"].update({TASK: 5}), "examples in the prompt: got 5, expected 0", id="shots"),
        pytest.param(lambda r: r["versions"].update({TASK: 2.0}), f"{TASK}: version: got 2.0", id="version"),
        pytest.param(
            lambda r: r["config"].update(model_dtype="torch.float32"), "dtype: got 'torch.float32'", id="dtype"
        ),
        pytest.param(lambda r: r["config"]["spon"].update(base_model="other"), "base_model: got 'other'", id="base"),
        pytest.param(lambda r: r.update(chat_template_sha="1f"), "chat template: got '1f', expected None", id="chat"),
        pytest.param(lambda r: r["results"].update({TASK: {"alias": TASK}}), "expected a metric", id="no-metric"),
    ],
)
def test_rows_that_are_not_comparable(folder, change, message):
    change(folder["teal"])
    assert message in folder.error()


def test_a_task_twice(folder):
    folder.add("again", "spon")
    assert "a second result of this model" in folder.error()


def test_two_dense_models(folder):
    folder.add("other", "dense")["config"]["model_args"]["revision"] = "old"
    assert "expected one dense model" in folder.error()


@pytest.mark.parametrize("change", [{"model": "vllm"}, {"model_args": {"pretrained": "base", "peft": "lora"}}])
def test_models_that_are_neither_dense_nor_ours(folder, change):
    folder["dense"]["config"] |= change
    assert "(the dense model) or spon-hf" in folder.error()
