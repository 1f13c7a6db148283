# SPDX-License-Identifier: Apache-2.0
"""What to vary: the studies of SPON (arXiv 2512.12744, section 4) that a user can run on any model.

Where to inject is the question of the paper's figure 4. The locations here are our own choice, an alpha's places as the
core knows them: every linear, and each role of a site, which on a model of Llama's kind are the inputs of q/k/v, of o,
of gate/up and of down. Masks stay on all linears.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from spon_plugin.decoder.sites import Site
from spon_plugin.errors import SponError
from spon_plugin.studies.ablation import Trial
from spon_plugin.training.recipe import Recipe

# Two minutes a row for SmolLM2-135M on two cores: rows are to be compared with each other, not with the
# three times longer schedule of `spon train`. In so few steps half of its rate goes further (study `rate`).
BASE = Recipe(windows=96, window=256, batch_size=2, epochs=1, learning_rate=0.0075)

RATES = (1 / 4, 1 / 2, 1.0, 2.0, 4.0)
WINDOWS = (1 / 8, 1 / 4, 1 / 2, 1.0, 2.0)
CALIBRATION = (1 / 16, 1 / 4, 1.0, 4.0)
HIGH = (0.7, 0.75, 0.8, 0.85, 0.9)
LENGTHS = (1 / 2, 2)
DECAYS = (1.0, 4.0)
LOSSES: dict[str, dict[str, Any]] = {
    "KL": {},
    "temperature 2": {"temperature": 2.0},
    "top 64 and one bin": {"top_k": 64},
    "top 1024 and one bin": {"top_k": 1024},
    "hidden states, 4 blocks": {"hidden_weight": 1.0},
    "uncertain tokens more": {"entropy_power": 1.0},
    "uncertain tokens less": {"entropy_power": -1.0},
}
EVERYWHERE = "all"


@dataclass(frozen=True)
class Point:
    """A trial's place in a study.

    Attributes:
        label: what is different about it.
        trial: what is measured.
        series: points of one series are comparable along `x`.
        x: its place on a numeric axis; None for a category.
    """

    label: str
    trial: Trial
    series: str = "SPON"
    x: float | None = None


@dataclass(frozen=True)
class Study:
    """A question and its points.

    Attributes:
        name: as ``--study`` knows it.
        title: of table and plot.
        axis: what `Point.label` and `Point.x` are.
        points: the trials, in order.
        figure: ``recovered`` or ``perplexity``: what the plot shows.
        log: whether the axis of `Point.x` is logarithmic.
    """

    name: str
    title: str
    axis: str
    points: tuple[Point, ...]
    figure: str = "recovered"
    log: bool = False


@dataclass(frozen=True)
class Setup:
    """What the studies vary from.

    Attributes:
        sites: of the model.
        texts: names of the training texts.
        sparsity: the target.
        calibration_tokens: for the thresholds.
        recipe: the schedule.
    """

    sites: Sequence[Site]
    texts: tuple[str, ...]
    sparsity: float = 0.5
    calibration_tokens: int = 8192
    recipe: Recipe = BASE

    @property
    def trial(self) -> Trial:
        """Alpha on every linear."""
        return Trial(self.sparsity, self.texts, self.calibration_tokens, carriers(self.sites), self.recipe)

    @property
    def pool(self) -> int:
        """Windows of the recipe's length that any study may ask of a mix of texts."""
        calibration = int(max(CALIBRATION) * self.calibration_tokens) // self.recipe.window
        return max(1, calibration, int(max(WINDOWS) * self.recipe.windows))


def carriers(sites: Sequence[Site], role: str | None = None, blocks: Sequence[str] | None = None) -> tuple[str, ...]:
    """Paths of the linears at some sites.

    Args:
        sites: of the model.
        role: of the sites; any by default.
        blocks: paths of decoder blocks; all by default.
    """
    return tuple(
        path
        for site in sites
        if (role is None or site.role == role) and (blocks is None or site.block in blocks)
        for path in site.modules
    )


def location(setup: Setup) -> Study:
    """Alpha on every linear, or at one kind of site."""
    points = [Point(EVERYWHERE, setup.trial)]
    for role in dict.fromkeys(site.role for site in setup.sites):
        names = dict.fromkeys(
            path.rpartition(".")[2] for site in setup.sites if site.role == role for path in site.modules
        )
        trial = replace(setup.trial, carriers=carriers(setup.sites, role))
        points.append(Point(f"{role} ({', '.join(names)})", trial))
    return Study("location", "Where alpha is injected", "location", tuple(points))


