# SPDX-License-Identifier: Apache-2.0
import errno
import json
from dataclasses import replace

import pytest
import torch
from masks import centers_of
from safetensors.torch import save_file

import spon_plugin.adapter.directory as adapter_module
from spon_plugin import Adapter, Mask, SponError, SponFields, read_adapter, write_adapter
from spon_plugin.adapter.base import base_of
from spon_plugin.adapter.config import carries_alpha
from spon_plugin.adapter.directory import CONFIG_NAME, WEIGHTS_NAME, is_adapter, read_config
from spon_plugin.adapter.saved import KEY_PREFIX

Q, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj"
K = "model.layers.0.self_attn.k_proj"


def make_adapter(**fields) -> Adapter:
    masks = {
        Q: Mask(torch.tensor([0.25]), alpha=torch.arange(4.0)),
        DOWN: Mask(torch.tensor([0.1]), alpha=torch.arange(6.0)),
    }
    peft = {"base_model_name_or_path": "some/base", "target_modules": ["q_proj", "down_proj"]}
    return Adapter(SponFields(**fields), masks, peft)


def make_vectors(**fields) -> Adapter:
    """One linear with a threshold per channel, one with a centre."""
    adapter = make_adapter(**fields)
    change(adapter, Q, threshold=torch.tensor([0.1, 0.2, 0.0, 0.4]))
    change(adapter, DOWN, center=torch.linspace(-1, 1, 6))
    return adapter


def change(adapter: Adapter, path: str, **tensors) -> None:
    adapter.masks[path] = replace(adapter.masks[path], **tensors)


def files(path) -> list[str]:
    return sorted(p.name for p in path.iterdir())


def test_what_is_written_is_read_back(tmp_path):
    adapter = make_adapter(sparsity=0.4, calibration={"seed": 3})
    write_adapter(adapter, tmp_path / "a")
    back = read_adapter(tmp_path / "a")
    assert back.fields == adapter.fields and back.peft == adapter.peft
    assert back.tensors().keys() == adapter.tensors().keys()
    assert all(torch.equal(back.tensors()[key], tensor) for key, tensor in adapter.tensors().items())
    assert back.digest == adapter.digest
    assert is_adapter(tmp_path / "a") and not is_adapter(tmp_path)
    assert files(tmp_path) == ["a"] and files(tmp_path / "a") == [CONFIG_NAME, WEIGHTS_NAME]


def test_vectors_and_centres_are_read_back(tmp_path):
    adapter = make_vectors()
    back = read_adapter(write_adapter(adapter, tmp_path / "a"))
    assert centers_of(back).keys() == {DOWN} and f"{KEY_PREFIX}{DOWN}.spon_center" in back.tensors()
    assert all(torch.equal(back.tensors()[key], tensor) for key, tensor in adapter.tensors().items())
    assert back.digest == adapter.digest
    assert centers_of(back.without_alpha()).keys() == {DOWN}
    config = json.loads((tmp_path / "a" / CONFIG_NAME).read_text())
    assert config["channel_modules"] == ["q_proj"] and config["center_modules"] == ["down_proj"]
    assert back.peft == adapter.peft


def test_linears_may_share_a_vector_in_memory(tmp_path):
    adapter = make_adapter(alpha_modules=[])
    adapter.masks = dict.fromkeys((Q, DOWN), Mask(torch.arange(4.0), torch.arange(4.0)))
    back = read_adapter(write_adapter(adapter, tmp_path / "a"))
    assert back.digest == adapter.digest


def test_an_adapter_without_them_has_the_digest_that_it_always_had():
    assert not {"channel_modules", "center_modules"} & make_adapter().config().keys()
    assert make_adapter(format_version=1).digest == "3c9f7ceaee2248bcdf184e2843677a4146b65a6069c273d44424ab3277b476af"


