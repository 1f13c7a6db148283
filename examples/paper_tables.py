# SPDX-License-Identifier: Apache-2.0
"""Tables 1 and 2 and figure 2 of the SPON paper (arXiv 2512.12744) for models of 8 billion weights, on a GPU of yours.

    python examples/paper_tables.py OUTPUT --dry-run      the plan: commands, download, memory, hours; touches nothing
    python examples/paper_tables.py OUTPUT                the same, with hours from a first step where a model is here
    python examples/paper_tables.py OUTPUT --yes          makes it; the same command goes on where it stopped

Needs, in a checkout: ``pip install -e '.[lm-eval,cli]' datasets``, and access to the gated Llama-3 on the hub. Table 1
is perplexity on WikiText-2 by method, sparsity and alpha (`spon compare`); table 2 the six zero-shot tasks and GSM8K of
the dense model, the masks alone and SPON (`spon train`, `lm_eval`, `spon report`); figure 2 the shares of the dense
scores, a plot beside table 2. These commands do all of it, so each can be run by hand; OUTPUT/tables.md collects them.
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from spon_cli.duration import calibration_passes
from spon_plugin import find_sites, machine
from spon_plugin.sparsifiers import get_sparsifier
from spon_plugin.studies.comparison import QUICK, keys
from spon_plugin.studies.evaluation import evaluate
from spon_plugin.training.loop import Teacher, train_alphas
from spon_plugin.training.recipe import PRESETS, Recipe, preset
from spon_transformers.loading import load_model

MODELS = "meta-llama/Meta-Llama-3-8B,Qwen/Qwen3-8B"
PARAMETERS = {"meta-llama/Meta-Llama-3-8B": 8_030_261_248, "Qwen/Qwen3-8B": 8_190_735_360}
"""Of the models by default, for a plan that asks nobody. Both are stored in bfloat16."""

TASKS = "commonsense_qa,truthfulqa_mc1,truthfulqa_mc2,openbookqa,medmcqa,mmlu,mathqa,gsm8k"
TASK_TOKENS = 5_000_000
"""Tokens that the multiple-choice tasks read for a row, about: documents times choices times their length."""
GENERATED_STEPS = 21_000
"""Steps of GSM8K's generation for a row, about: 1,319 documents in batches of 16, up to 256 tokens each."""
MEMORY_BESIDE = 10_000_000_000
"""Bytes beside the weights while training steps of 8 x 128 tokens at that size, about, where nobody measured them."""
READ_ROWS, READ_LENGTH = 4, 512
GENERATION_ROWS, GENERATION_STEPS = 16, 8


@dataclass(frozen=True)
class Step:
    """One command, and the file or directory that says that it was done.

    Attributes:
        command: its arguments, the interpreter first.
        made: a glob below the output; the step is done where something matches. None: always run, it resumes itself.
    """

    command: tuple[str, ...]
    made: str | None = None

    def done(self, output: Path) -> bool:
        """Whether there is nothing left to do."""
        return self.made is not None and any(output.glob(self.made))

    def __str__(self) -> str:
        return shlex.join("python" if part == sys.executable else part for part in self.command)


_SPON = (sys.executable, "-m", "spon_cli")


