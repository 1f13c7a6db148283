# SPDX-License-Identifier: Apache-2.0
import copy

import pytest
import torch
from torch import nn

from spon_plugin import SponError
from spon_plugin.decoder.tokens import DenseTokens
from spon_plugin.kernels import row_op, sparse_linear, table
from spon_plugin.kernels.cpu import kernel as cpu
from spon_plugin.kernels.cpu import known_calls, scaled
from spon_plugin.layers.sparse_linear import share_calls
from spon_plugin.layers.sparse_quantized import SparseQuantizedLinear
from spon_plugin.weights import weight_of
from spon_plugin.weights.linears import is_sparse, linear_features


class Host(nn.Module):
    """int8 codes with a scale for each output, as importers know them by their structure."""

    def __init__(self, in_features=48, out_features=40):
        super().__init__()
        torch.manual_seed(0)
        self.in_features, self.out_features = in_features, out_features
        codes = torch.randint(-128, 128, (out_features, in_features), dtype=torch.int8)
        self.weight = nn.Parameter(codes, requires_grad=False)
        self.weight_scale = nn.Parameter(0.01 * torch.rand(out_features, 1) + 0.01, requires_grad=False)
        self.bias = nn.Parameter(torch.randn(out_features), requires_grad=False)


def layer(threshold=0.5, center=False):
    made = SparseQuantizedLinear(Host())
    made.spon_threshold = torch.tensor([threshold])
    if center:
        made.spon_center = torch.full((48,), 0.3)
    return made


def expected(made, x, dense=None):
    """By the decoded weight, in float64."""
    center = torch.zeros(48) if made.spon_center is None else made.spon_center
    kept = (x - center).double() * ((x - center).abs() > made.spon_threshold)
    if dense is not None:
        kept = torch.where(dense.unsqueeze(-1), x.double(), kept)
    bias = made.bias if dense is None else torch.where(dense.unsqueeze(-1), made.spon_dense_bias, made.bias)
    return kept @ weight_of(made.host).dense(torch.float64) + bias.double()


@pytest.mark.parametrize("center", [False, True], ids=["no centre", "centre"])
@pytest.mark.parametrize("rows", [(), (1,), (3,), (2, 20)], ids=str)
def test_it_computes_what_the_decoded_weight_does(rows, center):
    made, x = layer(center=center), torch.randn(*rows, 48)
    assert (made.row_weight.format, is_sparse(made), linear_features(made)) == ("int8", True, (48, 40))
    torch.testing.assert_close(made(x).double(), expected(made, x), rtol=1e-4, atol=1e-4)


def test_dense_tokens_have_their_own_bias():
    made, x = layer(), torch.randn(1, 5, 48)
    dense = torch.tensor([[True, False, False, True, False]])

    class Tokens(DenseTokens):
        def rows(self, x):
            return dense

    made.keep_dense_bias(torch.randn(40))
    made.tokens = Tokens()
    torch.testing.assert_close(made(x).double(), expected(made, x, dense), rtol=1e-4, atol=1e-4)


def put_weight(made):
    made.weight = nn.Parameter(made.weight.flip(0), requires_grad=False)


def write_weight(made):
    made.weight.copy_(made.weight.flip(0))


def move_scale(made):
    made.weight_scale.data = 2 * made.weight_scale


@pytest.mark.parametrize("shared", [False, True], ids=["alone", "shared"])
@pytest.mark.parametrize("change", [put_weight, write_weight, move_scale], ids=lambda change: change.__name__)
def test_codes_are_those_that_the_host_has_now(change, shared):
    block, x = nn.ModuleDict({name: layer() for name in "qk"}), torch.randn(1, 48)
    if shared:
        share_calls(block)
    with torch.no_grad():
        for _ in range(3):
            before = [made(x) for made in block.values()]
        change(block["k"])
        for _ in range(3):
            y = [made(x) for made in block.values()]
            assert torch.equal(y[0], before[0]) and not torch.equal(y[1], before[1])
            torch.testing.assert_close(y[1].double(), expected(block["k"], x), rtol=1e-4, atol=1e-4)


def test_a_layer_that_first_ran_in_inference_mode_can_be_trained_through():
    made, x = layer(), torch.randn(12, 48, requires_grad=True)
    with torch.inference_mode():
        made(x)
    made(x).sum().backward()
    assert x.grad.abs().sum() > 0


def test_its_state_is_that_of_the_host_with_the_mask_beside_it():
    host = Host()
    names = set(host.state_dict())
    made = SparseQuantizedLinear(host)
    made.spon_threshold = torch.tensor([0.25])
    assert set(made.state_dict()) == names | {"spon_threshold"}
    other = SparseQuantizedLinear(Host())
    other.host.weight.data.zero_()
    assert other.row_weight.codes.eq(0).all()
    other.load_state_dict(made.state_dict())
    x = torch.randn(2, 48)
    assert torch.equal(other(x), made(x))


