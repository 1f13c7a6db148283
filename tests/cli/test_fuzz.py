# SPDX-License-Identifier: Apache-2.0
"""Wrong invocations and files by the hundred: each ends in one sentence and an exit code, and leaves nothing behind.

Work is cut short where it would begin, so that a run in the tests takes seconds. For more, by hand:

    python tests/cli/test_fuzz.py 20000 1        # how many, and the seed
"""

import json
import random
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from commands import TEXT, run
from tiny_models import make_byte_tokenizer, make_tiny_llama

from spon_cli.commands import (
    ablate,
    analyze,
    calibrate,
    compare,
    evaluate,
    frontier,
    merge,
    quantize,
    quickstart,
    rotate,
    sample,
    train,
)
from spon_plugin import Adapter, Mask, SponError, SponFields, find_sites, write_adapter

COUNT, SEED = 500, 0

# Of each command: what makes it right, and what it takes besides. A value is drawn for an option by its kind.
RIGHT: dict[str, list[str]] = {
    "quickstart": ["-o", "out"],
    "calibrate": ["model", "-o", "out", "--text", "text.txt", "--tokens", "256", "--window", "32"],
    "train": ["model", "-o", "out", "--text", "text.txt", "--windows", "4", "--window", "32"],
    "eval": ["model", "--adapter", "adapter", "--text", "text.txt", "--window", "32", "--max-tokens", "64"],
    "merge": ["adapter", "-o", "out", "--model", "model"],
    "quantize": ["model", "-o", "out", "--group", "16"],
    "rotate": ["model", "-o", "out", "--text", "text.txt", "--window", "32"],
    "sample": ["model", "-o", "out", "--tokens", "64", "--length", "32"],
    "inspect": ["adapter"],
    "report": ["results.json", "-o", "out"],
    "compare": ["model", "-o", "out", "--text", "text.txt", "--test", "text.txt", "--calibration-tokens", "512"],
    "frontier": ["model", "-o", "out", "--text", "text.txt", "--formats", "bf16,int8", "--calibration-tokens", "512"],
    "ablate": ["model", "-o", "out", "--text", "text.txt", "--test", "text.txt", "--calibration-tokens", "512"],
    "analyze": ["model", "--adapter", "adapter", "--text", "text.txt", "-o", "out", "--projection", "pca"],
}
NUMBERS = ["--sparsity", "--window", "--windows", "--tokens", "--max-tokens", "--batch-size", "--seed", "--epochs",
           "--learning-rate", "--weight-decay", "--dense-prefix", "--calibration-tokens", "--count",
           "--max-length", "--bits", "--steps", "--group", "--passages", "--ridge", "--length"]  # fmt: skip
WORDS = ["--allocation", "--alpha", "--alpha-modules", "--target-modules", "--preset", "--dtype", "--protocol",
         "--precision", "--methods", "--method", "--study", "--projection", "--precisions", "--metric",
         "--formats"]  # fmt: skip
PATHS = ["-o", "--text", "--test", "--adapter", "--baseline", "--prompts", "--model", "--reference", "--lambada"]
FLAGS = ["--json", "--match", "--resume", "--gradient-checkpointing", "--trust-remote-code", "--no-such", "-x", "--"]
ODD_NUMBERS = ["0", "-1", "1", "2", "0.5", "1.0", "nan", "inf", "-inf", "1e309", "1e-309", "-0.0", "1_000", "0x10",
               str(2**31), str(2**32), str(2**63), str(2**70), "9" * 400, "", " ", "five", "٣"]  # fmt: skip
ODD_WORDS = ["", " ", ",", ",,", "all", "none", "auto", "down_proj", "uniform", "teal", "location", "\u202e", "[/a]",
             "[bold]x", ":smile:", "%s", "{0}", "-", "nan", "x" * 5000, "a,b", "layers", "\udcff", "None"]  # fmt: skip
ODD_PATHS = ["", " ", ".", "..", "/", "/dev/null", "no/such", "text.txt", "text.txt/x", "model", "adapter", "empty",
             "empty.txt", "latin.txt", "bom.txt", "~nobody_here/x", "x" * 300, "a/" * 3000, "deep/er/out", "[/a]",
             "[bold]x", "dangling", "org/model", "hub name", "\udcff", "looped", "zeros.bin", "results.json",
             "results"]  # fmt: skip


class Worked(SponError):
    """Input was right as far as could be told before the work."""


def worked(*_args: object, **_kwargs: object) -> None:
    raise Worked("work: got here, expected to.")


