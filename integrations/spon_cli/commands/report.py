# SPDX-License-Identifier: Apache-2.0
"""`spon report`: lm-eval's result files as one table and one plot."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from spon_cli import options
from spon_cli.command import command
from spon_cli.output import note, percent, show_json, show_table
from spon_cli.plots import COLORS, figure
from spon_cli.results import DENSE, METRICS, Run, Score, read_runs, relative
from spon_plugin.files import make_directory

TABLE, PLOT = "table.md", "plot.png"
CAPTION = (
    "In brackets: the share of the dense score. Errors are lm-eval's standard errors, each row's own; "
    "rows share their documents, so differences between rows are surer than these say."
)


@dataclass(frozen=True, kw_only=True)
class ReportOptions(options.JsonOptions):
    """Options of `spon report`."""

    results: Annotated[list[Path], typer.Argument(metavar="RESULTS...", help="lm-eval's .json files or directories.")]
    output: Annotated[
        Path | None, options.output_option(f"Directory for {TABLE} and {PLOT}; made if it is not there.")
    ] = None
    metric: Annotated[
        list[str] | None, typer.Option(help="Metric that stands for a task; may repeat, the first it has counts.")
    ] = None


@command
def report_command(given: ReportOptions) -> None:
    """Compare the dense model, its masks (TEAL) and SPON on the tasks of lm-eval.

    Files of one model make one row. Rows must have been evaluated alike: base model, dtype, number of documents.

    [dim]spon report results/dense results/teal50 results/spon50 -o report[/dim]
    """
    runs = read_runs(given.results, tuple(given.metric) if given.metric else METRICS)
    dense = next((run for run in runs if run.label == DENSE), None)
    if given.output is not None:
        table = markdown(runs, dense)
        make_directory(given.output)
        (given.output / TABLE).write_text(table, encoding="utf-8", errors="backslashreplace")
        plot(runs, dense, given.output / PLOT)
    if given.json:
        rows = [{**run.as_json(), "relative": {t: s for t, (s, _) in relative(run, dense).items()}} for run in runs]
        show_json({"tasks": tasks_of(runs), "mean_over": common_tasks(runs), "rows": rows})
        return
    columns = ["", *(f"{task}\n{heading(runs, task)}" for task in tasks_of(runs)), "mean relative", "sparsity"]
    show_table("Zero-shot accuracy, %", columns, [cells(run, runs, dense) for run in runs], CAPTION)
    if given.output is not None:
        note(f"Table and plot written to {given.output}")


def tasks_of(runs: Sequence[Run]) -> list[str]:
    """Every task, in the order of the files."""
    return list(dict.fromkeys(task for run in runs for task in run.scores))


def common_tasks(runs: Sequence[Run]) -> list[str]:
    """The tasks that every row has and that can be related to the dense model: the mean is over these."""
    dense = next((run for run in runs if run.label == DENSE), None)
    return [task for task in tasks_of(runs) if all(task in relative(run, dense) for run in runs)]


def heading(runs: Sequence[Run], task: str) -> str:
    """Metric and number of documents of a task, the same in every row."""
    score = next(run.scores[task] for run in runs if task in run.scores)
    shots = f", {score.shots}-shot" if score.shots else ""
    return f"{score.metric}, n={score.n}{shots}"


def cells(run: Run, runs: Sequence[Run], dense: Run | None) -> list[str | None]:
    """A row of the table."""
    shares = relative(run, dense)
    common = common_tasks(runs)
    mean = sum(shares[task][0] for task in common) / len(common) if common else None
    values = [
        score_text(run.scores[task], shares.get(task) if run is not dense else None) if task in run.scores else None
        for task in tasks_of(runs)
    ]
    return [run.label, *values, None if mean is None else f"{mean:.3f}", percent(run.sparsity)]


def score_text(score: Score, share: tuple[float, float | None] | None) -> str:
    """``34.2 ± 2.1 (0.97)``; a metric where less is better is no percentage."""
    scale, digits = (100, 1) if score.higher_is_better and 0 <= score.value <= 1 else (1, 2)
    text = f"{scale * score.value:.{digits}f}"
    if score.stderr is not None:
        text += f" ± {scale * score.stderr:.{digits}f}"
    return text if share is None else f"{text} ({share[0]:.2f})"


def markdown(runs: Sequence[Run], dense: Run | None) -> str:
    """The table, and the commands that made its rows."""
    tasks = tasks_of(runs)
    head = ["", *(f"{task}<br>{heading(runs, task)}" for task in tasks), "mean relative", "measured sparsity"]
    lines = ["| " + " | ".join(head) + " |", "| --- |" + " ---: |" * (len(head) - 1)]
    lines += ["| " + " | ".join(cell or "-" for cell in cells(run, runs, dense)) + " |" for run in runs]
    base = runs[0]
    mean = ", ".join(common_tasks(runs)) or "none (no dense row)"
    lines += ["", f"{base.base_model}, {base.dtype.removeprefix('torch.')}. {CAPTION} Mean over: {mean}.", ""]
    for run in runs:
        kernel = "" if run.kernel is None else f" (kernel: {run.kernel})"
        lines += [f"{run.label}{kernel}:", "", "```sh", *run.commands, "```", ""]
    return "\n".join(lines)


def plot(runs: Sequence[Run], dense: Run | None, file: Path) -> None:
    """Bars per task: scores relative to the dense model, or as they are if there is no dense row."""
    bars: dict[str, dict[str, tuple[float, float | None]]] = {
        run.label: relative(run, dense)
        if dense is not None
        else {task: (score.value, score.stderr) for task, score in run.scores.items() if score.higher_is_better}
        for run in runs
    }
    tasks = [task for task in tasks_of(runs) if any(task in shares for shares in bars.values())]
    width = 0.8 / len(runs)
    with figure(file, width=max(5.0, 1.5 * len(tasks) + 2), height=4) as (axes,):
        for index, run in enumerate(runs):
            shown = [(place, *bars[run.label][task]) for place, task in enumerate(tasks) if task in bars[run.label]]
            axes.bar(
                [place + (index - (len(runs) - 1) / 2) * width for place, _, _ in shown],
                [value for _, value, _ in shown],
                width,
                yerr=[stderr or 0.0 for _, _, stderr in shown],
                label=run.label,
                **_style(run.label, index),
            )
        if dense is not None:
            axes.axhline(1.0, color="0.4", linewidth=0.8, linestyle=":")
        axes.set_xticks(range(len(tasks)), [f"{task}\n{heading(runs, task)}" for task in tasks], fontsize=8)
        axes.set(ylabel="score relative to dense" if dense is not None else "score", ylim=(0, None))
        axes.legend(ncols=len(runs), loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False)


def _style(label: str, index: int) -> dict[str, Any]:
    first = label.split()[0]
    hatch = "//" if ", decode" in label else None
    return {"color": COLORS.get(first, f"C{index}"), "hatch": hatch, "edgecolor": "white", "error_kw": {"linewidth": 1}}
