# SPDX-License-Identifier: Apache-2.0
import errno
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from commands import TEXT, run
from masks import alphas_of, thresholds_of
from tiny_models import make_byte_tokenizer, make_tiny_llama
from transformers import AutoModelForCausalLM

from spon_plugin import Mask, read_adapter, sparse_inputs, write_adapter
from spon_plugin.kernels.cpu.kernel import is_available
from spon_plugin.kernels.table import Problem, choose, reasons
from spon_plugin.studies.evaluation import share_recovered
from spon_plugin.training.recipe import preset

SMALL = ["--windows", "6", "--window", "32"]


@pytest.fixture
def spon():
    return run


@pytest.fixture(scope="module")
def trained(tiny_model_dir, tmp_path_factory) -> Path:
    """An adapter for the tiny model; to be read only."""
    directory = tmp_path_factory.mktemp("adapter")
    (directory / "text.txt").write_text(TEXT)
    code, _, err = run("train", tiny_model_dir, "--text", directory / "text.txt", *SMALL, "-o", directory / "trained")
    assert code == 0, err
    return directory / "trained"


def names(path: Path) -> list[str]:
    return sorted(p.name for p in path.iterdir())


@pytest.mark.parametrize(
    "command",
    ["quickstart", "calibrate", "train", "eval", "merge", "quantize", "rotate", "sample", "inspect", "report"],
)
def test_help_has_an_example(spon, command):
    code, out, _ = spon(command, "--help")
    assert code == 0 and f"spon {command}" in out and "--json" in out


def test_without_a_command_there_is_help(spon):
    assert "quickstart" in spon()[1]
    assert spon("--version")[1].startswith("spon-plugin ")


@pytest.mark.parametrize("allocation", ["uniform", "greedy"])
def test_calibrate_writes_plain_teal(spon, tiny_model_dir, text, tmp_path, allocation):
    arguments = ["--sparsity", "0.6", "--allocation", allocation, "--text", text, "--json", "-o", tmp_path / "teal"]
    code, out, err = spon("calibrate", tiny_model_dir, *arguments)
    assert code == 0, err
    adapter = read_adapter(tmp_path / "teal")
    assert adapter.fields.sparsity == 0.6 and adapter.fields.allocation == allocation and not adapter.has_alpha
    shown = json.loads(out)
    assert shown["digest"] == adapter.digest
    assert shown["sparsity"]["achieved"] == pytest.approx(0.6, abs=0.05)
    assert adapter.fields.calibration["text"] == ["text.txt"] and adapter.base_model == str(tiny_model_dir)
    assert names(tmp_path / "teal") == ["README.md", "adapter_config.json", "adapter_model.safetensors"]
    assert "nothing: masks alone" in (tmp_path / "teal" / "README.md").read_text()


def test_train_is_reproducible_byte_for_byte(spon, trained, tiny_model_dir, text, tmp_path):
    assert spon("train", tiny_model_dir, "--text", text, *SMALL, "-o", tmp_path / "again")[0] == 0
    assert names(trained) == ["README.md", "adapter_config.json", "adapter_model.safetensors", "loss.csv", "loss.png"]
    for name in names(trained):
        assert (trained / name).read_bytes() == (tmp_path / "again" / name).read_bytes(), name
    assert spon("train", tiny_model_dir, "--text", text, *SMALL, "--seed", "1", "-o", tmp_path / "other")[0] == 0
    assert read_adapter(tmp_path / "other").digest != read_adapter(trained).digest
    assert names(tmp_path) == ["again", "other", "text.txt"]


def test_a_few_windows_are_as_many_as_were_asked_for(spon, tiny_model_dir, text, tmp_path):
    few = ["--window", "32", "--text", text]
    code, _, err = spon("calibrate", tiny_model_dir, "--tokens", "64", *few, "-o", tmp_path / "teal")
    assert code == 0, err
    calibration = read_adapter(tmp_path / "teal").fields.calibration
    assert (calibration["tokens"], calibration["held_out_tokens"]) == (64, 128)
    code, _, err = spon("train", tmp_path / "teal", "--windows", "2", "--batch-size", "1", *few, "--json",
                          "-o", tmp_path / "spon")  # fmt: skip
    assert code == 0, err
    training = read_adapter(tmp_path / "spon").fields.calibration["training"]
    assert training["windows"] == 2 and len((tmp_path / "spon" / "loss.csv").read_text().splitlines()) == 1 + 2


