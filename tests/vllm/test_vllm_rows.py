# SPDX-License-Identifier: Apache-2.0
"""Layers of quantized bases, made by vLLM's own methods, on our kernels: their formats, ways, reloads and reports."""

import logging
from types import SimpleNamespace

import pytest
import torch
from layers import load, make_layer, one_process
from quantized import FORMATS, int8
from torch import nn

from spon_plugin import Mask, SponError
from spon_plugin.adapter.merged import Announced
from spon_plugin.kernels import row_op
from spon_plugin.kernels.few_rows import CPU_ROWS
from spon_vllm import hosts
from spon_vllm.settings import AUTO, BESIDE, ROWS
from spon_vllm.stored import stored_weight

IN, SIZES = 128, [64, 32]


@pytest.fixture(scope="module", autouse=True)
def alone(tmp_path_factory):
    with one_process(tmp_path_factory.mktemp("group")):
        yield


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def masks_of(kind):
    alphas = [0.1 * random(IN, seed=seed) for seed in (1, 2)]
    same, other = torch.tensor([0.5]), torch.tensor([0.9])
    center = 0.3 * random(IN, seed=3)
    return {
        "one mask": [Mask(same, alpha=alpha) for alpha in alphas],
        "two masks": [Mask(same, alpha=alphas[0]), Mask(other, alpha=alphas[1])],
        "by channel, centered": [
            Mask(random(IN, seed=s).abs(), center, a) for s, a in zip((4, 5), alphas, strict=True)
        ],
    }[kind]


def expected(x, meant, masks, bias=None):
    """``W S(x) + b + W alpha`` of each linear, in float64, and the dense model's."""
    x, sparse, dense = x.double(), [], []
    for weight, mask in zip(meant, masks, strict=True):
        weight, center = weight.double(), 0 if mask.center is None else mask.center.double()
        kept = torch.where((x - center).abs() > mask.threshold.double(), x, center)
        sparse.append((kept + mask.alpha.double()) @ weight.t())
        dense.append(x @ weight.t())
    own = 0 if bias is None else bias.double()
    return torch.cat(sparse, 1) + own, torch.cat(dense, 1) + own


def make(name, masks, weights=ROWS, bias=None, seed=0, dtype=torch.float32, **settings):
    """A fused layer of a format, filled, and the weights that its codes mean."""
    kind = FORMATS[name]
    tensors, meant = kind.tensors(seed, SIZES, IN, dtype)
    model = make_layer(SIZES, IN, masks, bias is not None, kind.config(), dtype, weights=weights, **settings)
    load(model.l, **tensors, **({} if bias is None else {"bias": list(bias.split(SIZES))}))
    return model, meant


def finish(model):
    model.l.quant_method.process_weights_after_loading(model.l)
    return model.l


def close(y, wanted, rounded):
    """Four bits and few rows: inputs are rounded to eight bits, which moves an output by 0.5% of its usual size."""
    bound = 0.03 * wanted.std() if rounded else 2e-4
    assert (y.double() - wanted).abs().max() < bound, ((y.double() - wanted).abs().max(), bound)


@pytest.mark.parametrize("kind", ["one mask", "two masks", "by channel, centered"])
@pytest.mark.parametrize("name", FORMATS)
def test_rows_are_the_sparse_layer(name, kind):
    masks, bias = masks_of(kind), random(sum(SIZES), seed=8)
    model, meant = make(name, masks, bias=bias, token_mode="decode", max_sparse_tokens=CPU_ROWS)
    layer = finish(model)
    assert layer.quant_method.weights == ROWS and layer.spon_host is None
    assert (layer.quant_method.shard_sizes is None) == (kind == "one mask")
    held = [p for n, p in layer.named_parameters() if n not in ("bias", "weight_shape") and "spon_" not in n]
    assert held and all(parameter.numel() == 0 for parameter in held)  # one copy
    int4 = layer.quant_method.layout.format == "int4"
    one, many = random(1, IN, seed=7), random(CPU_ROWS + 4, IN, seed=7)
    close(layer(one)[0], expected(one, meant, masks, bias)[0], int4)
    close(layer(many)[0], expected(many, meant, masks, bias)[1], False)  # a dense step
    model, _ = make(name, masks, bias=bias, token_mode="all")
    close(finish(model)(many)[0], expected(many, meant, masks, bias)[0], False)


