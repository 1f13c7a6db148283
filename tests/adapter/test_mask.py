# SPDX-License-Identifier: Apache-2.0
from dataclasses import FrozenInstanceError

import pytest
import torch

from spon_plugin import Mask, SponError
from spon_plugin.adapter.mask import masks_without_alpha, with_alphas

FULL = Mask(torch.rand(4), torch.randn(4), torch.randn(4))


def test_a_mask_is_one_frozen_noun():
    with pytest.raises(FrozenInstanceError):
        FULL.threshold = torch.zeros(1)
    assert list(FULL.tensors()) == ["spon_alpha", "spon_threshold", "spon_center"]
    assert list(Mask(torch.ones(1)).tensors()) == ["spon_threshold"]
    assert FULL.per_channel and not Mask(torch.ones(1)).per_channel
    assert FULL.without_alpha().alpha is None and FULL.without_alpha().center is FULL.center
    assert FULL.to("meta").alpha.device.type == "meta"


def test_the_constant_is_what_every_token_has_in_common():
    assert torch.equal(FULL.constant, FULL.center + FULL.alpha)
    assert Mask(FULL.threshold, FULL.center).constant is FULL.center
    assert Mask(FULL.threshold, alpha=FULL.alpha).constant is FULL.alpha
    assert Mask(FULL.threshold).constant is None


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        pytest.param(Mask(torch.ones(1).half()), "x.spon_threshold: got torch.float16", id="dtype"),
        pytest.param(Mask(torch.tensor(1.0)), r"x.spon_threshold: got \(\), expected shape \[1\]", id="no-dimension"),
        pytest.param(Mask(torch.ones(1), torch.ones(0)), r"x.spon_center: got \(0,\), expected shape", id="empty"),
        pytest.param(Mask(torch.tensor([1.0, -0.5])), "x.spon_threshold: got -0.5, expected a", id="negative"),
        pytest.param(Mask(torch.ones(1), alpha=torch.tensor([torch.nan])), "x.spon_alpha: got 'NaN or", id="nan"),
        pytest.param(Mask(torch.ones(1), torch.ones(3), torch.ones(4)), r"x.spon_center: got \(3,\)", id="lengths"),
    ],
)
def test_a_tensor_that_is_wrong_is_named(mask, message):
    with pytest.raises(SponError, match=message):
        mask.check("x")


def test_vectors_are_as_long_as_the_input():
    FULL.check("x")
    FULL.check_input("x", 4, "this model")
    Mask(torch.ones(1)).check_input("x", 7, "any model")
    with pytest.raises(
        SponError, match=r"x.spon_alpha: got \(4,\), expected shape \(5,\) for this model. Load another"
    ):
        FULL.check_input("x", 5, "this model", "Load another.")


def test_alphas_are_put_in_and_taken_out_of_many_masks():
    masks = {"a": FULL, "b": Mask(torch.ones(1))}
    other = with_alphas(masks, {"b": torch.ones(4)})
    assert other["a"].alpha is None and torch.equal(other["b"].alpha, torch.ones(4)) and masks["b"].alpha is None
    assert not any(mask.alpha is not None for mask in masks_without_alpha(other).values())
    with pytest.raises(SponError, match="c.spon_alpha: got 'an alpha'"):
        with_alphas(masks, {"c": torch.ones(4)})
