# SPDX-License-Identifier: Apache-2.0
"""Who may import whom: folders in one direction, no circle of files, and what starts with Python on its own feet."""

import ast
import importlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("spon_plugin", "spon_transformers", "spon_peft", "spon_lm_eval", "spon_cli", "spon_vllm")

grimp = pytest.importorskip("grimp", reason="needs import-linter: pip install import-linter")


@pytest.fixture(scope="module")
def graph():
    """Imports for types count, too."""
    return grimp.build_graph(*PACKAGES, cache_dir=None)


def circles(graph) -> list[set[str]]:
    """Modules that import each other, by way of others or not: strongly connected ones (Tarjan's algorithm)."""
    number: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[set[str]] = []

    def visit(module: str) -> None:
        number[module] = low[module] = len(number)
        stack.append(module)
        for other in graph.find_modules_directly_imported_by(module):
            if other not in number:
                visit(other)
            if other in stack:
                low[module] = min(low[module], low[other])
        if low[module] == number[module]:
            place = stack.index(module)
            found.append(set(stack[place:]))
            del stack[place:]

    for module in sorted(graph.modules):
        if module not in number:
            visit(module)
    return [circle for circle in found if len(circle) > 1]


def test_no_files_import_each_other_in_a_circle(graph):
    assert circles(graph) == []
    graph.add_import(importer="spon_plugin.errors", imported="spon_plugin.studies.bench")
    assert any({"spon_plugin.errors", "spon_plugin.studies.bench"} <= circle for circle in circles(graph))
    graph.remove_import(importer="spon_plugin.errors", imported="spon_plugin.studies.bench")


UPWARD = {
    "core": ("spon_plugin/layers/sparse_linear.py", "from spon_plugin.decoder import tokens"),
    "hosts": ("integrations/spon_transformers/loading.py", "from spon_peft import adapters"),
    "vllm": ("integrations/spon_vllm/settings.py", "from spon_transformers import loading"),
    "types": ("spon_plugin/errors.py", "if TYPE_CHECKING:\n    from spon_plugin.masking import keep_mask"),
}


@pytest.mark.parametrize("upward", [None, *UPWARD], ids=lambda upward: upward or "as it is")
def test_an_import_upward_breaks_a_contract(upward, tmp_path):
    for package in PACKAGES:
        source = ROOT / package if package == "spon_plugin" else ROOT / "integrations" / package
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(source, tmp_path / source.relative_to(ROOT), ignore=ignored)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    if upward is not None:
        path, line = UPWARD[upward]
        with (tmp_path / path).open("a", encoding="utf-8") as file:
            file.write(f"\n{line}\n")
    command = [sys.executable, "-c", "from importlinter.cli import lint_imports_command; lint_imports_command()"]
    path = os.pathsep.join([str(tmp_path), str(tmp_path / "integrations")])
    done = subprocess.run(
        [*command, "--no-cache"], cwd=tmp_path, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True
    )
    assert done.returncode == (0 if upward is None else 1), done.stdout + done.stderr


def test_what_starts_with_python_imports_the_standard_library_alone():
    tree = ast.parse((ROOT / "integrations" / "spon_autoload.py").read_text(encoding="utf-8"))
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add((node.module or "").partition(".")[0])
    assert names <= set(sys.stdlib_module_names)


PUBLIC = {
    "spon_plugin": "Adapter Mask Site SparseConv1D SparseLinear SparsityCounter SponError SponFields find_sites"
    " fold_alpha keep_mask read_adapter read_as sparse_inputs sparse_linear sparsify write_adapter",
    "spon_plugin.text": "leading_windows mixed_windows offline_text read_text spread_windows",
}


@pytest.mark.parametrize("module", PUBLIC)
def test_programs_find_the_public_names(module):
    public = importlib.import_module(module)
    assert set(PUBLIC[module].split()) <= set(public.__all__)
    assert all(hasattr(public, name) for name in public.__all__)