@pytest.mark.parametrize("name", ["compressed-tensors int4", "AWQ"])
def test_four_bits_are_multiplied_by_inputs_as_they_are_on_request(name):
    model, meant = make(name, masks := masks_of("two masks"), token_mode="all", exact=True)
    layer, x = finish(model), random(2, IN, seed=7)
    close(layer(x)[0], expected(x, meant, masks)[0], False)


@pytest.mark.parametrize("tokens", [1, CPU_ROWS - 1], ids=["sparse", "dense"])
def test_the_kernel_of_a_step_is_chosen_once(tokens, monkeypatch):
    layer = finish(make("AWQ", masks_of("one mask"), token_mode="decode", max_sparse_tokens=1)[0])
    chosen, choose = [], row_op.choose
    monkeypatch.setattr(row_op, "choose", lambda problem: chosen.append(1) or choose(problem))
    with torch.inference_mode():
        for seed in range(3):
            layer(random(tokens, IN, seed=seed))
    assert len(chosen) == 1


def test_inputs_that_are_skipped_are_not_read():
    model, meant = make("FP8 by output", masks := masks_of("one mask"), token_mode="all")
    layer, x = finish(model), random(1, IN, seed=7)
    layer.spon_codes.data.view(torch.uint8)[x[0].abs() <= masks[0].threshold] = 0x7F  # NaN
    close(layer(x)[0], expected(x, meant, masks)[0], False)


@pytest.mark.parametrize("tokens", [1, CPU_ROWS + 4])
@pytest.mark.parametrize("mode", ["decode", "all"])
@pytest.mark.parametrize("kind", ["one mask", "two masks"])
def test_beside_the_base_s_own_method_runs_large_steps(tokens, mode, kind, monkeypatch):
    masks = masks_of(kind)
    model, meant = make("int8 and inputs in 8 bits", masks, AUTO, dtype=torch.bfloat16, token_mode=mode)
    layer = finish(model)
    method, extra = layer.quant_method, 4 * (layer.spon_bias.numel() + layer.spon_threshold.numel())
    assert method.weights == BESIDE
    assert method.coverage.extra_bytes == extra + sum(SIZES) * (IN + 4)
    assert "1 layers of int8 in rows beside the base's own" in method.coverage.line(method.settings)
    calls, apply = [], layer.quant_method.inner.apply
    monkeypatch.setattr(layer.quant_method.inner, "apply", lambda *a: (calls.append(a[1].shape[0]), apply(*a))[1])
    x = random(tokens, IN, seed=7).bfloat16()
    sparse, dense = expected(x, meant, masks)
    wanted = sparse if tokens == 1 or mode == "all" else dense
    y = layer(x)[0].double()
    assert (y - wanted).norm() < 0.02 * wanted.norm()
    own = tokens > 1 and (mode == "decode" or kind == "one mask")  # several masks: once, by rows
    assert calls == [tokens] * own


@pytest.mark.parametrize("runs", [True, False], ids=["beside", "rows"])
@pytest.mark.parametrize("tokens", [1, CPU_ROWS + 4], ids=["sparse", "dense"])
def test_a_method_that_repacks_the_bias(tokens, runs, monkeypatch):
    """As Marlin does; what it makes of the bias is for its own product."""
    masks, bias = masks_of("one mask"), random(sum(SIZES), seed=8).bfloat16()
    name = "int8 and inputs in 8 bits"
    model, meant = make(name, masks, AUTO, bias, dtype=torch.bfloat16, token_mode="decode", max_sparse_tokens=1)
    inner = model.l.quant_method.inner
    process, apply = inner.process_weights_after_loading, inner.apply

    def repack(layer):
        process(layer)
        layer.bias.data = layer.bias.data.flip(0)

    monkeypatch.setattr(inner, "process_weights_after_loading", repack)
    monkeypatch.setattr(inner, "apply", lambda layer, x, b=None: apply(layer, x, b if b is None else b.flip(0)))
    if not runs:
        monkeypatch.setattr(hosts, "why_not", lambda *_: "AttributeError: no such operator")
    layer, x = finish(model), random(tokens, IN, seed=7).bfloat16()
    assert layer.quant_method.weights == (BESIDE if runs else ROWS)
    wanted = expected(x, meant, masks, bias)[tokens > 1]
    assert (layer(x)[0].double() - wanted).norm() < 0.02 * wanted.norm()