@dataclass(frozen=True)
class Speed:
    """What a model does in a second here.

    Attributes:
        read: tokens read by the sparse model.
        trained: tokens trained on, teacher and student.
        generated: steps of generation for a batch of `GENERATION_ROWS`.
        memory: bytes at the peak; None where nobody counted.
        measured: by a first step, or reckoned from products.
    """

    read: float
    trained: float
    generated: float
    memory: int | None
    measured: bool


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """What the user asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--models", default=MODELS, help="hub ids or directories, comma-separated")
    parser.add_argument("--methods", default="teal,teal-greedy,sensitivity,wina,rsparse,larosa,wanda,wanda-2:4")
    parser.add_argument("--sparsity", default="0.5,0.6", help="comma-separated; every one in both tables")
    parser.add_argument("--preset", default="paper", choices=sorted(PRESETS), help="the schedule of table 2's adapters")
    parser.add_argument("--windows", type=int, help="training windows, in place of the preset's (and of table 1's)")
    parser.add_argument("--window", type=int, help="tokens each, in place of the preset's")
    parser.add_argument("--max-tokens", type=int, default=300_000, help="of the test text; all of it by default")
    parser.add_argument("--text", type=Path, help="to train on; WikiText-2's training part by default")
    parser.add_argument("--test", type=Path, help="for table 1; WikiText-2's test part by default")
    parser.add_argument("--tasks", default=TASKS, help="lm-eval's names, comma-separated")
    parser.add_argument("--task-dir", type=Path, help="a folder of lm-eval .yaml files that define the tasks")
    parser.add_argument("--limit", type=int, help="documents per task")
    parser.add_argument("--dtype", default="bfloat16", help="of weights and work, in all rows")
    parser.add_argument("--dry-run", action="store_true", help="say what would be done and stop")
    parser.add_argument("--yes", action="store_true", help="begin")
    return parser.parse_args(argv)


def recipes(given: argparse.Namespace) -> tuple[Recipe, Recipe]:
    """The schedule of table 1's rows, and of table 2's adapters."""
    changes = {"windows": given.windows, "window": given.window}
    return QUICK.with_changes(windows=given.windows or PRESETS["fast"].windows), preset(given.preset).with_changes(
        **changes
    )


def sparsities(given: argparse.Namespace) -> list[float]:
    """The targets."""
    return [float(part) for part in given.sparsity.split(",")]


def models(given: argparse.Namespace) -> dict[str, str]:
    """Model -> its folder below the output."""
    return {name: name.rstrip("/").rpartition("/")[2] for name in given.models.split(",")}


def plan(given: argparse.Namespace, model: str, folder: str) -> list[Step]:
    """The steps for one model, in order."""
    out = given.output / folder
    texts = given.output / "texts"
    steps = []
    if given.test is None:
        steps.append(Step((sys.executable, "-m", "benchmarks.texts", str(texts)), "texts/wikitext2.txt"))
    test = given.test or texts / "wikitext2.txt"
    source = ("--text", str(given.text)) if given.text else ("--dataset", "Salesforce/wikitext:wikitext-2-raw-v1@train")
    compared = recipes(given)[0]
    steps.append(
        Step((
            *_SPON, "compare", model, "-o", str(out / "table1"), "--methods", given.methods,
            "--sparsity", given.sparsity, "--alpha", "off,mean,on", *source, "--test", str(test),
            "--windows", str(compared.windows), "--max-tokens", str(given.max_tokens), "--dtype", given.dtype,
        ))
    )  # fmt: skip
    rows = [str(out / "rows" / "dense")]
    steps.append(_row(given, model, folder, "dense", "hf", ""))
    changes = [("--windows", given.windows), ("--window", given.window)]
    for sparsity in sparsities(given):
        share = f"{100 * sparsity:g}"
        adapter = out / f"spon{share}"
        schedule = ["--preset", given.preset, *(str(part) for pair in changes if pair[1] for part in pair)]
        resume = ["--resume"] if adapter.with_name(adapter.name + ".training").is_dir() else []
        steps.append(
            Step(
                (*_SPON, "train", model, "--sparsity", str(sparsity), *source, *schedule, "--dtype", given.dtype,
                 *resume, "-o", str(adapter)),
                f"{folder}/spon{share}/adapter_config.json",
            )
        )  # fmt: skip
        for name, alpha in ((f"teal{share}", ",alpha=off"), (f"spon{share}", "")):
            steps.append(_row(given, model, folder, name, "spon-hf", f",spon={adapter}{alpha}"))
            rows.append(str(out / "rows" / name))
    steps.append(Step((*_SPON, "report", *rows, "-o", str(out / "table2"))))
    return steps


def _row(given: argparse.Namespace, model: str, folder: str, name: str, kind: str, extra: str) -> Step:
    """A row of table 2."""
    options = ["--tasks", given.tasks, "--output_path", str(given.output / folder / "rows" / name)]
    options += ["--batch_size", "auto" if torch.cuda.is_available() else "16"]
    options += ["--include_path", str(given.task_dir)] if given.task_dir else []
    options += ["--limit", str(given.limit)] if given.limit else []
    model_args = f"pretrained={model},dtype={given.dtype}{extra}"
    command = (sys.executable, "-m", "spon_lm_eval", "--model", kind, "--model_args", model_args, *options)
    return Step(command, f"{folder}/rows/{name}/**/results_*.json")


def is_here(model: str) -> bool:
    """Whether a model's weights are on this machine: a directory, or in the hub's cache."""
    if Path(model).is_dir():
        return True
    from huggingface_hub import try_to_load_from_cache

    names = ("model.safetensors", "model.safetensors.index.json")
    return any(isinstance(try_to_load_from_cache(model, name), str) for name in names)


def parameters_of(model: str) -> int:
    """How many, from the config of a model that is here, or from what is known of the defaults."""
    if model in PARAMETERS and not is_here(model):
        return PARAMETERS[model]
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model))
    return sum(parameter.numel() for parameter in empty.parameters())


def reckoned(parameters: int) -> Speed:
    """The speed that this machine's products allow."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    operations = machine.operations_per_second(machine.compute_dtype(torch.bfloat16, device), device)
    read = operations / (2 * parameters * 1.5)
    return Speed(read, read / 3, read / GENERATION_ROWS, None, False)