def layer(setup: Setup) -> Study:
    """Alpha on the linears of one decoder block at a time, with half the training."""
    recipe = replace(setup.recipe, windows=max(setup.recipe.batch_size, setup.recipe.windows // 2))
    points = [
        Point(str(index), replace(setup.trial, carriers=carriers(setup.sites, blocks=[block]), recipe=recipe), x=index)
        for index, block in enumerate(_blocks(setup.sites))
    ]
    return Study("layer", "Alpha in one decoder block only", "block", tuple(points))


def halves(setup: Setup) -> Study:
    """Alpha in all blocks, the first half of them, the last half."""
    blocks = _blocks(setup.sites)
    middle = (len(blocks) + 1) // 2
    parts = {"all blocks": blocks, "first half": blocks[:middle], "last half": blocks[middle:]}
    if not parts["last half"]:
        raise SponError.of("study", "halves", "a model of at least two decoder blocks")
    points = [
        Point(label, replace(setup.trial, carriers=carriers(setup.sites, blocks=part))) for label, part in parts.items()
    ]
    return Study("halves", "Which half of the blocks carries alpha", "blocks", tuple(points))


def tokens(setup: Setup) -> Study:
    """Tokens to calibrate thresholds on; tokens to train on, read once, or as often as makes the same steps."""
    points = []
    for factor in CALIBRATION:
        count = max(setup.recipe.window, int(factor * setup.calibration_tokens))
        points.append(_masks_at(setup, count))
    for factor in WINDOWS:
        recipe = _trained_on(setup.recipe, factor, 1)
        label = f"{recipe.windows * recipe.window}"
        points.append(Point(label, replace(setup.trial, recipe=recipe), "SPON, one pass", float(label)))
    for factor in (f for f in WINDOWS if f <= 1):
        recipe = _trained_on(setup.recipe, factor, round(setup.recipe.epochs / factor))
        label = f"{recipe.windows * recipe.window}"
        points.append(Point(label, replace(setup.trial, recipe=recipe), "SPON, same steps", float(label)))
    title = "How many tokens thresholds and alphas need"
    return Study("tokens", title, "tokens", tuple(dict.fromkeys(points)), "perplexity", log=True)


def rate(setup: Setup) -> Study:
    """The highest learning rate, in units of each layer's threshold."""
    points = []
    for factor in RATES:
        value = factor * setup.recipe.learning_rate
        trial = replace(setup.trial, recipe=replace(setup.recipe, learning_rate=value))
        points.append(Point(f"{value:g}", trial, x=value))
    return Study("rate", "Learning rate", "highest rate, relative to thresholds", tuple(points), log=True)


def domain(setup: Setup) -> Study:
    """Thresholds and alphas from one text, or from all of them, evaluated on every test text.

    Raises:
        SponError: there are fewer than two training texts.
    """
    if len(setup.texts) < 2:
        raise SponError.of("text", list(setup.texts), "at least two training texts for the domain study")
    mixes = [(name,) for name in setup.texts] + [setup.texts]
    points = [Point(mix[0] if len(mix) == 1 else "mix of all", replace(setup.trial, texts=mix)) for mix in mixes]
    return Study("domain", "Trained on one text, tested on others", "trained on", tuple(points))


def generalization(setup: Setup) -> Study:
    """What makes alphas carry over to texts they never saw, and what it costs on those they did.

    One text, all but one, all of them; and on all of them alpha at one kind of site, shorter and longer windows (as
    many tokens, as many steps), weight decay.

    Raises:
        SponError: there are fewer than two training texts.
    """
    points = list(domain(setup).points)
    if len(setup.texts) > 2:
        rests = [(name, tuple(other for other in setup.texts if other != name)) for name in setup.texts]
        points[-1:-1] = [Point(f"all but {name}", replace(setup.trial, texts=rest)) for name, rest in rests]
    points += [replace(point, label=f"mix, {point.label}") for point in location(setup).points[1:]]
    recipe = setup.recipe
    for factor in LENGTHS:
        length, count, batch = factor * recipe.window, recipe.windows / factor, recipe.batch_size / factor
        if all(value % 1 == 0 for value in (length, count, batch)):
            cut = replace(recipe, window=int(length), windows=int(count), batch_size=int(batch))
            points.append(Point(f"mix, windows of {cut.window}", replace(setup.trial, recipe=cut)))
    for decay in DECAYS:
        decaying = replace(recipe, weight_decay=decay)
        points.append(Point(f"mix, weight decay {decay:g}", replace(setup.trial, recipe=decaying)))
    return Study("generalization", "What carries over to other texts", "trained on", tuple(points))


def sparsity(setup: Setup) -> Study:
    """High sparsities: where the masks break the model, and how far alpha carries it."""
    points = []
    for share in HIGH:
        trial = replace(setup.trial, sparsity=share)
        points += [Point(f"{share:.0%}", trial.masks, "TEAL", share), Point(f"{share:.0%}", trial, "SPON", share)]
    return Study("sparsity", "Where it breaks", "target sparsity", tuple(points), "perplexity")


def prefix(setup: Setup) -> Study:
    """Position 0, an attention sink, masked like any other or left dense; at the same sparsity of the sparse model."""
    points = []
    for count in (0, 1):
        trial = replace(setup.trial, dense_prefix=count, matched=True)
        points += [Point(str(count), trial.masks, "TEAL", count), Point(str(count), trial, "SPON", count)]
    return Study("prefix", "First positions dense", "dense prefix", tuple(points), "perplexity")


def loss(setup: Setup) -> Study:
    """What alphas are trained to minimize; at the same sparsity of the sparse model."""
    points = []
    for label, changes in LOSSES.items():
        if changes.get("hidden_weight"):
            changes = {**changes, "hidden_blocks": min(4, len(_blocks(setup.sites)))}
        recipe = replace(setup.recipe, **changes)
        points.append(Point(label, replace(setup.trial, recipe=recipe, matched=True)))
    return Study("loss", "What is minimized", "loss", tuple(points))


STUDIES: dict[str, Callable[[Setup], Study]] = {
    build.__name__: build
    for build in (location, layer, halves, tokens, rate, domain, generalization, sparsity, prefix, loss)
}


def _masks_at(setup: Setup, count: int) -> Point:
    return Point(str(count), replace(setup.trial, calibration_tokens=count).masks, "TEAL, thresholds", float(count))


def _trained_on(recipe: Recipe, factor: float, epochs: int) -> Recipe:
    windows = max(recipe.batch_size, int(factor * recipe.windows))
    return replace(recipe, windows=windows, epochs=epochs)


def _blocks(sites: Sequence[Site]) -> list[str]:
    return list(dict.fromkeys(site.block for site in sites))