def test_the_same_adapter_gives_the_same_bytes(tmp_path):
    write_adapter(make_adapter(), tmp_path / "a")
    swapped = make_adapter()
    swapped.masks = dict(reversed(swapped.masks.items()))
    write_adapter(swapped, tmp_path / "b")
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_the_digest_follows_what_changes_the_function():
    digests = {make_adapter().digest, make_adapter(dense_prefix=1).digest, make_adapter().without_alpha().digest}
    assert len(digests) == 3
    assert make_adapter(calibration={"seed": 1}).digest == make_adapter().digest
    moved = make_vectors()
    change(moved, DOWN, center=moved.masks[DOWN].center + 1)
    assert len({make_adapter().digest, make_vectors().digest, moved.digest}) == 3


def test_without_alpha_is_plain_teal():
    teal = make_adapter().without_alpha()
    teal.check()
    assert not teal.has_alpha and teal.masks.keys() == make_adapter().masks.keys()


@pytest.mark.parametrize(
    ("modules", "expected"),
    [
        pytest.param("all", [True, True], id="all"),
        pytest.param(["down_proj"], [False, True], id="leaf"),
        pytest.param([Q], [True, False], id="path"),
        pytest.param(["proj"], [False, False], id="not-a-substring"),
        pytest.param([], [False, False], id="none"),
    ],
)
def test_which_modules_carry_alpha(modules, expected):
    assert [carries_alpha(Q, modules), carries_alpha(DOWN, modules)] == expected


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        pytest.param("sparsity", 1.0, r"sparsity: got 1.0, expected a number in \[0, 1\)", id="sparsity"),
        pytest.param("alpha_scale", [1.0], "alpha_scale: got \\[1.0\\], expected a JSON object", id="alpha-scale"),
        pytest.param(
            "alpha_scale", {"a": -1.0}, "alpha_scale: a: got -1.0, expected a finite number", id="alpha-scale-value"
        ),
        pytest.param("allocation", "best", "allocation: got 'best', expected one of uniform, greedy", id="allocation"),
        pytest.param("tokens", "some", "tokens: got 'some', expected one of all, decode", id="tokens"),
        pytest.param("dense_prefix", -1, "dense_prefix: got -1, expected a whole number", id="negative-prefix"),
        pytest.param("dense_prefix", True, "dense_prefix: got True", id="bool-prefix"),
        pytest.param("alpha_modules", "down_proj", 'alpha_modules: got .* expected "all" or a list', id="alpha"),
        pytest.param("calibration", [], "calibration: got", id="calibration"),
        pytest.param("format_version", 3, "format_version: got 3, expected 1 or 2. Upgrade spon-plugin", id="newer"),
        pytest.param("format_version", "1", "format_version: got '1', expected 1 or 2", id="version-type"),
        pytest.param("format_version", [1], r"format_version: got \[1\], expected 1 or 2", id="version-list"),
    ],
)
def test_a_wrong_field_is_named_on_writing_and_on_reading(tmp_path, field, value, message):
    with pytest.raises(SponError, match=message):
        write_adapter(make_adapter(**{field: value}), tmp_path / "a")
    assert files(tmp_path) == []
    write_adapter(make_adapter(), tmp_path / "a")
    config = json.loads((tmp_path / "a" / CONFIG_NAME).read_text())
    (tmp_path / "a" / CONFIG_NAME).write_text(json.dumps({**config, field: value}))
    with pytest.raises(SponError, match=message):
        read_config(tmp_path / "a")


@pytest.mark.parametrize(("version", "prefix"), [(1, 1), (2, 0)])
def test_the_dense_prefix_of_a_version(tmp_path, version, prefix):
    write_adapter(make_adapter(format_version=version), tmp_path / "a")
    file = tmp_path / "a" / CONFIG_NAME
    config = json.loads(file.read_text())
    assert config.pop("dense_prefix") == prefix == make_adapter(format_version=version).fields.dense_prefix
    file.write_text(json.dumps(config))
    assert read_adapter(tmp_path / "a").fields.dense_prefix == prefix