@pytest.mark.parametrize("tokens", [1, CPU_ROWS + 4], ids=["sparse", "dense"])
def test_a_method_that_copies_the_bias_copies_the_dense_one(tokens, monkeypatch):
    """As vLLM's int8 product on Xeons with AMX does, of a merged checkpoint, too."""
    masks, dense_bias = masks_of("one mask"), random(sum(SIZES), seed=8).bfloat16()
    announced = [Announced(float(mask.threshold)) for mask in masks]
    name, settings = "int8 and inputs in 8 bits", {"token_mode": "decode", "max_sparse_tokens": 1}
    names = {"m.shard0": announced[0], "m.shard1": announced[1]}
    model, meant = make(
        name, announced, AUTO, dtype=torch.bfloat16, adapter=None, announced=names, has_dense_bias=True, **settings
    )
    layer = model.l
    folded = torch.cat([w.double() @ m.alpha.double() for w, m in zip(meant, masks, strict=True)]) + dense_bias.double()
    load(layer, spon_dense_bias=list(dense_bias.split(SIZES)), bias=list(folded.bfloat16().split(SIZES)))
    inner = layer.quant_method.inner
    process, apply, copied = inner.process_weights_after_loading, inner.apply, []
    monkeypatch.setattr(
        inner, "process_weights_after_loading", lambda layer: (copied.append(layer.bias.data.clone()), process(layer))
    )
    monkeypatch.setattr(inner, "apply", lambda layer, x, b=None: apply(layer, x, b if b is None else copied[0]))
    layer, x = finish(model), random(tokens, IN, seed=7).bfloat16()
    assert layer.quant_method.weights == BESIDE and torch.equal(copied[0], dense_bias)
    wanted = expected(x, meant, masks, dense_bias)[tokens > 1]
    assert (layer(x)[0].double() - wanted).norm() < 0.02 * wanted.norm()


def test_a_weight_between_transforms_is_left_to_its_method():
    """QuIP's and SpinQuant's: codes alone say nothing of the layer."""
    model, _ = make("int8 and inputs in 8 bits", masks_of("one mask"), AUTO, dtype=torch.bfloat16)
    layer, method = model.l, model.l.quant_method
    assert stored_weight(layer, SIZES, IN, method.inner) is not None
    for name in ("input_tfms", "output_tfms"):
        assert stored_weight(layer, SIZES, IN, SimpleNamespace(**{name: {0: "a rotation"}})) is None


