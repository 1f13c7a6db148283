# SPDX-License-Identifier: Apache-2.0
"""`spon ablate` and `spon analyze` on a tiny model."""

import csv
import json
from pathlib import Path

import pytest
import torch
from commands import TEXT, run
from masks import alphas_of
from tiny_models import make_byte_tokenizer, make_tiny_llama

from spon_plugin import read_adapter, write_adapter
from spon_transformers.precision import load_precision, weight_bytes

SMALL = ["--windows", "2", "--calibration-tokens", "256", "--window", "32", "--max-tokens", "128"]


@pytest.fixture
def texts(tmp_path: Path) -> list[str]:
    (tmp_path / "one.txt").write_text(TEXT)
    (tmp_path / "two.txt").write_text(TEXT[::-1])
    return [str(tmp_path / "one.txt"), str(tmp_path / "two.txt")]


def names(path: Path) -> list[str]:
    return sorted(p.name for p in path.iterdir())


@pytest.mark.parametrize("command", ["ablate", "analyze"])
def test_help_has_an_example(command):
    code, out, _ = run(command, "--help")
    assert code == 0 and f"spon {command}" in out and "--json" in out


def test_ablate_keeps_rows_and_adds_studies(tiny_model_dir, texts, tmp_path):
    command = ["ablate", tiny_model_dir, "--text", texts[0], "--text", texts[1], "--test", texts[0], *SMALL, "--json"]
    code, out, err = run(*command, "--study", "location", "-o", tmp_path / "out")
    assert code == 0, err
    shown = json.loads(out)
    assert [row["location"].partition(" ")[0] for row in shown["location"]] == [
        "all",
        "attn_in",
        "attn_out",
        "mlp_in",
        "mlp_out",
    ]
    assert {row["test"] for row in shown["location"]} == {"one.txt"}
    files = {f"location.{kind}" for kind in ("csv", "json", "md", "png")}
    assert set(names(tmp_path / "out")) == {*files, "rows", "settings.json"}
    rows = {name: (tmp_path / "out" / "rows" / name).stat().st_mtime_ns for name in names(tmp_path / "out" / "rows")}
    assert len(rows) == 7  # dense, the masks alone, five locations
    code, out, err = run(*command, "--study", "location,halves,domain", "-o", tmp_path / "out")
    assert code == 0, err
    more = json.loads(out)
    assert more["location"] == shown["location"] and more["halves"][0]["row"] == more["location"][0]["row"]
    assert more["domain"][-1]["row"] == more["location"][0]["row"]
    now = {name: (tmp_path / "out" / "rows" / name).stat().st_mtime_ns for name in names(tmp_path / "out" / "rows")}
    assert len(now) == 7 + 2 + 4 and all(now[name] == time for name, time in rows.items())
    table = list(csv.DictReader((tmp_path / "out" / "halves.csv").open()))
    assert [row["blocks"] for row in table] == ["all blocks", "first half", "last half"]
    assert "| first half | SPON |" in (tmp_path / "out" / "halves.md").read_text()
    for option, value in (("--seed", "1"), ("--window", "64")):
        code, _, err = run(*command, "--study", "halves", option, value, "-o", tmp_path / "out")
        assert code == 2 and f"{option[2:]}: got {value}, expected" in err and "as for the rows in" in err


@pytest.mark.parametrize(
    ("command", "options"),
    [
        ("ablate", ["--study", "prefix", "--text", "{text}", *SMALL]),
        ("frontier", ["--formats", "bf16", "--sparsity", "0", "--text", "{text}", *SMALL]),
    ],
    ids=["ablate", "frontier"],
)
def test_a_method_is_the_same_however_its_parameter_is_written(tiny_model_dir, texts, tmp_path, command, options):
    written = [option.format(text=texts[0]) for option in options]
    for parameter in ("0.80", ".8"):
        call = [command, tiny_model_dir, *written, "--test", texts[0], "-o", tmp_path / "out"]
        code, _, err = run(*call, "--method", f"sensitivity:{parameter}")
        assert code == 0, err
    assert json.loads((tmp_path / "out" / "settings.json").read_text())["method"] == "sensitivity:0.8"
    code, _, err = run(*call, "--method", "sensitivity:0.7")
    assert code == 2 and "method: got" in err


def test_ablate_shows_tables_of_numeric_studies(tiny_model_dir, texts, tmp_path):
    studies = "layer,tokens,rate,sparsity"
    code, out, err = run("ablate", tiny_model_dir, "--text", texts[0], "--test", texts[1], *SMALL,
                         "--study", studies, "-o", tmp_path / "out")  # fmt: skip
    assert code == 0, err
    for title in ("Alpha in one decoder block only", "How many tokens", "Learning rate", "Where it breaks"):
        assert title in out
    assert {f"{name}.png" for name in studies.split(",")} <= set(names(tmp_path / "out"))


