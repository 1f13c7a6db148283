# SPDX-License-Identifier: Apache-2.0
"""The pages: links lead somewhere, commands have the options that they are shown with, marked blocks run."""

import json
import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer.main
import yaml
from commands import TEXT, run

from spon_cli.main import app

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
PAGES += sorted((ROOT / ".github").rglob("*.md"))
BLOCK = re.compile(r"(<!-- run -->\n)?^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
INDENTED = re.compile(r"(?:^    .*\n)+", re.MULTILINE)
COMMANDS = typer.main.get_command(app).commands


def ids(paths):
    return [str(path.relative_to(ROOT)) for path in paths]


def anchors(text: str) -> set[str]:
    """Those that a page's headings have, on GitHub and on the site."""
    found = re.findall(r"^#+ (.*)$", BLOCK.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in found}


@pytest.mark.parametrize("page", PAGES, ids=ids(PAGES))
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", BLOCK.sub("", page.read_text(encoding="utf-8"))):
        if re.match(r"https?://|mailto:", link):
            continue
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target.read_text(encoding="utf-8")), link


YAML = [*(ROOT / ".github").rglob("*.yml"), *(ROOT / name for name in ("CITATION.cff", ".pre-commit-config.yaml"))]


@pytest.mark.parametrize("file", YAML, ids=ids(YAML))
def test_files_for_the_platform_are_yaml(file):
    assert isinstance(yaml.safe_load(file.read_text(encoding="utf-8")), dict)


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 120


def commands_of(page: Path) -> Iterator[list[str]]:
    """The commands in a page's blocks, each as the shell splits it."""
    text = page.read_text(encoding="utf-8")
    blocks = [body for _, language, body in BLOCK.findall(text) if language in ("sh", "", "bash")]
    blocks += INDENTED.findall(BLOCK.sub("", text))
    for line in "\n".join(blocks).replace("\\\n", " ").splitlines():
        for part in re.split(r" && |; |^for .* do ", line.strip()):
            if re.match(r"(\w+=\S+ )*(spon|python -m benchmarks)\b", part.strip()):
                yield shlex.split(re.sub(r"^(\w+=\S+ )*", "", part.strip()), comments=True)


CALLS = [(page, call) for page in PAGES for call in commands_of(page)]


def test_there_are_commands_to_check():
    assert len(CALLS) > 50
    assert {call[1] for _, call in CALLS if call[0] == "spon"} >= set(COMMANDS)


@pytest.mark.parametrize(("page", "call"), CALLS, ids=[f"{p.name}-{' '.join(c)[:40]}" for p, c in CALLS])
def test_commands_have_the_options_that_they_are_shown_with(page, call):
    own = call[3 * (call[0] == "python") : call.index("--") if "--" in call else None]
    given = [argument.partition("=")[0] for argument in own if re.match(r"--?[a-z]", argument)]
    if call[0] == "spon":
        known = {name for parameter in COMMANDS[call[1]].params for name in parameter.opts} | {"--help"}
        assert set(given) <= known
    else:  # a benchmark; what follows a bare -- is for the program that it runs
        source = (ROOT / call[2].replace(".", "/")).with_suffix(".py").read_text(encoding="utf-8")
        # argparse's are strings, typer's are names of parameters
        known = {*re.findall(r'"(--?[\w-]+)"', source), "--help"}
        known |= {f"--{name.replace('_', '-')}" for name in re.findall(r"(\w+): (?:Annotated|\w+)", source)}
        assert set(given) <= known
        assert "checkout" in page.read_text(encoding="utf-8")


MARKED = [(p, lang, body) for p in PAGES for mark, lang, body in BLOCK.findall(p.read_text(encoding="utf-8")) if mark]


@pytest.fixture
def workplace(tmp_path, monkeypatch, tiny_model_dir, adapter):
    """A folder with what the pages call by name."""
    shutil.copytree(tiny_model_dir, tmp_path / "spon-quickstart/model")
    shutil.copytree(adapter, tmp_path / "spon-quickstart/adapter")
    config = tmp_path / "spon-quickstart/adapter/adapter_config.json"
    values = json.loads(config.read_text())
    base = {"base_model_name_or_path": "spon-quickstart/model", "task_type": "CAUSAL_LM"}
    targets = [f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")]
    config.write_text(json.dumps({**values, **base, "target_modules": targets}))
    for number, name in enumerate(("A.txt", "B.txt", "FILE")):
        (tmp_path / name).write_text(TEXT.replace("fox", f"fox {number}"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("page", "language", "body"), MARKED, ids=[f"{p.name}-{i}" for i, (p, *_) in enumerate(MARKED)]
)
def test_blocks_that_are_marked_run(workplace, page, language, body):
    if language == "python":
        exec(compile(body, str(page), "exec"), {"__name__": "__main__"})
        return
    for line in body.splitlines():
        program, *arguments = shlex.split(line, comments=True)
        assert program == "spon"
        code, _, err = run(*arguments)
        assert code == 0, err


@pytest.mark.slow
def test_the_page_of_models_is_what_its_script_writes():
    from benchmarks.models import page

    assert page() == (ROOT / "docs" / "models.md").read_text(encoding="utf-8")


def test_the_notebook_runs_in_its_short_form(tiny_model_dir, tmp_path, monkeypatch, capsys):
    """Its code, cell by cell; what only a notebook understands (``%pip``) left out."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SPON_MODEL", str(tiny_model_dir))
    monkeypatch.setenv("SPON_WINDOWS", "4")
    notebook = json.loads((ROOT / "examples" / "quickstart.ipynb").read_text(encoding="utf-8"))
    assert not any(cell.get("outputs") for cell in notebook["cells"])
    names = {"__name__": "__main__"}
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            lines = [line for line in cell["source"] if not line.startswith("%")]
            exec(compile("".join(lines), "quickstart.ipynb", "exec"), names)
    out = capsys.readouterr().out
    assert "spon perplexity" in out and "sparse:" in out
    assert {path.name for path in (tmp_path / "spon-notebook").iterdir()} >= {"adapter", "merged"}