def first_step(model: str, dtype: str, recipe: Recipe) -> Speed:
    """Read, train and generate once, and see how long each takes.

    Args:
        model: loaded, and downloaded if need be.
        dtype: of the weights.
        recipe: of which one step is trained.
    """
    loaded = load_model(model, dtype)
    device = next(loaded.parameters()).device
    vocabulary = loaded.get_input_embeddings().num_embeddings
    ids = torch.randint(vocabulary, (READ_ROWS, READ_LENGTH), generator=torch.Generator().manual_seed(0))
    fitted = get_sparsifier("teal").fit(loaded, find_sites(loaded), ids[:1], 0.5)
    once = replace(recipe, windows=recipe.batch_size, epochs=2)
    rows = torch.randint(vocabulary, (once.batch_size, once.window), generator=torch.Generator().manual_seed(1))
    teacher = Teacher(loaded, rows)
    ends: list[float] = []
    train_alphas(loaded, fitted, teacher, once, progress=lambda *_: ends.append(_now(device)))
    evaluate(loaded, fitted, ids[:1])
    start = _now(device)
    evaluate(loaded, fitted, ids)
    reading = _now(device) - start
    prompt = ids[:1, :16].repeat(GENERATION_ROWS, 1).to(device)
    with fitted.attach(loaded):
        start = _now(device)
        loaded.generate(
            input_ids=prompt, attention_mask=torch.ones_like(prompt), do_sample=False, pad_token_id=0,
            min_new_tokens=GENERATION_STEPS, max_new_tokens=GENERATION_STEPS,
        )  # fmt: skip
    generating = _now(device) - start
    memory = torch.cuda.max_memory_allocated() if device.type == "cuda" else None
    # The dense states are made once for the training, so a pass of the teacher comes on top of the step.
    trained = rows.numel() / (ends[1] - ends[0] + rows.numel() / (ids.numel() / reading))
    return Speed(ids.numel() / reading, trained, GENERATION_STEPS / generating, memory, True)