def test_train_lowers_the_loss_and_keeps_the_thresholds(spon, tiny_model_dir, text, tmp_path):
    spon("calibrate", tiny_model_dir, "--text", text, "-o", tmp_path / "teal")
    code, out, err = spon("train", tmp_path / "teal", "--text", text, "--windows", "60", "--window", "32", "--json",
                          "--alpha-modules", "down_proj", "-o", tmp_path / "spon")  # fmt: skip
    assert code == 0, err
    start, end = read_adapter(tmp_path / "teal"), read_adapter(tmp_path / "spon")
    assert thresholds_of(start) == thresholds_of(end)
    assert {path.rpartition(".")[2] for path in alphas_of(end)} == {"down_proj"}
    loss = json.loads(out)["loss"]
    assert loss["last"] < loss["first"]
    assert end.fields.calibration["training"]["windows"] == 60


def test_an_interrupted_training_resumes_to_the_same_bytes(spon, trained, tiny_model_dir, text, tmp_path, monkeypatch):
    import spon_cli.training as train_module
    from spon_peft import training

    def stopped(done: int, *_: object) -> None:
        if done == 2:
            raise KeyboardInterrupt

    original = training.train_adapter

    def interrupted(*args, progress=None, **kwargs):
        return original(*args, progress=stopped, save_every=1, **kwargs)

    monkeypatch.setattr(training, "train_adapter", interrupted)
    command = ["train", tiny_model_dir, "--text", text, *SMALL, "-o", tmp_path / "resumed"]
    assert spon(*command)[0] == 130
    monkeypatch.setattr(training, "train_adapter", original)
    assert names(tmp_path) == ["resumed.training", "text.txt"]
    code, _, err = spon(*command)
    assert code == 2 and "Add --resume" in err
    code, _, err = spon(*command, "--resume", "--learning-rate", "0.1")
    planned = f"learning_rate: got 0.1, expected {preset('fast').learning_rate}, as in the checkpoints"
    assert code == 2 and planned in " ".join(err.split())
    (tmp_path / "resumed.training" / "checkpoint-900").mkdir()  # what a kill while a checkpoint is written leaves
    assert spon(*command, "--resume")[0] == 0
    for name in names(trained):
        assert (trained / name).read_bytes() == (tmp_path / "resumed" / name).read_bytes(), name
    assert not train_module.work_directory(tmp_path / "resumed", False).exists()


@pytest.mark.parametrize("protocol", ["all", "last-half", "all-but-first"])
def test_eval_reports_what_the_readme_says(spon, trained, tiny_model_dir, text, protocol):
    code, out, err = spon("eval", tiny_model_dir, "--adapter", trained, "--text", text, "--window", "64",
                          "--max-tokens", "640", "--protocol", protocol, "--json")  # fmt: skip
    assert code == 0, err
    shown = json.loads(out)
    assert set(shown["perplexity"]) == {"dense", "teal", "spon"}
    dense, teal, spon_ = (shown["perplexity"][k] for k in ("dense", "teal", "spon"))
    assert shown["recovered"] == share_recovered(dense, teal, spon_)
    assert shown["sparsity"]["target"] == 0.5 and shown["sparsity"]["achieved"] == pytest.approx(0.5, abs=0.05)
    assert shown["protocol"] == protocol and shown["tokens"] == 640


def test_eval_shows_texts_side_by_side(spon, trained, tiny_model_dir, text, tmp_path):
    (tmp_path / "other.txt").write_text(TEXT[::-1])
    arguments = ["--adapter", trained, "--window", "32", "--max-tokens", "64", "--text", text, "--text"]
    _, out, _ = spon("eval", tiny_model_dir, *arguments, tmp_path / "other.txt")
    assert "text.txt" in out and "other.txt" in out and "tokens, all, target" in out


def test_eval_says_what_drafts_are_worth(spon, trained, tiny_model_dir, text):
    command = ["eval", tiny_model_dir, "--adapter", trained, "--text", text, "--window", "72", "--max-tokens", "144"]
    code, out, err = spon(*command, "--drafts", "1,3", "--json")
    assert code == 0, err
    found = json.loads(out)["lossless"]
    assert 0 < found["greedy"] <= 1 and 0 < found["sampled"] <= 1
    assert found["greedy_tokens"].keys() == found["speedup"]["sampled"].keys() == {"1", "3"}
    assert 1 <= found["greedy_tokens"]["1"] <= found["greedy_tokens"]["3"] <= 4
    assert all(value > 0 for value in (*found["speedup"]["greedy"].values(), *found["step_seconds"]["verify"].values()))
    code, out, err = spon(*command, "--drafts", "1")
    assert code == 0 and "of drafted tokens accepted greedily" in out
    for wrong in ("0", "1.5", "8", ","):
        code, _, err = spon(*command, "--drafts", wrong)
        assert code == 2 and "comma-separated whole numbers from 1 to 7, as 1,2,3" in err