def no_work(patch: pytest.MonkeyPatch) -> None:
    """Stop every command where its work begins."""
    for module, names in {
        calibrate: ["calibrated"],
        train: ["calibrated", "train"],
        evaluate: ["evaluate_variants"],
        analyze: ["all_states"],
        quickstart: ["smollm2_gguf"],
        quantize: ["quantize"],
        rotate: ["rotate_model"],
        sample: ["sample_documents"],
    }.items():
        for name in names:
            patch.setattr(module, name, worked)
    patch.setattr(compare, "RowStore", worked)
    patch.setattr(ablate, "RowStore", worked)
    patch.setattr(frontier, "RowStore", worked)
    patch.setattr(merge, "new_directory", worked)
    patch.setattr("spon_cli.commands.report.plot", lambda *_: None)


def furnish(directory: Path) -> None:
    """Good files and bad ones that need no model."""
    model = make_tiny_llama(num_hidden_layers=1)
    model.save_pretrained(directory / "model")
    make_byte_tokenizer().save_pretrained(directory / "model")
    torch.manual_seed(0)
    inputs = {path: site.in_features for site in find_sites(model) for path in site.modules}
    masks = {path: Mask(torch.tensor([0.3]), alpha=0.1 * torch.randn(n)) for path, n in inputs.items()}
    write_adapter(Adapter(SponFields(), masks), directory / "adapter")
    (directory / "text.txt").write_text(TEXT)
    (directory / "empty").mkdir()
    (directory / "empty.txt").write_text("")
    (directory / "latin.txt").write_bytes(b"caf\xe9 " * 100)
    (directory / "bom.txt").write_bytes(b"\xef\xbb\xbf" + TEXT.encode())
    (directory / "zeros.bin").write_bytes(bytes(4096))
    (directory / "dangling").symlink_to("nowhere")
    (directory / "looped").symlink_to("looped")
    (directory / "results").mkdir()
    (directory / "results.json").write_text(json.dumps(RESULT))


RESULT = {
    "results": {"arc": {"alias": "arc", "acc,none": 0.5, "acc_stderr,none": 0.1}},
    "config": {"model": "hf", "model_args": {"pretrained": "m"}, "model_dtype": "torch.float32", "limit": 10.0},
    "n-samples": {"arc": {"original": 10, "effective": 10}},
    "n-shot": {"arc": 0}, "versions": {"arc": 1.0}, "higher_is_better": {"arc": {"acc": True}},
    "group_subtasks": {"arc": []},
}  # fmt: skip


def option(draw: random.Random) -> list[str]:
    kind = draw.random()
    if kind < 0.4:
        return [draw.choice(NUMBERS), draw.choice(ODD_NUMBERS)]
    if kind < 0.65:
        return [draw.choice(WORDS), draw.choice(ODD_WORDS)]
    if kind < 0.9:
        return [draw.choice(PATHS), draw.choice(ODD_PATHS)]
    return [draw.choice(FLAGS)]


def invocation(draw: random.Random) -> list[str]:
    """A command with one to three things wrong with it, or none if it happens so."""
    name = draw.choice(list(RIGHT))
    words = [name, *RIGHT[name]]
    own = [word for word in words if word.startswith("-")]
    for _ in range(draw.choice([1, 1, 2, 3])):
        way = draw.random()
        if way < 0.4:
            words += option(draw)
        elif way < 0.75 and own:  # another value for what it has
            word = draw.choice(own)
            values = ODD_PATHS if word in PATHS else ODD_WORDS if word in WORDS else ODD_NUMBERS
            if word in words and words.index(word) + 1 < len(words):
                words[words.index(word) + 1] = draw.choice(values)
        elif way < 0.9:  # another model, adapter or result
            words[1:2] = [draw.choice(ODD_PATHS)]
        else:
            words.pop(draw.randrange(len(words)))
            words = words or [""]
    return words + ["--json"] * (draw.random() < 0.3)


def broken_file(draw: random.Random, directory: Path) -> list[str]:
    """Damage one of the good files; returns a command that reads it."""
    files = {
        "adapter/adapter_config.json": ["inspect", "eval", "merge", "train adapter"],
        "adapter/adapter_model.safetensors": ["inspect", "eval", "analyze", "train adapter"],
        "model/config.json": ["calibrate", "train", "merge", "quantize", "rotate", "sample", "compare"],
        "model/tokenizer.json": ["calibrate", "eval"],
        "model/tokenizer_config.json": ["calibrate", "analyze"],
        "model/model.safetensors": ["calibrate", "ablate"],
        "model/generation_config.json": ["calibrate", "merge"],
        "text.txt": ["calibrate", "train", "eval", "compare", "frontier"],
        "results.json": ["report"],
    }
    name = draw.choice(list(files))
    damage(draw, directory / name)
    command, _, start = draw.choice(files[name]).partition(" ")
    words = [command, *RIGHT[command]]
    if start:
        words[1] = start
    return words


