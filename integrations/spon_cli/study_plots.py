# SPDX-License-Identifier: Apache-2.0
"""Plots of studies and analyses."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from spon_cli.plots import COLORS, figure
from spon_plugin.studies.ablation import DENSE
from spon_plugin.studies.comparison import OFF
from spon_plugin.studies.frontier_tables import equal_bytes, hull, label, points
from spon_plugin.studies.plan import Point, Study
from spon_plugin.studies.plan_tables import Rows, recovered
from spon_plugin.studies.quantized_bases import FULL, OWN

_LEVEL_LABELS = 6


def plot_study(study: Study, rows: Rows, file: Path) -> None:
    """A study: bars over categories, or lines over numbers."""
    tests = list(rows[DENSE]["tests"])
    if any(point.x is None for point in study.points):
        _bars(study, rows, tests, file)
    else:
        _lines(study, rows, tests, file)


def _value(study: Study, point: Point, rows: Rows, test: str) -> float | None:
    if study.figure == "recovered":
        return recovered(point, rows, test)
    value: float | None = rows[point.trial.name]["tests"][test]["perplexity"]
    return value


def _bars(study: Study, rows: Rows, tests: Sequence[str], file: Path) -> None:
    many = len(study.points) > _LEVEL_LABELS
    with figure(file, width=12 if many else max(6.5, 1.6 * len(study.points))) as (axes,):
        step = 0.8 / len(tests)
        for index, test in enumerate(tests):
            places = [place + (index - (len(tests) - 1) / 2) * step for place in range(len(study.points))]
            values = [_value(study, point, rows, test) or 0.0 for point in study.points]
            axes.bar(places, values, step, label=test)
        axes.axhline(0, color="0.4", linewidth=0.8)
        axes.set_xticks(range(len(study.points)), [point.label for point in study.points], fontsize=8)
        if many:
            axes.tick_params("x", rotation=30)
            for label in axes.get_xticklabels():
                label.set(ha="right", rotation_mode="anchor")
        axes.set(title=study.title, xlabel=study.axis, ylabel="share of the masks' perplexity gap recovered")
        axes.legend(fontsize=8)


def _lines(study: Study, rows: Rows, tests: Sequence[str], file: Path) -> None:
    shares = study.figure == "recovered"
    with figure(file, 1 if shares else len(tests)) as panels:
        for index, test in enumerate(tests):
            axes = panels[0 if shares else index]
            drawn: list[str] = []
            for series in dict.fromkeys(point.series for point in study.points):
                points = [(p.x, _value(study, p, rows, test)) for p in study.points if p.series == series]
                known = sorted((x, y) for x, y in points if x is not None and y is not None)
                if known:
                    family = series.partition(",")[0]
                    line = ("-", "--", ":")[drawn.count(family) % 3]
                    drawn.append(family)
                    color = None if shares else COLORS.get(family)
                    axes.plot(
                        *zip(*known, strict=True), line, marker="o", ms=4, color=color, label=test if shares else series
                    )
            if not shares:
                dense = rows[DENSE]["tests"][test]["perplexity"]
                axes.axhline(dense, color=COLORS["dense"], linewidth=1, label="dense")
                low, high = axes.get_ylim()
                axes.set(title=test, yscale="log" if low <= 0 or high > 5 * low else "linear")
            if study.log:
                ticks = sorted({point.x for point in study.points if point.x is not None})
                axes.set_xscale("log")
                axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks], fontsize=8)
                axes.minorticks_off()
            axes.set(xlabel=study.axis, ylabel="share of the masks' gap recovered" if shares else "perplexity")
            axes.legend(fontsize=8)
        if shares:
            panels[0].set_title(study.title)
            panels[0].axhline(0, color="0.4", linewidth=0.8)


def plot_shift(shift: Mapping[str, Sequence[Mapping[str, Any]]], file: Path) -> None:
    """Relative distance and CKA of every variant, over the blocks."""
    with figure(file, 2, width=5.5, height=4) as (left, right):
        for name, layers in shift.items():
            blocks = range(len(layers))
            left.plot(blocks, [layer["distance"] for layer in layers], "o-", ms=3, color=COLORS[name], label=name)
            right.plot(blocks, [layer["cka"] for layer in layers], "o-", ms=3, color=COLORS[name], label=name)
        left.set(xlabel="after block", ylabel="||h - h_dense|| / ||h_dense||, mean over tokens", ylim=(0, None))
        right.set(xlabel="after block", ylabel="linear CKA with the dense model", ylim=(None, 1))
        left.legend()


def plot_points(panels: Mapping[str, Mapping[str, Any]], method: str, file: Path) -> None:
    """Projected hidden states, one panel per block, lines from each prompt's dense state to its sparse ones.

    Args:
        panels: title -> variant -> points ``[prompts, 2]``, the dense ones first.
        method: of the projection, for the axes.
        file: to write.
    """
    with figure(file, len(panels), width=4, height=4) as axes:
        for index, (title, points) in enumerate(panels.items()):
            dense = points["dense"]
            for name, places in points.items():
                if name != "dense":
                    for start, end in zip(dense.tolist(), places.tolist(), strict=True):
                        ends = zip(start, end, strict=True)
                        axes[index].plot(*ends, color=COLORS[name], linewidth=0.5, alpha=0.5, zorder=1)
                axes[index].scatter(places[:, 0], places[:, 1], s=10, color=COLORS[name], label=name, zorder=2)
            axes[index].set(title=title, xlabel=f"{method} 1", ylabel=f"{method} 2", xticks=[], yticks=[])
        axes[0].legend(fontsize=8)


def plot_precisions(rows: Sequence[Mapping[str, Any]], file: Path) -> None:
    """Bars per precision: dense, TEAL, SPON with the full-precision adapter and with the base's own."""
    tests = list(rows[0]["tests"])
    precisions = list(dict.fromkeys(row["precision"] for row in rows))
    bars = [("dense", FULL, ""), ("teal", FULL, ""), ("spon", FULL, ""), ("spon", OWN, "//")]
    labels = ["dense", "TEAL", "SPON, full-precision adapter", "SPON, trained on this base"]
    with figure(file, len(tests), width=1.4 * len(precisions) + 2) as panels:
        for axes, test in zip(panels, tests, strict=True):
            for index, ((variant, origin, hatch), label) in enumerate(zip(bars, labels, strict=True)):
                found = [
                    (precisions.index(row["precision"]), row["tests"][test][variant])
                    for row in rows
                    if row["adapter"] == origin and row["tests"][test][variant] is not None
                ]
                color = COLORS["dense" if variant == "dense" else variant.upper()]
                places = [place + (index - 1.5) * 0.2 for place, _ in found]
                axes.bar(places, [v for _, v in found], 0.2, label=label, color=color, hatch=hatch, edgecolor="white")
            axes.set_xticks(range(len(precisions)), precisions)
            axes.set(title=test, ylabel="perplexity")
        panels[-1].legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))


