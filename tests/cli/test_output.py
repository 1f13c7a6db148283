# SPDX-License-Identifier: Apache-2.0
"""Standard output holds the result and nothing else, as it is."""

import json
import os
import subprocess
import sys
from contextlib import redirect_stdout
from dataclasses import replace

import pytest
from commands import run

from spon_cli import output
from spon_cli.commands import calibrate, inspection
from spon_cli.main import main
from spon_plugin import read_adapter

NOISE = """
import os, sys
import spon_cli.commands.inspection as command
real = command.read_adapter
def noisy(path):
    print("a library says hello")
    os.write(1, b"and so does its C part\\n")
    return real(path)
command.read_adapter = noisy
sys.argv = ["spon", "inspect", sys.argv[1], "--json"]
import spon_cli
spon_cli.run()
"""


def test_what_libraries_print_goes_to_the_error(adapter):
    done = subprocess.run([sys.executable, "-c", NOISE, str(adapter)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)["modules"]) == 14
    assert "hello" in done.stderr and "C part" in done.stderr


def test_json_has_no_nan(capsys):
    with output.results_only():
        output.show_json({"a": [float("nan"), 1.0, {"b": float("inf")}], "c": (2, -float("inf"))})
    shown = capsys.readouterr().out
    assert json.loads(shown) == {"a": [None, 1.0, {"b": None}], "c": [2, None]} and "NaN" not in shown


def test_a_table_is_as_wide_as_it_needs_where_there_is_no_terminal(monkeypatch, capsys):
    monkeypatch.delenv("COLUMNS", raising=False)
    name = "a name of a text that is longer than a terminal is wide " * 3
    with output.results_only():
        output.show_table("Title", ["text", "n"], [[name, 1.0]])
    assert name in capsys.readouterr().out


@pytest.mark.parametrize("name", ["x[bold]y", "runs[", ":smile:", "two  spaces"])
def test_paths_are_printed_as_they_are(tiny_model_dir, text, adapter, tmp_path, monkeypatch, name):
    made = tmp_path / name / name
    whole = replace(read_adapter(adapter), peft={"base_model_name_or_path": str(made)})
    monkeypatch.setattr(calibrate, "calibrated", lambda *_: whole)
    command = ("calibrate", tiny_model_dir, "--text", text, "-o", made)
    code, _, err = run(*command)
    assert code == 0 and f"Adapter written to {made}\n" in err
    code, shown, _ = run("inspect", made)
    assert code == 0 and f"base_model  {made}\n" in shown
    code, _, err = run(*command)
    assert code == 2 and err.startswith(f"error: output: got '{made}', expected")


@pytest.mark.parametrize("arguments", [(), ("--json",)], ids=["table", "json"])
def test_a_closed_pipe_is_no_error(adapter, monkeypatch, capsys, arguments):
    reader, writer = os.pipe()
    os.close(reader)
    monkeypatch.setattr(sys, "argv", ["spon", "inspect", str(adapter), *arguments])
    with os.fdopen(writer, "w") as closed, redirect_stdout(closed), pytest.raises(SystemExit) as stop:
        main()
    assert not stop.value.code and not capsys.readouterr().err


def test_nobody_reading_the_messages_does_not_stop_the_work(adapter, monkeypatch, capsys):
    monkeypatch.setattr(output.err, "quiet", False)  # and again at the end
    reader, writer = os.pipe()
    os.close(reader)
    monkeypatch.setattr(sys, "argv", ["spon", "inspect", str(adapter), "--json"])
    with os.fdopen(writer, "w") as closed, monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(sys, "stderr", closed)
        patch.setattr(inspection, "module_rows", lambda found: [output.note("a note"), output.note("more")][2:])
        main()
    assert not stop.value.code and json.loads(capsys.readouterr().out)["modules"] == []


def test_a_full_disk_under_standard_output_is_said(adapter, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["spon", "inspect", str(adapter), "--json"])
    with open("/dev/full", "w") as full, redirect_stdout(full), pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 1 and capsys.readouterr().err == "error: No space left on device\n"
