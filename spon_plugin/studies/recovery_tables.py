# SPDX-License-Identifier: Apache-2.0
"""The rows of `spon recover` as a table: shares of uniform TEAL's gap, with paired intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from spon_plugin.studies.bootstrap import Interval, interval, window_losses
from spon_plugin.studies.equal_bytes import Between
from spon_plugin.studies.evaluation import share_recovered
from spon_plugin.studies.recovery_plan import COMMON, UNIFORM
from spon_plugin.studies.tables import markdown_table, number

NOTES = (
    "`recovered`: (TEAL - row) / (TEAL - dense), of perplexities; TEAL is uniform and brought to the same share of "
    "bytes read in the sparse model, as every row is after its training. In brackets the interval of 95% of a paired "
    "bootstrap over windows. `masked` and `read`: on the test texts, the mean of all; `read` with what a row reads "
    "beside the weights. Seconds of training beside other processes."
)

EQUAL = (
    "The same shares, of what uniform TEAL would lose where it saves as many bytes on that text as the row does: masks "
    "that were matched on one text keep more of some others. TEAL's loss over the dense model is drawn through its "
    "rows as a power of what is saved."
)

SEEDS = (
    "The mean over seeds of the order of the windows, and in brackets the lowest and the highest; at equal bytes where "
    "there is such a table."
)

MORE = (
    "Differences of shares, in pairs over the same windows. Rows of the options' steps differ from that one in what "
    "their label says, the others in their steps, too."
)


def share(dense: Mapping[str, Any], teal: Mapping[str, Any], row: Mapping[str, Any]) -> tuple[float | None, Any]:
    """The share that a row recovers on one test, and its interval; see `bootstrap.interval`."""
    value = share_recovered(dense["perplexity"], teal["perplexity"], row["perplexity"])
    means = window_losses(dense, teal, row)
    return value, None if value is None or means is None else interval(means, _share)


def _share(means: Tensor) -> Tensor:
    dense, teal, row = means.exp()
    return (teal - row) / (teal - dense)


def gain(
    dense: Mapping[str, Any], teal: Mapping[str, Any], common: Mapping[str, Any], row: Mapping[str, Any]
) -> tuple[float, Interval] | None:
    """How much more a row recovers than another one on a test, in shares, and the interval in pairs over windows."""
    means = window_losses(dense, teal, common, row)
    ends = None if means is None else interval(means, _gain)
    return None if means is None or ends is None else (float(_gain(means.mean(-1, keepdim=True))), ends)


def _gain(means: Tensor) -> Tensor:
    dense, teal, common, row = means.exp()
    return (common - row) / (teal - dense)


def gains(rows: Sequence[Mapping[str, Any]], dense: Mapping[str, Any]) -> list[list[str]]:
    """Lines of the table of what rows recover beyond `COMMON` of their target and seed; none where that is missing."""
    named = {(row["sparsity"], row["label"], row["seed"]): row["tests"] for row in rows}
    body = []
    for row in rows:
        target, label, seed = row["sparsity"], row["label"], row["seed"]
        teal, common = named.get((target, UNIFORM, 0)), named.get((target, COMMON, seed))
        if row["recipe"] is None or label == COMMON or teal is None or common is None:
            continue
        found = [gain(dense["tests"][t], teal[t], common[t], result) for t, result in row["tests"].items()]
        words = ["" if g is None else f"{g[0]:+.2f} [{g[1][0]:+.2f}, {g[1][1]:+.2f}]" for g in found]
        body.append([f"{target:.0%}", label, str(seed), *words])
    return body


def records(rows: Sequence[Mapping[str, Any]], dense: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One flat record per row and test text; rows whose uniform TEAL is missing have no share."""
    flat = []
    uniform = {row["sparsity"]: row for row in rows if row["label"] == UNIFORM}
    for row in rows:
        teal = uniform.get(row["sparsity"])
        equal = _at_equal_bytes(row, rows, dense)
        for (test, result), (at_equal_bytes, equal_ends) in zip(row["tests"].items(), equal, strict=True):
            value, ends = (None, None) if teal is None else share(dense["tests"][test], teal["tests"][test], result)
            flat.append(
                {
                    "sparsity": row["sparsity"],
                    "row": row["label"],
                    "seed": row["seed"],
                    "test": test,
                    "dense": dense["tests"][test]["perplexity"],
                    "uniform_teal": None if teal is None else teal["tests"][test]["perplexity"],
                    "perplexity": result["perplexity"],
                    "kl": result.get("kl"),
                    "recovered": value,
                    "low": None if ends is None else ends[0],
                    "high": None if ends is None else ends[1],
                    "recovered_at_equal_bytes": at_equal_bytes,
                    "equal_low": None if equal_ends is None else equal_ends[0],
                    "equal_high": None if equal_ends is None else equal_ends[1],
                    "masked": result["masked"],
                    "saved": result["saved"],
                    "training_tokens": row.get("tokens", 0),
                    "loss": row.get("loss", {}).get("last"),
                    "seconds": row["seconds"].get("training"),
                }
            )
    return flat