def test_an_adapter_of_format_1_is_written_as_it_was(tmp_path):
    write_adapter(make_adapter(format_version=1), tmp_path / "a")
    adapter = read_adapter(tmp_path / "a")
    adapter.fields.alpha_scale = {"a": 1.0}  # a field of format 2, as training on may fill it
    write_adapter(adapter, tmp_path / "b")
    assert json.loads((tmp_path / "a" / CONFIG_NAME).read_text()).keys().isdisjoint({"alpha_scale"})
    for name in files(tmp_path / "a"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


@pytest.mark.parametrize("field", ["format_version", "sparsity", "alpha_modules"])
def test_a_missing_field_is_named(tmp_path, field):
    write_adapter(make_adapter(), tmp_path / "a")
    config = json.loads((tmp_path / "a" / CONFIG_NAME).read_text())
    del config[field]
    (tmp_path / "a" / CONFIG_NAME).write_text(json.dumps(config))
    with pytest.raises(SponError, match=f"{field}: got 'no such field'"):
        read_adapter(tmp_path / "a")


def tamper(tensors: dict[str, torch.Tensor], change: str) -> None:
    alpha, threshold = f"{KEY_PREFIX}{Q}.spon_alpha", f"{KEY_PREFIX}{Q}.spon_threshold"
    center = f"{KEY_PREFIX}{Q}.spon_center"
    if change == "nan alpha":
        tensors[alpha][1] = float("nan")
    elif change == "infinite threshold":
        tensors[threshold][0] = float("inf")
    elif change == "negative threshold":
        tensors[threshold][0] = -0.1
    elif change == "half alpha":
        tensors[alpha] = tensors[alpha].half()
    elif change == "threshold shape":
        tensors[threshold] = torch.zeros(2, 2)
    elif change == "no threshold values":
        tensors[threshold] = torch.zeros(0)
    elif change == "threshold length":
        tensors[threshold] = torch.zeros(5)
    elif change == "one negative of many":
        tensors[threshold] = torch.tensor([0.0, 1.0, -0.5, 1.0])
    elif change == "center length":
        tensors[center] = torch.zeros(5)
    elif change == "center shape":
        tensors[center] = torch.zeros(())
    elif change == "half center":
        tensors[center] = torch.zeros(4).half()
    elif change == "nan center":
        tensors[center] = torch.full((4,), float("nan"))
    elif change == "center elsewhere":
        tensors[center.replace("q_proj", "k_proj")] = torch.zeros(4)
    elif change == "alpha shape":
        tensors[alpha] = torch.zeros(2, 2)
    elif change == "missing alpha":
        del tensors[alpha]
    elif change == "missing threshold":
        del tensors[threshold]
    elif change == "unknown tensor":
        tensors["base_model.model.lora_A.weight"] = torch.zeros(1)
    elif change == "no tensors":
        tensors.clear()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("nan alpha", "q_proj.spon_alpha: got 'NaN or infinity'"),
        ("infinite threshold", "q_proj.spon_threshold: got 'NaN or infinity'"),
        ("negative threshold", "q_proj.spon_threshold: got -0.1.*, expected a threshold >= 0"),
        ("half alpha", "q_proj.spon_alpha: got torch.float16, expected torch.float32"),
        ("threshold shape", r"q_proj.spon_threshold: got \(2, 2\), expected shape \[1\] or \[in_features\]"),
        ("no threshold values", r"q_proj.spon_threshold: got \(0,\), expected shape \[1\] or \[in_features\]"),
        (
            "threshold length",
            r"q_proj.spon_threshold: got \(5,\), expected shape \(4,\), the length of .*q_proj.spon_alpha",
        ),
        ("one negative of many", "q_proj.spon_threshold: got -0.5, expected a threshold >= 0"),
        ("center length", r"q_proj.spon_center: got \(5,\), expected shape \(4,\), the length of .*q_proj.spon_alpha"),
        ("center shape", r"q_proj.spon_center: got \(\), expected shape \[in_features\]"),
        ("half center", "q_proj.spon_center: got torch.float16, expected torch.float32"),
        ("nan center", "q_proj.spon_center: got 'NaN or infinity'"),
        ("center elsewhere", "k_proj.spon_center: got 'a centre without a threshold'"),
        ("alpha shape", r"q_proj.spon_alpha: got \(2, 2\), expected shape \[in_features\]"),
        ("missing alpha", "q_proj.spon_alpha: got 'no such tensor'"),
        ("missing threshold", "q_proj.spon_alpha: got 'an alpha without a threshold'"),
        ("unknown tensor", "lora_A.weight: got 'an unknown tensor'"),
        ("no tensors", "adapter: got 'no thresholds'"),
    ],
)
def test_tampered_tensors_are_named(tmp_path, change, message):
    path = write_adapter(make_adapter(), tmp_path / "a")
    tensors = make_adapter().tensors()
    tamper(tensors, change)
    save_file(tensors, path / WEIGHTS_NAME)
    with pytest.raises(SponError, match=message):
        read_adapter(path)