def test_eval_against_the_masks_of_another_adapter(spon, trained, tiny_model_dir, text, tmp_path):
    code, _, err = spon("calibrate", tiny_model_dir, "--sparsity", "0.7", "--text", text, "-o", tmp_path / "teal70")
    assert code == 0, err
    arguments = ["--text", text, "--window", "32", "--max-tokens", "320"]
    both = ["eval", tiny_model_dir, "--adapter", trained, "--baseline", tmp_path / "teal70", *arguments]
    code, out, err = spon(*both, "--json")
    assert code == 0, err
    shown = json.loads(out)
    alone = json.loads(spon("eval", tiny_model_dir, "--adapter", tmp_path / "teal70", *arguments, "--json")[1])
    dense, teal, spon_ = shown["perplexity"]["dense"], alone["perplexity"]["teal"], shown["perplexity"]["spon"]
    assert shown["baseline"]["perplexity"] == pytest.approx(teal)
    assert shown["baseline"]["achieved"] == pytest.approx(alone["sparsity"]["achieved"])
    assert shown["baseline"]["recovered"] == share_recovered(dense, teal, spon_)
    out = spon(*both)[1]
    assert "Against the masks of the baseline" in out and f"{teal:.2f}" in out


def test_inspect_shows_sites_thresholds_and_alphas(spon, trained):
    code, out, _ = spon("inspect", trained, "--json")
    modules = json.loads(out)["modules"]
    assert code == 0 and len(modules) == 14
    adapter = read_adapter(trained)
    for row in modules:
        mask = adapter.masks[row["module"]]
        assert row["threshold"] == float(mask.threshold)
        assert row["alpha_norm"] == pytest.approx(float(mask.alpha.norm()))
    shown = {row["module"]: row["achieved_sparsity"] for row in modules}
    calibration = adapter.fields.calibration
    for name, site in calibration["sites"].items():
        for path in site["modules"]:
            assert shown[f"{name.rpartition('.')[0]}.{path}"] == site["achieved_sparsity"]
    assert calibration["achieved_sparsity"] == pytest.approx(0.5, abs=0.05)
    assert "down_proj" in spon("inspect", trained)[1]


def test_inspect_says_which_kernels_run_and_why_no_faster_ones(spon, trained):
    shown = json.loads(spon("inspect", trained, "--kernels", "--dtype", "float32", "--json")[1])
    rows = {row["linears"]: row for row in shown["kernels"]}
    assert set(rows) == {path.rpartition(".")[2] for path in read_adapter(trained).masks}
    assert all(row["number"] == 2 and row["format"] == "dense" for row in rows.values())
    linear = torch.zeros(1, rows["down_proj"]["in_features"])
    assert rows["down_proj"]["kernel"] == choose(Problem(linear)).name
    assert rows["down_proj"]["why_not"] == reasons(Problem(linear))
    table = spon("inspect", trained, "--kernels", "--dtype", "float32")[1]
    assert all(f"{name}: {reason}" in table for name, reason in reasons(Problem(linear)).items())


@pytest.fixture(scope="module")
def vectors(trained, tmp_path_factory) -> Path:
    """The same adapter with thresholds per channel and centres."""
    adapter = read_adapter(trained)
    torch.manual_seed(0)
    for path, mask in adapter.masks.items():
        threshold = mask.threshold * torch.rand_like(mask.alpha)
        center = 0.1 * torch.randn_like(mask.alpha) if path.endswith("down_proj") else None
        adapter.masks[path] = Mask(threshold, center, mask.alpha)
    return write_adapter(adapter, tmp_path_factory.mktemp("adapter") / "vectors")


def test_inspect_shows_thresholds_per_channel_and_centres(spon, vectors):
    shown = json.loads(spon("inspect", vectors, "--json")[1])
    adapter = read_adapter(vectors)
    assert shown["per_channel"] == 14 and shown["centers"] == 2
    for row in shown["modules"]:
        threshold = adapter.masks[row["module"]].threshold
        assert row["threshold"] == pytest.approx(float(threshold.mean()))
        assert row["thresholds"] == [float(threshold.min()), float(threshold.max())]
        assert (row["center_norm"] is not None) == (adapter.masks[row["module"]].center is not None)
    table = spon("inspect", vectors)[1]
    assert "center norm" in table and " to " in table