def equal_bytes(flat: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Lines of the table of shares at equal bytes, from `records`; none where TEAL has fewer than two rows."""
    body = []
    for own in _by_row(flat):
        words = [_words(r["recovered_at_equal_bytes"], _ends(r["equal_low"], r["equal_high"])) for r in own]
        if any(words):
            body.append([*_head(own[0]), _tokens(own[0]), *words])
    return body


def over_seeds(flat: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Lines of the table of mean shares of what was trained with several seeds, from `records`.

    They are at equal bytes where that is known of every seed.
    """
    found: dict[tuple[float, str], dict[str, list[Mapping[str, Any]]]] = {}
    for record in flat:
        if record["row"] != UNIFORM:
            own = found.setdefault((record["sparsity"], record["row"]), {})
            own.setdefault(record["test"], []).append(record)
    body = []
    for (target, label), of_tests in found.items():
        tests = {test: _shares(of_seeds) for test, of_seeds in of_tests.items()}
        seeds = max(len(shares) for shares in tests.values())
        if seeds > 1:
            words = [f"{sum(v) / len(v):.2f} [{min(v):.2f}, {max(v):.2f}]" if v else "" for v in tests.values()]
            body.append([f"{target:.0%}", label, str(seeds), *words])
    return body


def _shares(of_seeds: Sequence[Mapping[str, Any]]) -> list[float]:
    """The shares of one row on one text by seed, all of one kind."""
    equal = [record["recovered_at_equal_bytes"] for record in of_seeds]
    shares = [record["recovered"] for record in of_seeds] if None in equal else equal
    return [share for share in shares if share is not None]


def _at_equal_bytes(
    row: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], dense: Mapping[str, Any]
) -> list[tuple[float | None, Interval | None]]:
    """By test text, the share at equal bytes and its interval; no shares of TEAL's own rows."""
    found: list[tuple[float | None, Interval | None]] = []
    for test, own in row["tests"].items():
        teal = [r["tests"][test] for r in rows if r["label"] == UNIFORM]
        between = None if row["label"] == UNIFORM else Between.of(own, dense["tests"][test], teal)
        found.append((None, None) if between is None else (between.share(own), between.interval(own)))
    return found


def _words(share: float | None, ends: Interval | None) -> str:
    return "" if share is None else f"{share:.2f}" + ("" if ends is None else f" [{ends[0]:.2f}, {ends[1]:.2f}]")


def columns(dense: Mapping[str, Any]) -> list[str]:
    """Headings of the table."""
    tests = [f"{test} (dense {number(result['perplexity'])})" for test, result in dense["tests"].items()]
    return ["target", "row", "seed", *tests, "masked", "read", "loss", "tokens", "train, s"]


def lines(flat: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Lines of the table, from `records`."""
    body = []
    for own in _by_row(flat):
        first, line = own[0], _head(own[0])
        for r in own:
            words = "" if r["row"] == UNIFORM else _words(r["recovered"], _ends(r["low"], r["high"]))
            line.append(number(r["perplexity"]) + (f": {words}" if words else ""))
        masked, saved = (sum(r[name] for r in own) / len(own) for name in ("masked", "saved"))
        last, seconds = first["loss"], first["seconds"]
        line += [f"{masked:.1%}", f"{1 - saved:.1%}", "" if last is None else f"{last:.4f}"]
        body.append([*line, _tokens(first), "" if seconds is None else f"{seconds:.0f}"])
    return body


def _by_row(flat: Sequence[Mapping[str, Any]]) -> list[list[Mapping[str, Any]]]:
    """The records of each row, one a test text."""
    found: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for record in flat:
        found.setdefault((record["sparsity"], record["row"], record["seed"]), []).append(record)
    return list(found.values())


def _head(record: Mapping[str, Any]) -> list[str]:
    return [f"{record['sparsity']:.0%}", record["row"], str(record["seed"])]


def _tokens(record: Mapping[str, Any]) -> str:
    return str(record["training_tokens"] or "")


def _ends(low: float | None, high: float | None) -> Interval | None:
    return None if low is None or high is None else (low, high)


def markdown(
    rows: Sequence[Mapping[str, Any]], dense: Mapping[str, Any], flat: Sequence[Mapping[str, Any]] | None = None
) -> str:
    """The tables under their titles.

    Args:
        rows: that were measured.
        dense: the dense model's.
        flat: `records` of the same, where they were made before.
    """
    flat = records(rows, dense) if flat is None else flat
    first = next(iter(dense["tests"].values()))
    table = markdown_table(columns(dense), lines(flat), text=2)
    text = ["## Recovery", "", *table, "", f"{first['tokens']} tokens of each text. {NOTES}", ""]
    if equal := equal_bytes(flat):
        head = ["target", "row", "seed", "tokens", *dense["tests"]]
        text += ["### At equal bytes", "", *markdown_table(head, equal, text=2), "", EQUAL, ""]
    if seeds := over_seeds(flat):
        head = ["target", "row", "seeds", *dense["tests"]]
        text += ["### Over seeds", "", *markdown_table(head, seeds, text=2), "", SEEDS, ""]
    if more := gains(rows, dense):
        head = ["target", "row", "seed", *dense["tests"]]
        text += [f"### Beyond `{COMMON}`", "", *markdown_table(head, more, text=2), "", MORE, ""]
    return "\n".join(text)