def test_copies_and_casts_keep_the_mask():
    made, x = layer(), torch.randn(1, 48)
    twin = copy.deepcopy(made)
    twin.bias.data.zero_()
    assert made.bias.abs().sum() > 0 and twin.host.bias.abs().sum() == 0, "a copy has tensors of its own"
    half = made.to(torch.bfloat16)
    assert half.spon_threshold.dtype == torch.float32 and half.weight.dtype == torch.int8
    assert half(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("exact", [False, True], ids=["rounded inputs", "exact"])
def test_exact_reaches_the_kernel(monkeypatch, exact):
    seen = []
    monkeypatch.setattr(
        "spon_plugin.layers.sparse_quantized.sparse_linear", lambda x, *_, exact: seen.append(exact) or x[..., :40]
    )
    made = layer()
    made.exact = exact
    made(torch.randn(1, 48))
    assert seen == [exact]


@pytest.fixture
def choices(monkeypatch):
    """Grows with every choice of a kernel, that is, whenever a call was not one that is known."""
    if not cpu.is_available():
        pytest.skip("the CPU kernel needs Numba and the calls of GNU's OpenMP")
    made = []
    monkeypatch.setattr(row_op, "choose", lambda problem: made.append(1) or table.choose(problem))
    return made


def by_the_kernel(made, x):
    bias = made.bias if made.bias is None or made.bias.dtype in (torch.float32, x.dtype) else made.bias.float()
    return scaled.sparse_linear(x, made.row_weight, made.spon_threshold, bias)


CHANGES = {
    "none": lambda made: None,
    "another bias": lambda made: setattr(made, "bias", nn.Parameter(torch.randn(40), requires_grad=False)),
    "no bias": lambda made: setattr(made, "bias", None),
    "a bias moved": lambda made: setattr(made.bias, "data", torch.randn(40)),
    "another threshold": lambda made: setattr(made, "spon_threshold", torch.tensor([0.1])),
    "by channel": lambda made: setattr(made, "spon_threshold", torch.rand(48)),
    "filled": lambda made: made.spon_threshold.fill_(0.1),
    "loaded": lambda made: made.load_state_dict({**made.state_dict(), "weight": made.weight.flip(0).clone()}),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_known_call_is_made_with_what_the_layer_holds(choices, change):
    for x in (torch.randn(1, 1, 48), torch.randn(2, 96)[:, ::2], torch.randn(8, 48).bfloat16()):
        made = layer()
        made(x)
        change(made)
        assert torch.equal(made(x), by_the_kernel(made, x))
        choices.clear()
        assert torch.equal(made(x), by_the_kernel(made, x)) and not choices


@pytest.mark.parametrize(
    "x", [torch.randn(9, 48), torch.randn(0, 48), torch.randn(1, 48).double()], ids=["many", "none", "float64"]
)
def test_other_inputs_are_looked_at(choices, x):
    made = layer()
    made(torch.randn(1, 48))
    choices.clear()
    assert made(x).shape == (*x.shape[:-1], 40) and choices


def test_wrong_arguments_are_refused_after_right_ones(choices):
    made, x = layer(), torch.randn(1, 48)
    made(x)
    weight = made.row_weight
    for wrong in ({"x": torch.randn(1, 47)}, {"threshold": torch.rand(3)}, {"bias": torch.randn(39)}):
        with pytest.raises(SponError, match=f"{next(iter(wrong))}: "):
            sparse_linear(**{"x": x, "weight_t": weight, "threshold": made.spon_threshold, "bias": made.bias, **wrong})
    with pytest.raises(SponError, match="bias: "):
        sparse_linear(x, weight, made.spon_threshold, made.bias.half())


def test_calls_are_forgotten_with_the_weight(choices):
    made = layer()
    made(torch.randn(1, 48))
    before = len(known_calls._known)
    del made
    assert len(known_calls._known) == before - 1


def test_a_copy_is_another_call():
    made, x = layer(), torch.randn(1, 48)
    made(x)
    other = copy.deepcopy(made)
    other.bias.data.zero_()
    assert torch.equal(other(x), by_the_kernel(other, x)) and not torch.equal(made(x), other(x))


def test_other_weights_are_refused():
    with pytest.raises(SponError, match="codes by input rows"):
        SparseQuantizedLinear(nn.Linear(4, 4)).row_weight  # noqa: B018
    with pytest.raises(SponError, match="linear layer"):
        SparseQuantizedLinear(nn.LayerNorm(4))