_GIVEN = ", given adapters"


def _series(row: Mapping[str, Any]) -> str:
    """What a row of the frontier is joined with, beside its format; empty for dense rows and masks of the study."""
    if row.get("adapter"):
        return _GIVEN
    return " + alpha" if row["alpha"] != OFF else ""


def plot_frontier(rows: Sequence[Mapping[str, Any]], file: Path) -> None:
    """Perplexity, and mean KL, against the bits that a token reads of a weight; two panels for each text.

    A line for each format over its sparsities: dotted without alphas, dashed with those of the study, unbroken with
    adapters that were given; rows of different formats that read as many bytes
    are joined, and each panel's convex hull is drawn under all of them.
    """
    from matplotlib import colormaps
    from matplotlib.ticker import ScalarFormatter

    texts = list(rows[0]["texts"])
    formats = list(dict.fromkeys(row["format"] for row in sorted(rows, key=lambda row: -row["bytes_dense"])))
    a_weight = max(row["bytes_per_token"] / row["bits_per_weight"] for row in rows) / 1e6  # MB for a bit a weight
    with figure(file, 2 * len(texts), width=7, height=6) as panels:
        for index, (text, figure_name) in enumerate((t, f) for t in texts for f in ("perplexity", "kl")):
            axes = panels[index]
            best = hull(rows, text, figure_name)
            for first, second in equal_bytes(rows):
                ends = [(row["bits_per_weight"], row["texts"][text].get(figure_name)) for row in (first, second)]
                if all(value for _, value in ends):
                    axes.plot(*zip(*ends, strict=True), color="0.75", linewidth=0.8, zorder=1)
            for number, name in enumerate(formats):
                color = colormaps["tab10"](number % 10)
                for series in dict.fromkeys(_series(row) for row in rows):
                    mine = [row for row in rows if row["format"] == name and _series(row) in (series, "")]
                    mine = [row for row in mine if _series(row) == series or not row["sparsity"]]
                    places = [(bits, math.exp(log)) for bits, log, _ in points(mine, text, figure_name)]
                    if not places or (series and len(mine) < 2):
                        continue
                    line, marker = {"": (":", "o"), _GIVEN: ("-", "D")}.get(series, ("--", "s"))
                    title = f"{name}{series}"
                    axes.plot(*zip(*places, strict=True), line, marker=marker, ms=4, color=color, label=title, zorder=2)
            under = [(row["bits_per_weight"], row["texts"][text][figure_name]) for row in best]
            axes.plot(*zip(*under, strict=True), color="0.2", linewidth=3, alpha=0.25, label="convex hull", zorder=0)
            for row, place in zip(best, under, strict=True):  # below a hull nothing is in the way
                axes.annotate(
                    label(row), place, xytext=(-5, -3), textcoords="offset points", fontsize=7, ha="right", va="top",
                    bbox={"boxstyle": "square,pad=0.1", "facecolor": "white", "edgecolor": "none", "alpha": 0.75},
                )  # fmt: skip
            bits = [row["bits_per_weight"] for row in rows]
            least, widest = min(bits) - 0.45 * (max(bits) - min(bits)), 1.08 * max(bits)
            axes.set(title=text, xlabel="bits read for each weight, by a token", yscale="log", xlim=(least, widest))
            axes.set_ylabel("perplexity" if figure_name == "perplexity" else "mean KL to bf16, nats a token")
            axes.secondary_xaxis("top", functions=(lambda x: x * a_weight, lambda x: x / a_weight)).set_xlabel(
                "MB a token"
            )
            if figure_name == "perplexity":
                axes.yaxis.set_major_formatter(ScalarFormatter())
                axes.yaxis.set_minor_formatter(ScalarFormatter())
        panels[0].legend(fontsize=7)


def plot_recovery(flat: Sequence[Mapping[str, Any]], file: Path) -> None:
    """What rows of the first seed recover, a panel for each target, a colour for each test text."""
    targets = sorted({record["sparsity"] for record in flat})
    shown = [record for record in flat if record["seed"] == 0 and record["recovered"] is not None]
    with figure(file, max(1, len(targets)), width=7, height=7) as panels:
        for target, axes in zip(targets, panels, strict=True):
            own = [record for record in shown if record["sparsity"] == target]
            labels = list(dict.fromkeys(record["row"] for record in own))[::-1]
            for test in dict.fromkeys(record["test"] for record in own):
                points = [
                    (record["recovered"], labels.index(record["row"])) for record in own if record["test"] == test
                ]
                marker = "o" if test.endswith(" 512") else "x"
                axes.plot(*zip(*points, strict=True), marker, ms=4, label=test)
            axes.set_yticks(range(len(labels)), labels, fontsize=7)
            axes.axvline(1, color=COLORS["dense"], linewidth=1)
            axes.set(title=f"{target:.0%}", xlabel="share of uniform TEAL's gap recovered", xlim=(0, 1.02))
        if shown:
            panels[0].legend(fontsize=6)