def test_eval_and_merge_of_thresholds_per_channel_and_centres(spon, vectors, tiny_model_dir, text, tmp_path):
    arguments = ["--adapter", vectors, "--text", text, "--window", "32", "--max-tokens", "128", "--dtype", "float32"]
    code, out, err = spon("eval", tiny_model_dir, *arguments, "--json")
    assert code == 0, err
    measured = json.loads(out)
    code, _, err = spon("merge", vectors, "-o", tmp_path / "merged", "--dtype", "float32")
    assert code == 0, err
    adapter = read_adapter(vectors)
    base = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    ids = torch.arange(1, 41)[None]
    with sparse_inputs(base, adapter.masks, adapter.fields.dense_prefix):
        expected = base(input_ids=ids).logits
    torch.testing.assert_close(merged(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-4)
    assert 0.05 < measured["sparsity"]["achieved"] < 0.5
    without = replace(adapter, masks={path: replace(mask, center=None) for path, mask in adapter.masks.items()})
    arguments[1] = write_adapter(without, tmp_path / "without")
    other = json.loads(spon("eval", tiny_model_dir, *arguments, "--json")[1])
    assert other["perplexity"]["spon"] != measured["perplexity"]["spon"]


def test_match_holds_the_target_in_the_sparse_model(spon, tiny_model_dir, text, tmp_path):
    def achieved(name, *arguments) -> float:
        code, out, err = spon(*arguments, "--text", text, "-o", tmp_path / name, "--json")
        assert code == 0, err
        assert read_adapter(tmp_path / name).fields.calibration["matched"] == ("matched" in name)
        return json.loads(out)["sparsity"]["achieved"]

    calibrate = ["calibrate", tiny_model_dir, "--sparsity", "0.6", "--window", "32"]
    plain, matched = achieved("plain", *calibrate), achieved("matched", *calibrate, "--match")
    assert abs(matched - 0.6) < 0.01 < abs(plain - 0.6)
    assert achieved("plain trained", "train", tmp_path / "plain", *SMALL) > 0
    assert achieved("matched trained", "train", tmp_path / "plain", "--match", *SMALL) == pytest.approx(0.6, abs=0.02)
    assert achieved("matched once more", "train", tmp_path / "matched", *SMALL) == pytest.approx(0.6, abs=0.02)
    best = ["--preset", "best", "--windows", "16", "--window", "32", "--batch-size", "2"]
    assert achieved("matched on the way", "train", tmp_path / "plain", *best) == pytest.approx(0.6, abs=0.02)


def test_a_trained_adapter_says_what_it_achieves_itself(spon, trained, text, tmp_path):
    adapter = read_adapter(trained)
    for mask in adapter.masks.values():
        mask.alpha.add_(5)  # far more than training moves them
    start = write_adapter(adapter, tmp_path / "start")
    code, out, err = spon("train", start, "--text", text, *SMALL, "-o", tmp_path / "more", "--json")
    assert code == 0, err
    before, after = adapter.fields.calibration, read_adapter(tmp_path / "more").fields.calibration
    assert after["achieved_sparsity"] < before["achieved_sparsity"] - 0.05
    assert json.loads(out)["sparsity"]["achieved"] == after["achieved_sparsity"]
    assert after["sites"].keys() == before["sites"].keys()


def test_weight_decay_is_kept_in_the_recipe_and_makes_alphas_smaller(spon, trained, text, tmp_path):
    sizes = []
    for decay in (0, 10):
        arguments = [trained, "--text", text, *SMALL, "--weight-decay", decay, "-o", tmp_path / f"{decay}"]
        code, _, err = spon("train", *arguments)
        assert code == 0, err
        adapter = read_adapter(tmp_path / f"{decay}")
        assert adapter.fields.calibration["training"]["weight_decay"] == decay
        sizes.append(sum(float(alpha.norm()) for alpha in alphas_of(adapter).values()))
    assert sizes[1] < sizes[0]


def test_options_of_the_loss_are_kept_in_the_recipe(spon, trained, text, tmp_path):
    options = {"temperature": 2.0, "top_k": 32, "entropy_power": -1.0, "hidden_weight": 0.5}
    words = [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", value)]
    code, _, err = spon("train", trained, "--text", text, *SMALL, *words, "-o", tmp_path / "more")
    assert code == 2 and "hidden_blocks: got 4, expected at least 1 and at most 2" in err
    code, _, err = spon("train", trained, "--text", text, *SMALL, *words[:-2], "-o", tmp_path / "more")
    assert code == 0, err
    kept = read_adapter(tmp_path / "more").fields.calibration["training"]
    del options["hidden_weight"]
    assert {name: kept.get(name) for name in options} == options and "hidden_weight" not in kept


def test_train_keeps_thresholds_per_channel_and_centres(spon, vectors, text, tmp_path):
    code, _, err = spon("train", vectors, "--text", text, *SMALL, "-o", tmp_path / "more")
    assert code == 0, err
    before, after = read_adapter(vectors), read_adapter(tmp_path / "more")
    assert after.without_alpha().digest == before.without_alpha().digest
    assert alphas_of(after).keys() == alphas_of(before).keys() and after.digest != before.digest


def test_merge_writes_a_checkpoint_with_the_adapter_in_it(spon, trained, tiny_model_dir, tmp_path):
    from peft import PeftModel

    code, _, err = spon("merge", trained, "-o", tmp_path / "merged", "--dtype", "float32")
    assert code == 0, err
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    base = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)
    ids = torch.arange(1, 41)[None]
    expected = PeftModel.from_pretrained(base, trained)(input_ids=ids).logits
    torch.testing.assert_close(merged(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-4)
    assert (tmp_path / "merged" / "tokenizer.json").is_file()
    assert not is_available() or "2 of 2 blocks run as one program" in " ".join(err.split())


def test_a_quantized_model_is_one_that_every_command_takes(spon, tiny_model_dir, text, tmp_path):
    pytest.importorskip("compressed_tensors", reason="pip install 'spon-plugin[quantize]'")
    code, out, err = spon("quantize", tiny_model_dir, "--group", "16", "-o", tmp_path / "w4", "--json")
    assert code == 0, err
    shown = json.loads(out)
    assert (shown["bits"], shown["group"], shown["linears"]) == (4, 16, 14) and shown["bits_per_weight"] > 4
    assert (tmp_path / "w4" / "tokenizer.json").is_file()
    code, _, err = spon("calibrate", tmp_path / "w4", "--text", text, "--sparsity", "0.5", "-o", tmp_path / "teal")
    assert code == 0, err
    code, out, err = spon("eval", tmp_path / "w4", "--adapter", tmp_path / "teal", "--text", text, "--window", "64",
                          "--max-tokens", "128", "--json")  # fmt: skip
    assert code == 0, err
    assert spon("quantize", tmp_path / "w4", "-o", tmp_path / "again")[0] == 2, "it is quantized"


@pytest.mark.parametrize(
    ("bits", "group", "said"), [("4", 16, "groups of 16"), ("8", None, "a scale for each output")], ids=["int4", "int8"]
)
def test_without_a_group_scales_fit_every_linear(bits, group, said, spon, tiny_model_dir, tmp_path):
    pytest.importorskip("compressed_tensors", reason="pip install 'spon-plugin[quantize]'")
    code, out, err = spon("quantize", tiny_model_dir, "--bits", bits, "-o", tmp_path / "json", "--json")
    assert code == 0, err
    assert json.loads(out)["group"] == group
    code, _, err = spon("quantize", tiny_model_dir, "--bits", bits, "-o", tmp_path / "words")
    assert code == 0 and said in " ".join(err.split())


def test_a_model_is_rounded_for_the_inputs_that_an_adapter_leaves(spon, tiny_model_dir, text, tmp_path):
    pytest.importorskip("compressed_tensors", reason="pip install 'spon-plugin[quantize]'")
    reads = ["--text", text, "--tokens", "1024", "--window", "64"]
    call = ["calibrate", tiny_model_dir, "--sparsity", "0.5", *reads]
    assert spon(*call, "-o", tmp_path / "teal")[0] == 0

    def divergence(name, *options) -> float:
        code, _, err = spon("quantize", tiny_model_dir, "--group", "16", *options, "-o", tmp_path / name)
        assert code == 0, err
        assert ("The adapter masks 50%" in err) == ("--adapter" in options)
        test = ["--text", text, "--window", "64", "--max-tokens", "1024", "--reference", tiny_model_dir, "--json"]
        code, out, err = spon("eval", tmp_path / name, "--adapter", tmp_path / "teal", *test)
        assert code == 0, err
        return json.loads(out)["quality"]["teal"]["kl"]

    make_tiny_llama(num_hidden_layers=1).save_pretrained(tmp_path / "other")
    make_byte_tokenizer().save_pretrained(tmp_path / "other")
    call = ["quantize", tmp_path / "other", "--group", "16", *reads, "--adapter", tmp_path / "teal"]
    code, _, err = spon(*call, "-o", tmp_path / "no")
    assert code == 2 and "load that model" in " ".join(err.split()) and not (tmp_path / "no").exists(), err
    nearest, fit = divergence("nearest"), divergence("fit", *reads, "--adapter", tmp_path / "teal")
    assert fit < 0.9 * nearest
    assert divergence("near the weights", *reads, "--adapter", tmp_path / "teal", "--ridge", "1e6") > fit


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--adapter", "teal"], "adapter: got 'teal', expected nothing without --text or --dataset"),
        (["--ridge", "2"], "ridge: got 2.0, expected nothing without --text"),
        (["--text", "TEXT", "--ridge", "-1"], "ridge: got -1.0, expected a number from 0.001 to 1e+06"),
        (["--text", "TEXT", "--adapter", "no-adapter"], "no-adapter"),
        (["--text", "TEXT", "--window", "100000"], "window"),
        (["--text", "missing.txt"], "missing.txt"),
    ],
    ids=["adapter alone", "ridge alone", "ridge", "adapter", "window", "text"],
)
def test_quantize_refuses_what_it_cannot_read(spon, tiny_model_dir, text, tmp_path, options, message):
    pytest.importorskip("compressed_tensors", reason="pip install 'spon-plugin[quantize]'")
    options = [text if option == "TEXT" else option for option in options]
    code, _, err = spon("quantize", tiny_model_dir, "--group", "16", *options, "-o", tmp_path / "out" / "model")
    assert code == 2 and message in " ".join(err.split()), err
    assert not (tmp_path / "out" / "model").exists()


