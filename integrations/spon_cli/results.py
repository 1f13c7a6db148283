# SPDX-License-Identifier: Apache-2.0
"""Read lm-eval's result files, for `spon report`: one row per evaluated model, checked to be comparable."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from spon_plugin import SponError

DENSE = "dense"
METRICS = ("acc", "exact_match")
_DENSE_MODELS = ("hf", "hf-auto", "huggingface")
_SEEDS = {"random_seed": 0, "numpy_seed": 1234, "torch_seed": 1234, "fewshot_seed": 1234}


@dataclass(frozen=True)
class Score:
    """One model on one task.

    Attributes:
        metric: its name.
        value: as lm-eval has it.
        stderr: its standard error; None where lm-eval has none.
        n: number of documents.
        shots: number of examples in the prompt; None for a group of tasks that differ in it.
        higher_is_better: whether more is better; relative scores need it.
    """

    metric: str
    value: float
    stderr: float | None
    n: int
    shots: int | None
    higher_is_better: bool


@dataclass
class Run:
    """One model, over all its result files.

    Attributes:
        label: ``dense``, ``TEAL 50%``, ``SPON 50%``, with what else tells it from the other rows.
        base_model: name or path.
        dtype: of the weights.
        sparsity: measured over the evaluated tokens of all files; None for the dense model.
        kernel: what computed the sparsified linears; None for the dense model.
        scores: task -> score.
        commands: that made the files.
        files: where they are.
    """

    label: str
    base_model: str
    dtype: str
    sparsity: float | None = None
    kernel: str | None = None
    scores: dict[str, Score] = field(default_factory=dict)
    commands: list[str] = field(default_factory=list)
    files: list[Path] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """For ``--json``."""
        scores = {task: vars(score) for task, score in self.scores.items()}
        return {**vars(self), "scores": scores, "files": [str(file) for file in self.files]}


def read_runs(paths: Iterable[Path], metrics: Sequence[str] = METRICS) -> list[Run]:
    """Read result files and put those of one model together.

    Args:
        paths: files, or directories whose ``.json`` files all are result files.
        metrics: which metric stands for a task: the first of these that it has, else its own first.

    Returns:
        The dense model first, then by label.

    Raises:
        SponError: a file is not a result file of lm-eval; or the rows are not comparable: other base models, numbers
            of documents, of examples in the prompt, versions of a task, dtypes, or chat templates.
    """
    kept: dict[str, list[tuple[Path, dict[str, Any]]]] = {}
    for file in _files(paths):
        result = _read(file)
        _check_content(file, result, metrics)
        config = result["config"]
        key = json.dumps([config["model"], config["model_args"], config.get("gen_kwargs")], sort_keys=True)
        kept.setdefault(key, []).append((file, result))
    runs = [_run(files, metrics) for files in kept.values()]
    _tell_apart(runs, [files[0][1]["config"] for files in kept.values()])
    _check_comparable(runs, [result for files in kept.values() for result in files])
    return sorted(runs, key=lambda run: (run.label != DENSE, not run.label.startswith("TEAL"), run.label))


def relative(run: Run, dense: Run | None) -> dict[str, tuple[float, float | None]]:
    """Scores as shares of the dense model's, with their standard errors on the same scale, by task.

    The standard error is the run's own: the dense score counts as given. Documents are the same ones in both, so the
    error of the difference is smaller. Tasks without a dense score, or where less is better, are left out.
    """
    shares = {}
    for task, score in run.scores.items():
        reference = dense.scores.get(task) if dense is not None else None
        if reference is not None and reference.value and score.higher_is_better:
            stderr = None if score.stderr is None else score.stderr / reference.value
            shares[task] = (score.value / reference.value, stderr)
    return shares


def command(result: Mapping[str, Any], tasks: Sequence[str]) -> str:
    """The command line that makes a result file, as far as the file tells (not `--include_path`)."""
    config = result["config"]
    arguments = config["model_args"]
    if isinstance(arguments, Mapping):
        plain = all(isinstance(value, str | int | float | bool) for value in arguments.values())
        pairs = ",".join(f"{name}={value}" for name, value in arguments.items())
        arguments = pairs if plain else json.dumps(arguments)
    words = ["lm_eval", "--model", config["model"], "--model_args", arguments, "--tasks", ",".join(tasks)]
    shots = {count for task, count in result.get("n-shot", {}).items() if task in tasks}
    if len(shots) == 1 and shots != {0}:
        words += ["--num_fewshot", str(*shots)]
    for name in ("batch_size", "device", "limit"):
        if config.get(name) is not None:
            value = config[name]
            words += [f"--{name}", str(int(value) if isinstance(value, float) and value >= 1 else value)]
    if config.get("gen_kwargs"):
        words += ["--gen_kwargs", ",".join(f"{name}={value}" for name, value in config["gen_kwargs"].items())]
    if any(config.get(name, default) != default for name, default in _SEEDS.items()):
        words += ["--seed", ",".join(str(config.get(name)) for name in _SEEDS)]
    if result.get("system_instruction"):
        words += ["--system_instruction", result["system_instruction"]]
    if result.get("chat_template"):
        words.append("--apply_chat_template")
    if result.get("fewshot_as_multiturn"):
        words.append("--fewshot_as_multiturn")
    return shlex.join(words)


def _files(paths: Iterable[Path]) -> list[Path]:
    found: list[Path] = []
    for path in paths:
        try:
            files = sorted(path.rglob("*.json")) if path.is_dir() else [path]
        except OSError as error:
            raise SponError.of("results", str(path), f"files that can be read ({error.strerror})") from error
        if not files:
            raise SponError.of("results", str(path), "a directory with .json files of lm-eval in it")
        found += files
    return list(dict.fromkeys(found))


def _read(file: Path) -> dict[str, Any]:
    try:
        result = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise SponError.of("results", str(file), "a file that exists") from error
    except OSError as error:
        raise SponError.of("results", str(file), f"a file that can be read ({error.strerror})") from error
    except ValueError as error:
        raise SponError.of("results", str(file), f"JSON ({error})") from error
    parts = ("results", "config", "n-samples", "n-shot", "versions", "higher_is_better")
    missing = [p for p in parts if not isinstance(result, dict) or not isinstance(result.get(p), dict)]
    if not missing:
        missing = [f"config: {name}" for name in ("model", "model_args") if name not in result["config"]]
    if missing:
        expected = f"a result file of lm-eval 0.4.10 or newer (no {', '.join(missing)})"
        raise SponError.of("results", str(file), expected, "They are called results_DATE.json.")
    return result


def _check_content(file: Path, result: dict[str, Any], metrics: Sequence[str]) -> None:
    """Raise `SponError` unless a row can be made of this file alone: so a broken one is named."""
    try:
        run = _run([(file, result)], metrics)
        json.dumps([run.as_json(), str(result["config"].get("spon", {}).get("adapter"))])
    except SponError:
        raise
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        expected = f"a result file of lm-eval, whole and unchanged ({type(error).__name__}: {error})"
        raise SponError.of("results", str(file), expected) from error


def _run(files: Sequence[tuple[Path, dict[str, Any]]], metrics: Sequence[str]) -> Run:
    """One row from the files of one model."""
    config = files[0][1]["config"]
    spon = config.get("spon")
    if spon is None:
        pairs = _pairs(config["model_args"])
        if config["model"] not in _DENSE_MODELS or pairs.get("peft") or pairs.get("delta"):
            expected = f"one of {', '.join(_DENSE_MODELS)} (the dense model) or spon-hf"
            raise SponError.of(f"{files[0][0]}: model", config["model"], expected)
        run = Run(DENSE, str(pairs.get("pretrained")), str(config.get("model_dtype")))
    else:
        label = f"{'SPON' if spon['alpha'] == 'on' else 'TEAL'} {spon['sparsity']['target']:.0%}"
        label += "" if spon["tokens"] == "all" else f", {spon['tokens']}"
        run = Run(label, spon["base_model"], str(config.get("model_dtype")), kernel=spon["kernel"])
        counted = [result["config"]["spon"]["sparsity"] for _, result in files]
        tokens = sum(part["masked_tokens"] for part in counted)
        if tokens:
            run.sparsity = sum((part["measured"] or 0.0) * part["masked_tokens"] for part in counted) / tokens
    alike: dict[str, tuple[dict[str, Any], list[str]]] = {}
    for file, result in files:
        tasks = _top_level(result)
        for task in tasks:
            if task in run.scores:
                raise SponError.of(f"{file}: {task}", "a second result of this model", "one", "Leave one file out.")
            run.scores[task] = _score(result, task, metrics)
        alike.setdefault(command(result, ()), (result, []))[1].extend(tasks)
        run.files.append(file)
    run.commands = [command(result, tasks) for result, tasks in alike.values()]
    return run


def _top_level(result: Mapping[str, Any]) -> list[str]:
    """The tasks and groups that were asked for, without the members of groups."""
    members = {member for group in result.get("group_subtasks", {}).values() for member in group}
    return [task for task in result["results"] if task not in members]


def _score(result: Mapping[str, Any], task: str, metrics: Sequence[str]) -> Score:
    values = {
        key: value
        for key, value in result["results"][task].items()
        if "," in key and not key.partition(",")[0].endswith("_stderr") and isinstance(value, int | float)
    }
    better = result["higher_is_better"].get(task, {})
    names = [key.partition(",")[0] for key in values]
    wanted = [metric for metric in metrics if metric in names] or [name for name in names if better.get(name)] or names
    if not wanted:
        raise SponError.of(f"results: {task}", list(result["results"][task]), "a metric with a number")
    key = next(key for key in values if key.partition(",")[0] == wanted[0])
    metric, _, kind = key.partition(",")
    stderr = result["results"][task].get(f"{metric}_stderr,{kind}")
    leaves = _leaves(result, task)
    shots = {result["n-shot"].get(leaf) for leaf in leaves}
    return Score(
        metric if kind == "none" else f"{metric} ({kind})",
        float(values[key]),
        float(stderr) if isinstance(stderr, int | float) else None,
        sum(result["n-samples"].get(leaf, {}).get("effective", 0) for leaf in leaves),
        shots.pop() if len(shots) == 1 else None,
        bool(better.get(metric, metric in METRICS)),
    )


def _leaves(result: Mapping[str, Any], task: str) -> list[str]:
    members = result.get("group_subtasks", {}).get(task) or []
    return [leaf for member in members for leaf in _leaves(result, member)] or [task]


def _pairs(arguments: Any) -> dict[str, Any]:
    """`model_args` as lm-eval stores them: by name, or as they were written."""
    if isinstance(arguments, Mapping):
        return dict(arguments)
    return dict(part.split("=", 1) for part in str(arguments).split(",") if "=" in part)


def _tell_apart(runs: Sequence[Run], configs: Sequence[Mapping[str, Any]]) -> None:
    """Add the adapter's name, and then the differing arguments, to labels that would be the same."""
    for detail in ("adapter", "arguments"):
        labels = [run.label for run in runs]
        for run, config in zip(runs, configs, strict=True):
            if labels.count(run.label) > 1 and "spon" in config:
                more = Path(config["spon"]["adapter"]).name
                if detail == "arguments":
                    said = ("pretrained", "spon", "tokens", "alpha")
                    more = json.dumps({k: v for k, v in _pairs(config["model_args"]).items() if k not in said})
                run.label = f"{run.label} ({more})"