def _now(device: torch.device) -> float:
    """Seconds, when the device has done what it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def hours(given: argparse.Namespace, speed: Speed) -> dict[str, float]:
    """Table -> hours for one model."""
    compared, trained = recipes(given)
    targets, methods = sparsities(given), given.methods.split(",")
    rows = keys(methods, targets, ["off", "mean", "on"])
    read = sum(calibration_passes(method, 8192) for method in methods) + (len(rows) + 1) * given.max_tokens
    table1 = read / speed.read + len(methods) * len(targets) * _tokens(compared) / speed.trained
    share = 1.0 if given.limit is None else min(1.0, given.limit * len(given.tasks.split(",")) / 25_000)
    evaluated = (1 + 2 * len(targets)) * share
    steps = GENERATED_STEPS if "gsm8k" in given.tasks else 0
    table2 = len(targets) * _tokens(trained) / speed.trained
    table2 += evaluated * (TASK_TOKENS / speed.read + steps / speed.generated)
    return {"table 1": table1 / 3600, "table 2 and figure 2": table2 / 3600}


def _tokens(recipe: Recipe) -> int:
    return recipe.steps * recipe.batch_size * recipe.window


def say_cost(given: argparse.Namespace, model: str, speed: Speed, parameters: int) -> None:
    """Print what one model costs."""
    download = 0 if is_here(model) else 2 * parameters
    memory = f"{speed.memory / 1e9:.1f} GB at the first step's peak" if speed.memory else None
    memory = memory or f"about {(2 * parameters + MEMORY_BESIDE) / 1e9:.0f} GB of a GPU's, 16-bit weights and training"
    parts = hours(given, speed)
    basis = "by a first step here" if speed.measured else "by how fast this machine multiplies"
    print(f"  download {download / 1e9:.1f} GB; memory {memory}")
    print("  hours " + basis + ": " + ", ".join(f"{name} {time:.1f}" for name, time in parts.items()), flush=True)


def collect(given: argparse.Namespace) -> Path:
    """Put the tables of all models on one page."""
    lines = ["# Tables 1 and 2 and figure 2", "", f"{machine.description()}", ""]
    for model, folder in models(given).items():
        lines += [f"## {model}", ""]
        for table, title in (("table1", "Table 1: perplexity"), ("table2", "Table 2: zero-shot tasks, %")):
            file = given.output / folder / table / "table.md"
            lines += [f"### {title}", "", file.read_text(encoding="utf-8").strip(), ""]
        lines += [f"### Figure 2: share of the dense scores\n\n![{model}]({folder}/table2/plot.png)", ""]
    page = given.output / "tables.md"
    page.write_text("\n".join(lines), encoding="utf-8")
    return page


def main(argv: Sequence[str] | None = None) -> int:
    """Say what it costs, and do it if told so; the exit code of the command that failed, 2 without --yes."""
    given = arguments(argv)
    given.output = given.output.absolute()
    print(machine.description(), flush=True)
    left: dict[str, list[Step]] = {}
    for model, folder in models(given).items():
        steps = plan(given, model, folder)
        left[model] = [step for step in steps if not step.done(given.output)]
        print(f"\n{model}")
        for step in steps:
            print(f"  {'done: ' if step not in left[model] else ''}{step}")
        measure = not given.dry_run and len(left[model]) > 2 and is_here(model)
        parameters = parameters_of(model)
        speed = first_step(model, given.dtype, recipes(given)[1]) if measure else reckoned(parameters)
        say_cost(given, model, speed, parameters)
    if given.dry_run:
        return 0
    if not given.yes:
        print("\nNothing was begun. Add --yes to begin.")
        return 2
    root = Path(__file__).parents[1]
    for model, folder in models(given).items():
        if left[model] and not is_here(model):
            say_cost(given, model, first_step(model, given.dtype, recipes(given)[1]), parameters_of(model))
        for step in plan(given, model, folder):
            if not step.done(given.output):
                print(f"\n{step}", flush=True)
                code = subprocess.run(step.command, cwd=root, check=False).returncode
                if code:
                    print(f"That failed ({code}); the same command goes on here.", file=sys.stderr)
                    return code
    print(f"\nWritten to {collect(given)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