ROTATE = ["--tokens", "1024", "--window", "64", "--steps", "40"]


def test_a_rotated_model_is_one_that_every_command_takes(spon, tiny_model_dir, text, tmp_path):
    arguments = ["rotate", tiny_model_dir, "--text", text, *ROTATE]
    code, out, err = spon(*arguments, "-o", tmp_path / "rotated", "--json")
    assert code == 0, err
    shown = json.loads(out)
    assert shown["sites"] == 4 and shown["cost_after"] < 0.9 * shown["cost_before"]
    assert spon(*arguments, "-o", tmp_path / "again")[0] == 0
    assert (tmp_path / "again/model.safetensors").read_bytes() == (tmp_path / "rotated/model.safetensors").read_bytes()
    masks = ["--method", "sensitivity", "--sparsity", "0.5", "--text", text, "--tokens", "1024", "--window", "64"]
    test = ["--text", text, "--window", "64", "--max-tokens", "1024", "--reference", tiny_model_dir, "--json"]
    divergence = {}
    for model in (tiny_model_dir, tmp_path / "rotated"):
        adapter = tmp_path / f"masks-{model.name}"
        assert spon("calibrate", model, *masks, "-o", adapter)[0] == 0
        code, out, err = spon("eval", model, "--adapter", adapter, *test)
        assert code == 0, err
        quality = json.loads(out)["quality"]
        divergence[model.name] = quality["teal"]["kl"]
    assert divergence["rotated"] < 0.9 * divergence[tiny_model_dir.name]
    code, _, err = spon("eval", tmp_path / "rotated", "--adapter", tmp_path / f"masks-{tiny_model_dir.name}", *test)
    assert code == 2 and "which the adapter was made for" in " ".join(err.split()), (
        "masks of the model before the rotation"
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--sparsity", "0"], "sparsity: got 0.0, expected more than 0"),
        (["--sparsity", "1"], "sparsity: got 1.0"),
        (["--window", "100000", "--tokens", "100000"], "text"),
        (["--text", "missing.txt"], "missing.txt"),
    ],
    ids=["no masks", "all masked", "window", "text"],
)
def test_rotate_refuses_what_it_cannot_do(spon, tiny_model_dir, text, tmp_path, options, message):
    code, _, err = spon("rotate", tiny_model_dir, "--text", text, *ROTATE, *options, "-o", tmp_path / "out")
    assert code == 2 and message in " ".join(err.split()), err
    assert names(tmp_path) == ["text.txt"] or names(tmp_path) == []