def test_groups_of_gptq_are_in_order_where_it_says_so():
    """A rank's slice of `g_idx` has the numbers of the whole layer's groups, its scales are its own."""
    model, _ = make("GPTQ", masks_of("one mask"))
    layer, method = model.l, model.l.quant_method
    layer.g_idx = nn.Parameter(4 + torch.arange(IN, dtype=torch.int32) // 32, requires_grad=False)
    for acts, ordered in ((False, False), (True, True)):
        config = SimpleNamespace(**{**vars(method.inner.quant_config), "desc_act": acts})
        weight = stored_weight(layer, SIZES, IN, SimpleNamespace(quant_config=config))
        assert (weight.group_of_row is not None) == ordered


def test_without_a_method_that_runs_there_are_rows(monkeypatch):
    """As on a CPU whose build of vLLM lacks the operator of a kernel that it has chosen."""
    monkeypatch.setattr(hosts, "why_not", lambda *_: "AttributeError: no such operator")
    texts, handler = [], logging.Handler()
    handler.emit = lambda record: texts.append(record.getMessage())
    monkeypatch.setattr(logging.getLogger("vllm.spon"), "handlers", [handler])
    masks = masks_of("one mask")
    model, meant = make("int8 and inputs in 8 bits", masks, AUTO, dtype=torch.bfloat16)
    layer, x = finish(model), random(1, IN, seed=7).bfloat16()
    assert layer.quant_method.weights == ROWS and layer.spon_host is None
    wanted = expected(x, meant, masks)[0]
    assert (layer(x)[0].double() - wanted).norm() < 0.02 * wanted.norm()
    warnings = [text for text in texts if "cannot run here" in text]
    assert len(warnings) == 1 and "CompressedTensorsLinearMethod (AttributeError: no such operator)" in warnings[0]
    method = layer.quant_method
    assert "weights: 1 layers of int8 in rows, one copy" in method.coverage.line(method.settings)


def test_a_method_that_does_not_take_this_dtype_computes_nothing_in_it():
    model, meant = make("AWQ", masks := masks_of("one mask"), AUTO, dtype=torch.float32)
    layer, x = finish(model), random(CPU_ROWS + 4, IN, seed=7)
    assert layer.quant_method.weights == ROWS and "not torch.float32" in layer.quant_method.coverage.fallback
    close(layer(x)[0], expected(x, meant, masks)[0], False)
    with pytest.raises(SponError, match="--dtype.*m.other in torch.float32.*not torch.float32"):
        layer.quant_config.get_quant_method(layer, "m.other")  # the adapter does not name it
    assert hosts.dtype_objection(layer.quant_config.inner, layer.quant_method.inner, torch.bfloat16) == ""


def test_a_method_is_tried():
    class Broken:
        def apply(self, layer, x, bias):
            return torch.ops._C.there_is_no_such_operator(x)

    layer = finish(make("int8 and inputs in 8 bits", masks_of("one mask"), AUTO, dtype=torch.bfloat16)[0])
    assert "there_is_no_such_operator" in hosts.why_not(Broken(), layer, IN)
    assert hosts.why_not(layer.quant_method.inner, layer, IN) == ""


@pytest.mark.parametrize("sizes", [SIZES, [3072, 1024]], ids=["narrow", "rows of half a page"])
@pytest.mark.parametrize("name", ["compressed-tensors int4", "AWQ"])
def test_weights_that_are_loaded_again_are_served(name, sizes):
    from vllm.model_executor.model_loader.reload.layerwise import (
        finalize_layerwise_reload,
        initialize_layerwise_reload,
        record_metadata_for_reloading,
    )

    masks, x = masks_of("two masks"), random(CPU_ROWS + 4, IN, seed=7)
    model = make_layer(sizes, IN, masks, False, FORMATS[name].config(), weights=ROWS)
    record_metadata_for_reloading(model)
    places = []
    for seed in (0, 1):
        tensors, meant = FORMATS[name].tensors(seed, sizes, IN, torch.float32)
        if seed:
            initialize_layerwise_reload(model)
        load(model.l, **tensors)
        if seed:
            finalize_layerwise_reload(model, None)
        else:
            finish(model)
        close(model.l(x)[0], expected(x, meant, masks)[0], False)
        assert model.l.spon_codes.stride(0) == sum(sizes) // 2 + 64 * (sizes != SIZES)
        places.append({name: parameter.data_ptr() for name, parameter in model.l.named_parameters()})
    assert places[0] == places[1]  # graphs hold them


def test_weights_of_another_kind_are_refused():
    model, _ = make("AWQ", masks_of("one mask"))
    layer = finish(model)
    layer.quant_method.layout = layer.quant_method.layout._replace(parts=("codes", "scales"))
    model, _ = make("AWQ", masks_of("one mask"))
    model.l.quant_method.layout = layer.quant_method.layout
    with pytest.raises(SponError, match="with codes, scales, zeros'.*start the server anew"):
        finish(model)
    # Without zero points in the place of some: those that stand for none.
    wanted = model.l.quant_method.layout._replace(parts=("codes", "scales", "zeros", "group_of_row"))
    model, meant = make("compressed-tensors int4", masks := masks_of("one mask"))
    model.l.quant_method.layout, model.l.quant_method.weights = wanted, ROWS
    layer, x = finish(model), random(CPU_ROWS + 4, IN, seed=7)
    assert layer.spon_zeros is not None and layer.spon_group_of_row is not None
    close(layer(x)[0], expected(x, meant, masks)[0], False)


def test_a_compiler_sees_one_operator():
    model, meant = make("int8 and inputs in 8 bits", masks := masks_of("one mask"), AUTO, dtype=torch.bfloat16)
    layer = finish(model)
    torch._dynamo.reset()
    graphs = []

    def backend(graph, _inputs):
        graphs.append([str(node.target) for node in graph.graph.nodes if node.op == "call_function"])
        return graph.forward

    compiled = torch.compile(lambda x: layer.quant_method.apply(layer, x, None), backend=backend, dynamic=True)
    for tokens in (3, 1):
        x = random(tokens, IN, seed=7).bfloat16()
        wanted = expected(x, meant, masks)[0]
        assert (compiled(x).double() - wanted).norm() < 0.02 * wanted.norm()
    assert all(graph == ["spon_vllm.linear_rows"] for graph in graphs), graphs
    codes, scales = int8(random(sum(SIZES), IN))
    arguments = (codes.t().contiguous(), scales.t().contiguous(), None, None, IN, "int8", None)
    rest = (torch.tensor([0.5]), torch.zeros(sum(SIZES)), None, None, -1)
    torch.library.opcheck(torch.ops.spon_vllm.linear_rows.default, (random(2, IN), *arguments, *rest))