def test_an_alpha_that_the_config_does_not_announce_is_refused():
    adapter = make_adapter(alpha_modules=["down_proj"])
    with pytest.raises(SponError, match="q_proj.spon_alpha: got 'an alpha', expected none"):
        adapter.check()


@pytest.mark.parametrize(
    ("modules", "expected"),
    [
        pytest.param([Q, DOWN, K], "all", id="all"),
        pytest.param([Q, K], ["k_proj", "q_proj"], id="leaves"),
        pytest.param([DOWN, DOWN.replace("0", "1")], ["down_proj"], id="leaf-of-two-blocks"),
        pytest.param([DOWN], [DOWN], id="one-of-two-blocks"),
        pytest.param([], [], id="none"),
    ],
)
def test_the_config_names_the_layers_with_centres_in_short(modules, expected):
    adapter = make_adapter().without_alpha()
    paths = {Q, DOWN, K} | ({DOWN.replace("0", "1")} if "all" not in expected else set())
    adapter.masks = {path: Mask(torch.ones(1), torch.zeros(4) if path in modules else None) for path in sorted(paths)}
    assert adapter.center_modules == expected
    adapter.check_announced({"center_modules": expected})


@pytest.mark.parametrize(
    ("announced", "message"),
    [
        ({}, "q_proj.spon_threshold: got 'a threshold per channel', expected none, as channel_modules is \\[\\]"),
        ({"channel_modules": "all"}, "down_proj.spon_threshold: got 'no threshold per channel', expected one"),
        ({"channel_modules": ["q_proj"]}, "down_proj.spon_center: got 'a centre', expected none, as center_modules is"),
        ({"channel_modules": ["q_proj"], "center_modules": "all"}, "q_proj.spon_center: got 'no centre', expected one"),
        ({"channel_modules": "q_proj"}, "channel_modules: got 'q_proj', expected \"all\" or a list"),
    ],
    ids=["nothing", "one-too-many", "centres-missing", "centres-too-many", "a-name"],
)
def test_tensors_and_config_that_disagree_are_named(tmp_path, announced, message):
    path = write_adapter(make_vectors(), tmp_path / "a")
    config = json.loads((path / CONFIG_NAME).read_text())
    kept = {key: value for key, value in config.items() if key not in ("channel_modules", "center_modules")}
    (path / CONFIG_NAME).write_text(json.dumps({**kept, **announced}))
    with pytest.raises(SponError, match=message):
        read_adapter(path)


@pytest.mark.parametrize("keep", [0, 4, 100, -1], ids=["empty", "header-size", "header", "last-byte"])
def test_a_truncated_file_is_named(tmp_path, keep):
    path = write_adapter(make_adapter(), tmp_path / "a")
    data = (path / WEIGHTS_NAME).read_bytes()
    (path / WEIGHTS_NAME).write_bytes(data[:keep])
    with pytest.raises(SponError, match=r"adapter_model.safetensors: .* a whole safetensors file.*truncated"):
        read_adapter(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        pytest.param(None, "a directory with adapter_config.json in it", id="missing"),
        pytest.param("{", "expected valid JSON", id="not-json"),
        pytest.param('{"peft_type": "LORA"}', "peft_type: got 'LORA', expected 'SPON'", id="another-method"),
        pytest.param("[]", "peft_type: got 'list'", id="not-an-object"),
    ],
)
def test_a_broken_config_is_named(tmp_path, content, message):
    if content is not None:
        (tmp_path / CONFIG_NAME).write_text(content)
    with pytest.raises(SponError, match=message):
        read_adapter(tmp_path)