@pytest.mark.parametrize(("option", "value"), [("--group", "128"), ("--bits", "3")], ids=["group", "bits"])
def test_quantize_says_what_fits_and_leaves_nothing_behind(spon, tiny_model_dir, tmp_path, option, value):
    pytest.importorskip("compressed_tensors", reason="pip install 'spon-plugin[quantize]'")
    code, _, err = spon("quantize", tiny_model_dir, option, value, "-o", tmp_path / "out")
    assert code == 2 and f"{option[2:]}: got {value}, expected" in " ".join(err.split())
    assert names(tmp_path) == []


def test_texts_of_one_name_are_told_apart_by_their_folders(tmp_path):
    from spon_transformers.text_sources import text_sources

    files = [tmp_path / "a" / "x" / "t.txt", tmp_path / "b" / "x" / "t.txt", tmp_path / "b" / "u.txt"]
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(str(file))
    sources = text_sources(files, None)
    assert [source.name for source in sources] == ["a/x/t.txt", "b/x/t.txt", "u.txt"]
    assert [source.text for source in sources] == [str(file) for file in files]


def test_a_dataset_is_read_by_name_configuration_and_split(monkeypatch):
    import datasets

    from spon_transformers.text_sources import text_sources

    asked = []

    def load_dataset(name, config, split, streaming):
        asked.append((name, config, split, streaming))
        return datasets.Dataset.from_dict({"id": [1, 2], "text": ["one\n", "two"]})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    (source,) = text_sources(None, ["org/name:raw@test"])
    assert source.text == "one\n\n\ntwo" and source.name == "org/name:raw@test"
    text_sources(None, ["org/name"])
    assert asked == [("org/name", "raw", "test", True), ("org/name", None, "train", True)]