def _check_comparable(runs: Sequence[Run], results: Sequence[tuple[Path, dict[str, Any]]]) -> None:
    if [run.label for run in runs].count(DENSE) > 1:
        files = [str(run.files[0]) for run in runs if run.label == DENSE]
        raise SponError.of("results", files, "one dense model", "Leave the others out.")
    for name in ("base_model", "dtype"):
        _all_the_same(name, [(run.files[0], getattr(run, name)) for run in runs])
    _all_the_same("chat template", [(file, result.get("chat_template_sha")) for file, result in results])
    for task in {task for run in runs for task in run.scores}:
        rows = [(run.files[0], run.scores[task]) for run in runs if task in run.scores]
        for name, title in (("n", "documents (limit)"), ("shots", "examples in the prompt"), ("metric", "metric")):
            _all_the_same(f"{task}: {title}", [(file, getattr(score, name)) for file, score in rows])
        versions = [(file, result["versions"].get(task)) for file, result in results if task in result["results"]]
        _all_the_same(f"{task}: version", versions)


def _all_the_same(field_name: str, values: Sequence[tuple[Path, Any]]) -> None:
    for file, value in values[1:]:
        if value != values[0][1]:
            remedy = "Rows of one table must be evaluated alike."
            raise SponError.of(f"{file}: {field_name}", value, f"{values[0][1]!r}, as in {values[0][0]}", remedy)
