# SPDX-License-Identifier: Apache-2.0
"""The `spon` command: its sub-commands are in `commands/`."""

from __future__ import annotations

import sys

import typer

from spon_cli.commands.ablate import ablate_command
from spon_cli.commands.analyze import analyze_command
from spon_cli.commands.calibrate import calibrate_command
from spon_cli.commands.compare import compare_command
from spon_cli.commands.evaluate import eval_command
from spon_cli.commands.frontier import frontier_command
from spon_cli.commands.inspection import inspect_command
from spon_cli.commands.merge import merge_command
from spon_cli.commands.push import push_command
from spon_cli.commands.quantize import quantize_command
from spon_cli.commands.quickstart import quickstart_command
from spon_cli.commands.recover import recover_command
from spon_cli.commands.report import report_command
from spon_cli.commands.rotate import rotate_command
from spon_cli.commands.sample import sample_command
from spon_cli.commands.train import train_command
from spon_cli.failures import in_a_sentence
from spon_cli.output import show
from spon_plugin import __version__

app = typer.Typer(
    name="spon",
    help="Input sparsification with spontaneous neurons: faster LLM decoding without losing the model.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    add_completion=False,
)
app.command("quickstart")(quickstart_command)
app.command("calibrate")(calibrate_command)
app.command("train")(train_command)
app.command("eval")(eval_command)
app.command("merge")(merge_command)
app.command("quantize")(quantize_command)
app.command("rotate")(rotate_command)
app.command("sample")(sample_command)
app.command("inspect")(inspect_command)
app.command("push")(push_command)
app.command("report")(report_command)
app.command("compare")(compare_command)
app.command("frontier")(frontier_command)
app.command("ablate")(ablate_command)
app.command("recover")(recover_command)
app.command("analyze")(analyze_command)


def _version(wanted: bool) -> None:
    if wanted:
        show(f"spon-plugin {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Print the version."),
) -> None:
    """Options of `spon` itself."""


def main() -> None:
    """Run the command line. Exit codes: 0 done, 1 failed (disk, memory, network), 2 wrong input, 130 interrupted."""
    with in_a_sentence():
        code = app(standalone_mode=False)
    sys.exit(code or 0)