# Options that an adapter to train further has settled.
SETTLED = {
    "sparsity": ("--sparsity", "0.4", "sparsity: got 0.4, expected 0.5, the adapter's"),
    "allocation": ("--allocation", "greedy", "method: got 'teal-greedy', expected teal, the adapter's"),
    "method": ("--method", "wina", "method: got 'wina', expected teal, the adapter's"),
    "dense prefix": ("--dense-prefix", "3", "dense_prefix: got 3, expected 0, the adapter's"),
    "targets": ("--target-modules", "o_proj", "target_modules: got ['o_proj'], expected ['down_proj', "),
    "alphas": ("--alpha-modules", "down_proj", "alpha_modules: got ['down_proj'], expected all, the adapter's"),
}


def wrong(tmp_path: Path, model: Path, text: str, trained: Path) -> dict[str, tuple[list[object], str]]:
    """Name -> (arguments, what the error must say)."""
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "short.txt").write_text("too short")
    (tmp_path / "one.txt").write_text("x" * 300)
    (tmp_path / "taken").mkdir()
    out = ["-o", tmp_path / "out"]
    train = ["train", model, "--text", text]
    return {
        "sparsity of one": ([*train, "--sparsity", "1.0", *out], "sparsity: got 1.0, expected a number in [0, 1)"),
        "negative sparsity": (["calibrate", model, "--sparsity", "-0.1", *out], "sparsity: got -0.1"),
        "output exists": ([*train, "-o", tmp_path / "taken"], "expected a path that does not exist"),
        "empty text": (["train", model, "--text", tmp_path / "empty.txt", *out], "it is empty"),
        "text shorter than a window": (
            ["train", model, "--text", tmp_path / "short.txt", *out],
            "text: got '9 tokens', expected at least one window of 256 tokens",
        ),
        "text of one window": (
            ["train", model, "--text", tmp_path / "one.txt", "--window", "256", *out],
            "text: got '1 windows of 256 tokens', expected at least two windows",
        ),
        "missing text": (["train", model, "--text", tmp_path / "no.txt", *out], "No such file"),
        "missing data set": (["train", model, "--dataset", tmp_path / "no:such@split", *out], "dataset: got"),
        "missing model": (["train", tmp_path / "no", *out], "model: got"),
        "not a linear": (
            ["calibrate", model, "--text", text, "--target-modules", "input_layernorm", *out],
            "target_modules: got 'input_layernorm', expected linears",
        ),
        "no such alpha module": ([*train, "--alpha-modules", "fc1", *out], "alpha_modules: got ['fc1']"),
        "no such preset": ([*train, "--preset", "slow", *out], "preset: got 'slow', expected one of fast, paper, best"),
        "no such allocation": ([*train, "--allocation", "best", *out], "allocation: got 'best'"),
        "zero windows": ([*train, "--windows", "0", *out], "windows: got 0, expected a positive number"),
        "no such dtype": ([*train, "--dtype", "int3", *out], "dtype: got 'int3'"),
        **{
            f"{what} of another adapter": (["train", trained, option, value, "--text", text, *out], message)
            for what, (option, value, message) in SETTLED.items()
        },
        "no alpha module": ([*train, "--alpha-modules", ",", *out], "alpha_modules: got []"),
        "a text twice": ([*train, "--text", text, *out], "text: got"),
        "no position to predict": (
            ["eval", model, "--adapter", trained, "--text", text, "--window", "2", "--protocol", "last-half"],
            "expected windows of at least 3 tokens",
        ),
        "no such adapter": (["eval", model, "--adapter", tmp_path / "no", "--text", text], "adapter: got"),
        "no such precision": (
            ["eval", model, "--adapter", trained, "--text", text, "--precision", "int3"],
            "precision: got 'int3', expected one of int8, int4, torchao-int8, torchao-int4",
        ),
        "no such protocol": (
            ["eval", model, "--adapter", trained, "--text", text, "--protocol", "first-half"],
            "protocol: got 'first-half', expected one of all, last-half, all-but-first",
        ),
        "window longer than the text": (
            ["eval", model, "--adapter", trained, "--text", tmp_path / "short.txt"],
            "expected at least one window of 512 tokens",
        ),
        "fewer tokens than a window": (
            ["eval", model, "--adapter", trained, "--text", text, "--max-tokens", "10"],
            "max_tokens: got 10",
        ),
    }