def damage(draw: random.Random, file: Path) -> None:
    whole = file.read_bytes()
    way = draw.random()
    if file.suffix == ".json" and way < 0.6:
        value = json.loads(whole)
        mutate(draw, value)
        file.write_text(json.dumps(value))
    elif way < 0.75:
        file.write_bytes(whole[: draw.randrange(len(whole))])
    elif way < 0.95:
        changed = bytearray(whole)
        for _ in range(draw.choice([1, 4, 64])):
            changed[draw.randrange(min(len(changed), 2000))] = draw.randrange(256)
        file.write_bytes(changed)
    else:
        file.unlink()
        file.mkdir()


def mutate(draw: random.Random, value: object) -> None:
    """Change something, somewhere within a JSON value."""
    odd = [None, True, -1, 0, 1.5, 2**70, float("nan"), "", "x", [], {}, [None], {"a": 1}, [[]], "[/a]", "\ud800"]
    while True:
        if not isinstance(value, dict | list) or not value:
            return
        key = draw.choice(list(value)) if isinstance(value, dict) else draw.randrange(len(value))
        below = value[key]
        if isinstance(below, dict | list) and below and draw.random() < 0.7:
            value = below
            continue
        if draw.random() < 0.2:
            del value[key]
        else:
            value[key] = draw.choice(odd)
        return


def tree(directory: Path) -> dict[str, int]:
    return {str(p.relative_to(directory)): p.lstat().st_size for p in directory.rglob("*")}


def faults(arguments: list[str], ended: tuple[int, str, str]) -> Iterator[str]:
    """What is wrong with how a command ended."""
    code, out, err = ended
    said = [line for line in err.splitlines() if line.startswith("error:")]
    if "Traceback" in err:
        yield "a traceback"
    if code not in (0, 2):  # nothing fails here but for wrong input
        yield f"exit code {code}"
    if code and len(said) != 1:
        yield f"{len(said)} errors"
    if "SPON_DEBUG" in err:
        yield "a kind that has no name"
    if code and out:
        yield "output beside an error"
    if code == 0 and arguments[-1] == "--json" and not arguments[-2].startswith("-"):
        try:
            json.loads(out, parse_constant=lambda name: pytest.fail(name))
        except ValueError:
            yield "no JSON"


def fuzz(count: int, seed: int, good: Path, report: Callable[[str], None]) -> int:
    """Run `count` invocations from a seed in a copy of `good`, the current directory; returns how many came to work."""
    draw, reached = random.Random(seed), 0
    for index in range(count):
        broken = draw.random() < 0.35
        arguments = broken_file(draw, Path()) if broken else invocation(draw)
        before = tree(Path())
        try:
            ended = run(*arguments)
        except BaseException as error:
            report(f"{index}: {arguments} raised {error!r}")
            continue
        reached += "work: got here" in ended[2] or ended[0] == 0
        left = tree(Path()).keys() ^ before.keys() if ended[0] else set()
        wrong = [*faults(arguments, ended), *(f"{name} left or gone" for name in sorted(left))]
        if wrong:
            report(f"{index}: {arguments} -> {ended[0]}: {', '.join(wrong)}: {ended[2][-600:]}")
        if broken or left or not ended[0]:
            restore(good)
    return reached


def restore(good: Path) -> None:
    for path in Path().iterdir():
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    shutil.copytree(good, ".", symlinks=True, dirs_exist_ok=True)


@pytest.mark.slow
def test_wrong_invocations_and_files_end_in_words(tmp_path, monkeypatch):
    (tmp_path / "good").mkdir()
    (tmp_path / "here").mkdir()
    furnish(tmp_path / "good")
    monkeypatch.chdir(tmp_path / "here")
    restore(tmp_path / "good")
    no_work(monkeypatch)
    found: list[str] = []
    reached = fuzz(COUNT, SEED, tmp_path / "good", found.append)
    assert not found, "\n".join(found)
    assert COUNT // 20 < reached < COUNT // 2  # most are wrong, and not all for the first reason


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patcher:
        for part in ("good", "here"):
            Path(folder, part).mkdir()
        furnish(Path(folder, "good"))
        patcher.chdir(Path(folder, "here"))
        restore(Path(folder, "good"))
        no_work(patcher)
        many, first = int(sys.argv[1]), int(sys.argv[2])
        print(
            fuzz(many, first, Path(folder, "good"), lambda words: print(words, flush=True)), "of", many, "came to work"
        )