@pytest.mark.parametrize(
    ("package", "levels"),
    [
        pytest.param(None, ["float32", "bfloat16"], id="floats"),
        pytest.param("bitsandbytes", ["float32", "int8", "int4"], id="bitsandbytes", marks=pytest.mark.slow),
        pytest.param("torchao", ["float32", "torchao-int8", "torchao-int4"], id="torchao", marks=pytest.mark.slow),
    ],
)
def test_precision_compares_an_adapter_with_one_trained_on_the_base(texts, tmp_path, package, levels):
    if package is not None:
        pytest.importorskip(package, reason=f"needs {package}")
    make_tiny_llama(hidden_size=64).save_pretrained(tmp_path / "model")  # torchao scales groups of 32 inputs
    make_byte_tokenizer().save_pretrained(tmp_path / "model")
    command = ["ablate", tmp_path / "model", "--text", texts[0], "--test", texts[1], *SMALL, "--json",
               "--study", "precision", "--precisions", ",".join(levels), "-o", tmp_path / "out"]  # fmt: skip
    code, out, err = run(*command)
    assert code == 0, err
    rows = json.loads(out)["precision"]
    assert [(row["precision"], row["adapter"]) for row in rows] == [
        ("float32", "full"),
        *((level, origin) for level in levels[1:] for origin in ("full", "own")),
    ]
    assert all(row[name] > 0 for row in rows for name in ("dense", "teal", "spon"))
    assert rows[1]["dense"] == rows[2]["dense"] != rows[0]["dense"]
    assert rows[1]["spon"] != rows[2]["spon"]
    assert all(row["weight_bytes"] < rows[0]["weight_bytes"] for row in rows[1:])
    adapters = [read_adapter(path) for path in sorted((tmp_path / "out").glob("adapter-*"))]
    assert len(adapters) == len(levels) and all(len(alphas_of(found)) == 14 for found in adapters)
    assert "precision.png" in names(tmp_path / "out")
    assert json.loads(run(*command)[1])["precision"] == rows
    if package is not None:  # the same by `spon eval`
        evaluation = ["eval", tmp_path / "model", "--adapter", next((tmp_path / "out").glob("adapter-float32-*"))]
        evaluation += ["--text", texts[1], "--window", "32", "--max-tokens", "128", "--dtype", "float32", "--json"]
        code, out, err = run(*evaluation, "--precision", levels[1])
        assert code == 0, err
        assert json.loads(out)["perplexity"] == {name: rows[1][name] for name in ("dense", "teal", "spon")}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("precision", "scales"),
    [("int8", 4 * 2 * 384), ("int4", 4 * 2 * 20_736 // 64 + 14 * 4 * 16)],  # per output; per 64 weights, and 16 levels
)
def test_weight_bytes_count_the_scales_of_bitsandbytes(tiny_model_dir, precision, scales):
    pytest.importorskip("bitsandbytes", reason="needs bitsandbytes")
    model = load_precision(str(tiny_model_dir), precision)
    packed = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    for _ in range(2):  # 8-bit scales move at the first pass
        assert weight_bytes(model) == packed + scales
        model(input_ids=torch.arange(8)[None])


@pytest.mark.slow
def test_a_model_that_cannot_be_quantized_is_named(tiny_model_dir, texts, tmp_path):
    pytest.importorskip("torchao", reason="needs torchao")
    code, _, err = run("ablate", tiny_model_dir, "--text", texts[0], "--test", texts[1], *SMALL, "--study", "precision",
                       "--precisions", "float32,torchao-int4", "-o", tmp_path / "out")  # fmt: skip
    assert code == 2 and "tiny-llama', expected" in err and "in_features divisible by 32" in " ".join(err.split())


def test_precision_takes_a_given_adapter(tiny_model_dir, texts, adapter, tmp_path):
    code, out, err = run("ablate", tiny_model_dir, "--text", texts[0], "--test", texts[1], *SMALL, "--json",
                         "--study", "precision", "--precisions", "float32", "--adapter", adapter,
                         "-o", tmp_path / "out")  # fmt: skip
    assert code == 0, err
    (row,) = json.loads(out)["precision"]
    arguments = [
        "--adapter",
        adapter,
        "--text",
        texts[1],
        "--window",
        "32",
        "--max-tokens",
        "128",
        "--dtype",
        "float32",
    ]
    measured = json.loads(run("eval", tiny_model_dir, *arguments, "--json")[1])["perplexity"]
    assert {name: row[name] for name in ("dense", "teal", "spon")} == measured
    assert not list((tmp_path / "out").glob("adapter-*"))


def test_precision_refuses_an_adapter_that_does_not_fit_the_study(tiny_model_dir, texts, adapter, tmp_path):
    write_adapter(read_adapter(adapter).without_alpha(), tmp_path / "masks")
    make_tiny_llama(num_hidden_layers=1).save_pretrained(tmp_path / "other")
    make_byte_tokenizer().save_pretrained(tmp_path / "other")
    for model, given, arguments, message in (
        (tiny_model_dir, tmp_path / "masks", [], "adapter: got 'one without alphas', expected a trained one"),
        (tiny_model_dir, adapter, ["--sparsity", "0.6"], "sparsity: got 0.6, expected 0.5, the adapter's"),
        (tmp_path / "other", adapter, [], "The adapter was made for"),
    ):
        study = ["--study", "precision", "--precisions", "float32", "--adapter", given, *arguments]
        code, _, err = run(
            "ablate", model, "--text", texts[0], "--test", texts[1], *SMALL, *study, "-o", tmp_path / "out"
        )
        assert code == 2 and message in " ".join(err.split()), err
        assert not (tmp_path / "out").exists()


def test_analyze_writes_tables_and_plots(tiny_model_dir, texts, adapter, tmp_path):
    command = ["analyze", tiny_model_dir, "--adapter", adapter, "--text", texts[0], "--count", "5"]
    code, out, err = run(*command, "--projection", "pca", "-o", tmp_path / "out", "--json")
    assert code == 0, err
    shown = json.loads(out)
    assert shown["count"] == 5 and shown["tokens"] == 5 * 64
    assert {name: len(layers) for name, layers in shown["shift"].items()} == {"TEAL": 2, "SPON": 2}
    assert all(layer["distance"] > 0 and 0 < layer["cka"] <= 1 for part in shown["shift"].values() for layer in part)
    assert len(shown["alphas"]) == 14
    assert names(tmp_path / "out") == [
        "alphas.csv", "analysis.json", "analysis.md", "pca.png", "shift.csv", "shift.png"
    ]  # fmt: skip
    _, table, _ = run(*command)
    assert "Shift of the hidden states" in table and "down_proj" in table


def test_analyze_reads_prompts_of_any_length(tiny_model_dir, adapter, tmp_path):
    (tmp_path / "prompts.txt").write_text("A short one.\n\n" + "A long one, cut off. " * 9 + "\n")
    code, out, err = run(
        "analyze", tiny_model_dir, "--adapter", adapter, "--prompts", tmp_path / "prompts.txt", "--json"
    )
    assert code == 0, err
    assert json.loads(out)["count"] == 2 and json.loads(out)["tokens"] == len("A short one.") + 64


WRONG = {
    "no such study": (["ablate", "--study", "colour"], "study: got 'colour', expected one of location, layer"),
    "no study": (["ablate", "--study", ","], "study: got ','"),
    "one text for domains": (["ablate", "--study", "domain"], "at least two training texts"),
    "no such precision": (
        ["ablate", "--study", "precision", "--precisions", "float32,int3"],
        "precision: got 'int3', expected one of float32, bfloat16, float16, int8, int4, torchao-int8, torchao-int4",
    ),
    "quantized first": (
        ["ablate", "--study", "precision", "--precisions", "int8,float32"],
        "precisions: got ['int8', 'float32'], expected a full precision first",
    ),
    "no such method": (["ablate", "--method", "best"], "method: got 'best'"),
    "text too short": (["ablate", "--windows", "9999"], "Use more text."),
    "sparsity of one": (["ablate", "--sparsity", "1"], "sparsity: got 1.0"),
    "one window a row": (["ablate", "--windows", "1"], "windows: got 1, expected at least 2"),
    "a method that leaves linears dense": (
        ["ablate", "--method", "cats"],
        "method: got 'cats', expected one that covers",
    ),
    "no calibration": (["ablate", "--calibration-tokens", "1"], "calibration_tokens: got 1"),
    "one prompt token": (["analyze", "--projection", "pca", "--max-length", "1"], "max_length: got 1"),
    "no such projection": (["analyze", "--projection", "umap"], "projection: got 'umap'"),
    "prompts and text": (["analyze", "--projection", "pca", "--prompts", "x.txt"], "either --prompts or --text"),
    "no such adapter": (["analyze", "--projection", "pca", "--adapter", "missing"], "adapter: got 'missing'"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_is_named_and_nothing_is_written(tiny_model_dir, texts, adapter, tmp_path, case):
    (command, *arguments), message = WRONG[case]
    own = ["--test", texts[1]] if command == "ablate" else [] if "--adapter" in arguments else ["--adapter", adapter]
    before = names(tmp_path)
    code, out, err = run(command, tiny_model_dir, "--text", texts[0], *own, *arguments, "-o", tmp_path / "out")
    assert code == 2 and message in " ".join(err.split()), err
    assert out == "" and names(tmp_path) == before
