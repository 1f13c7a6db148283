# SPDX-License-Identifier: Apache-2.0
import json

import pytest
from commands import TEXT, run
from tiny_models import make_byte_tokenizer, make_tiny_llama

SMALL = ["--preset", "best", "--windows", "8", "--window", "64", "--max-tokens", "640", "--calibration-tokens", "1024"]
NUMBERS = ("bits_per_weight", "perplexity", "kl", "kl_99", "same_top", "rms_dp", "masked")


@pytest.fixture
def texts(tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    (tmp_path / "l.jsonl").write_text("\n".join(f'{{"text": "some {i} words"}}' for i in range(9)))
    return ["--text", tmp_path / "text.txt", "--test", tmp_path / "text.txt", "--lambada", tmp_path / "l.jsonl"]


@pytest.fixture
def model(tmp_path):
    sizes = {"hidden_size": 64, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2}
    make_tiny_llama(**sizes, num_hidden_layers=1).save_pretrained(tmp_path / "model")
    make_byte_tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_frontier_writes_tables_and_a_plot_and_goes_on(model, texts, tmp_path):
    out = tmp_path / "out"
    call = ["frontier", model, "-o", out, *texts, *SMALL, "--sparsity", "0,0.5"]
    code, printed, err = run(*call, "--formats", "bf16,int4")
    assert code == 0, err
    assert "Bits against quality" in printed and "int4 50% + alpha" in err
    names = {path.name for path in out.iterdir()}
    assert names == {"table.md", "table.csv", "table.json", "plot.png", "settings.json", "rows"} | {
        "adapter-50-off", "adapter-50-on"
    }  # fmt: skip
    more = ["--formats", "bf16,int4,int8"]
    try:
        import llama_cpp  # noqa: F401
    except ImportError:
        pass
    else:
        more = ["--formats", "bf16,int4,int8,gguf:Q2_K"]
    before = {path.name: path.read_bytes() for path in (out / "rows").iterdir()}
    code, printed, err = run(*call, *more, "--json")
    assert code == 0, err
    assert all((out / "rows" / name).read_bytes() == content for name, content in before.items())
    rows = {(r["format"], r["sparsity"], r["alpha"]): r for r in json.loads(printed)["rows"]}
    assert len(rows) == 9 + ("gguf:Q2_K" in more[1])
    assert rows["bf16", 0.0, "off"]["bits_per_weight"] == 16 and rows["bf16", 0.0, "off"]["kl"] < 1e-4
    assert 8.2 < rows["int8", 0.0, "off"]["bits_per_weight"] < 8.4
    for format in ("bf16", "int8", "int4"):
        dense, masks, alphas = (rows[(format, *rest)] for rest in ((0.0, "off"), (0.5, "off"), (0.5, "on")))
        assert masks["masked"] == pytest.approx(0.5, abs=0.05)
        assert masks["bits_per_weight"] < alphas["bits_per_weight"] < dense["bits_per_weight"]
        assert dense["kl"] < masks["kl"] and all(alphas[name] is not None for name in (*NUMBERS, "lambada"))
    dense_bits = rows["int4", 0.0, "off"]["bits_per_weight"]
    given = ["--sparsity", "0", "--adapter", out / "adapter-50-on"]
    code, printed, err = run(*call, "--formats", "int4,int3,int4-fit", *given, "--json")
    assert code == 0, err
    found = json.loads(printed)["rows"]
    fit = {row["adapter"]: row for row in found if row["format"] == "int4-fit"}
    assert fit.keys() == {"", "adapter-50-on"} and fit[""]["bits_per_weight"] == dense_bits
    assert fit[""]["kl"] < rows["int4", 0.0, "off"]["kl"] < fit["adapter-50-on"]["kl"] < rows["int4", 0.5, "on"]["kl"]
    mine = next(row for row in found if row["adapter"] == "adapter-50-on" and row["format"] == "int4")
    assert mine["kl"] == pytest.approx(rows["int4", 0.5, "on"]["kl"])
    int3 = next(row for row in found if row["format"] == "int3")
    assert int3["kl"] > rows["int4", 0.0, "off"]["kl"] and int3["masked"] is None
    assert int3["bits_per_weight"] < rows["int4", 0.0, "off"]["bits_per_weight"] - 0.5
    code, _, err = run(*call, "--formats", "bf16", "--seed", "1")
    assert code == 2 and "Choose another --output" in err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--formats", "int2"], "format: got 'int2'"),
        (["--formats", "int3-fit"], "format: got 'int3-fit'"),
        (["--sparsity", "half"], "sparsity: got 'half'"),
        (["--alpha", "mean"], "alpha: got 'mean'"),
        (["--method", "cats"], "method: got 'cats'"),
        (["--preset", "no"], "preset: got 'no'"),
        (["--lambada", "missing.jsonl"], "missing.jsonl"),
        (["--adapter", "missing"], "missing"),
    ],
    ids=["format", "fit", "sparsity", "alpha", "method", "preset", "lambada", "adapter"],
)
def test_frontier_refuses_wrong_input_before_work_starts(tmp_path, changes, message):
    code, _, err = run("frontier", "no-model", "-o", tmp_path / "out", "--formats", "bf16", *changes)
    assert code == 2 and message in " ".join(err.split())
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_on_a_real_model_int8_is_better_than_half_of_bf16_and_reads_less(smollm2_dir, tmp_path):
    """What holds at any budget; the figures of a run are in docs/results/frontier.md."""
    few = ["--max-tokens", "320", "--window", "40", "--calibration-tokens", "256"]
    call = ["frontier", smollm2_dir, "-o", tmp_path / "out", "--formats", "bf16,int8", "--sparsity", "0,0.5"]
    code, printed, err = run(*call, "--alpha", "off", *few, "--json")
    assert code == 0, err
    rows = {(r["format"], r["sparsity"]): r for r in json.loads(printed)["rows"]}
    dense, int8, half = (rows[key] for key in (("bf16", 0.0), ("int8", 0.0), ("bf16", 0.5)))
    assert dense["bits_per_weight"] == pytest.approx(16, abs=0.01) and 134e6 < dense["bytes_per_token"] / 2 < 135e6
    assert int8["kl"] < 0.02 and int8["kl"] < half["kl"] / 10 and int8["perplexity"] < 1.02 * dense["perplexity"]
    assert int8["bits_per_weight"] < half["bits_per_weight"] < 11
    assert rows["int8", 0.5]["bits_per_weight"] < 0.7 * int8["bits_per_weight"]