def test_missing_weights_are_named(tmp_path):
    path = write_adapter(make_adapter(), tmp_path / "a")
    (path / WEIGHTS_NAME).unlink()
    with pytest.raises(SponError, match=f"a directory with {WEIGHTS_NAME} in it"):
        read_adapter(path)


def test_an_existing_directory_is_not_touched(tmp_path):
    path = write_adapter(make_adapter(), tmp_path / "a")
    before = (path / WEIGHTS_NAME).read_bytes()
    with pytest.raises(SponError, match="output: got .*expected a path that does not exist"):
        write_adapter(make_adapter().without_alpha(), path)
    assert (path / WEIGHTS_NAME).read_bytes() == before
    write_adapter(make_adapter().without_alpha(), path, overwrite=True)
    assert not read_adapter(path).has_alpha
    assert files(tmp_path) == ["a"]


def test_overwrite_spares_what_is_not_an_adapter(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "thesis.txt").write_text("mine")
    with pytest.raises(SponError, match="expected a path that does not exist"):
        write_adapter(make_adapter(), tmp_path / "a", overwrite=True)
    assert (tmp_path / "a" / "thesis.txt").read_text() == "mine"


@pytest.mark.parametrize("overwrite", [False, True], ids=["new", "overwrite"])
def test_a_full_disk_midway_leaves_what_was_there(tmp_path, monkeypatch, overwrite):
    if overwrite:
        write_adapter(make_adapter(), tmp_path / "a")

    def full(tensors, file, metadata=None):
        file.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(adapter_module, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        write_adapter(make_adapter().without_alpha(), tmp_path / "a", overwrite=overwrite)
    assert files(tmp_path) == (["a"] if overwrite else [])
    if overwrite:
        assert read_adapter(tmp_path / "a").has_alpha


def test_another_base_is_told_by_shapes_then_names():
    adapter = make_adapter()
    adapter.check_base({Q: 4, DOWN: 6, "lm_head": 4})
    with pytest.raises(SponError, match=r"q_proj.spon_alpha: got \(4,\), expected shape \(8,\) .*'some/base'"):
        adapter.check_base({Q: 8, DOWN: 6})
    with pytest.raises(SponError, match=r"1 sparsified layers such as .*down_proj.*'some/base'"):
        adapter.check_base({Q: 4})


@pytest.mark.parametrize("tensor", ["threshold", "center"])
def test_another_base_is_told_by_a_vector(tensor):
    adapter = make_adapter().without_alpha()
    change(adapter, DOWN, **{tensor: torch.ones(6)})
    adapter.check()
    adapter.check_base({Q: 8, DOWN: 6})
    with pytest.raises(SponError, match=rf"down_proj.spon_{tensor}: got \(6,\), expected shape \(8,\) .*'some/base'"):
        adapter.check_base({Q: 4, DOWN: 8})


@pytest.mark.parametrize(
    ("base", "message"),
    [
        (None, "a: base_model_name_or_path: got None, expected the base model's name or path. Do this"),
        ("", "got '', expected the base model's name"),
        ("/nowhere/at/all", "got '/nowhere/at/all', expected a directory that exists. Do this"),
        ("~nobody_here/base", "a: base_model_name_or_path: got '~nobody_here/base', expected a path"),
    ],
    ids=["none", "empty", "moved", "home of nobody"],
)
def test_an_adapter_without_a_base_says_so(base, message):
    with pytest.raises(SponError, match=message):
        base_of({"base_model_name_or_path": base}, "a", "Do this.")


def test_the_base_that_an_adapter_names_may_be_a_name_or_a_path(tmp_path):
    for base in ("org/model", str(tmp_path)):
        assert base_of({"base_model_name_or_path": base}, "a") == base