WRONG = [
    "sparsity of one",
    "negative sparsity",
    "output exists",
    "empty text",
    "text shorter than a window",
    "text of one window",
    "missing text",
    "missing data set",
    "missing model",
    "not a linear",
    "no such alpha module",
    "no such preset",
    "no such allocation",
    "zero windows",
    "no such dtype",
    "sparsity of another adapter",
    "allocation of another adapter",
    "method of another adapter",
    "dense prefix of another adapter",
    "targets of another adapter",
    "alphas of another adapter",
    "no alpha module",
    "a text twice",
    "no position to predict",
    "no such adapter",
    "no such precision",
    "no such protocol",
    "window longer than the text",
    "fewer tokens than a window",
]


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_is_named_and_nothing_is_written(spon, tiny_model_dir, text, trained, tmp_path, case):
    cases = wrong(tmp_path, tiny_model_dir, text, trained)
    assert set(cases) == set(WRONG)
    before = names(tmp_path)
    code, out, err = spon(*cases[case][0])
    assert code == 2 and cases[case][1] in " ".join(err.split()), err
    assert out == "" and names(tmp_path) == before


def test_an_adapter_for_another_model_is_refused(spon, trained, text, tmp_path):
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from tiny_models import make_byte_tokenizer, make_tiny_llama

    for name, changes, message in (
        ("wider", {"intermediate_size": 64}, "spon_alpha: got (96,), expected shape (64,)"),
        ("shallower", {"num_hidden_layers": 1}, "sparsified layers such as"),
    ):
        make_tiny_llama(**changes).save_pretrained(tmp_path / name)
        make_byte_tokenizer().save_pretrained(tmp_path / name)
        code, _, err = spon("eval", tmp_path / name, "--adapter", trained, "--text", text)
        assert code == 2 and message in " ".join(err.split()), err


@pytest.mark.parametrize("command", ["calibrate", "train"])
def test_a_full_disk_leaves_nothing(spon, tiny_model_dir, text, tmp_path, monkeypatch, command):
    import spon_cli.training as train_module

    def full(adapter, directory):
        (directory / "half").write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(train_module, "save_adapter_files", full)
    extra = SMALL if command == "train" else []
    code, _, err = spon(command, tiny_model_dir, "--text", text, *extra, "-o", tmp_path / "out")
    assert code == 1 and "No space left on device" in err
    trained = ["out.training"] if command == "train" else []  # to go on from when there is room
    assert names(tmp_path) == [*trained, "text.txt"] and ("--resume" in err) == bool(trained)


SAMPLE = ["--tokens", "200", "--length", "16", "--batch-size", "8"]


def test_sampled_text_is_the_models_own_and_the_same_again(spon, tiny_model_dir, tmp_path):
    code, out, err = spon("sample", tiny_model_dir, *SAMPLE, "-o", tmp_path / "new/a.txt", "--json")
    assert code == 0, err
    shown = json.loads(out)
    assert shown["documents"] == 16 and shown["tokens"] == 256, "whole batches"
    first = (tmp_path / "new/a.txt").read_text()
    assert first.count("\n\n") >= 15 and len(set(first.split("\n\n"))) > 8
    assert names(tmp_path / "new") == ["a.txt"]
    state = torch.get_rng_state()
    assert spon("sample", tiny_model_dir, *SAMPLE, "-o", tmp_path / "b.txt")[0] == 0
    assert (tmp_path / "b.txt").read_text() == first and torch.equal(torch.get_rng_state(), state)
    assert spon("sample", tiny_model_dir, *SAMPLE, "--seed", "1", "-o", tmp_path / "c.txt")[0] == 0
    assert (tmp_path / "c.txt").read_text() != first
    code, _, err = spon("sample", tiny_model_dir, *SAMPLE, "-o", tmp_path / "b.txt")
    assert code == 2 and "b.txt" in err and (tmp_path / "b.txt").read_text() == first
    code, _, err = spon("sample", tiny_model_dir, *SAMPLE, "--length", "1", "-o", tmp_path / "d.txt")
    assert code == 2 and "length" in err and not (tmp_path / "d.txt").exists()
