# SPDX-License-Identifier: Apache-2.0
"""`SponLinearMethod`: how one of vLLM's linear layers is made, filled and computed sparsely.

It wraps an inner method and does not subclass vLLM's `UnquantizedLinearMethod`: vLLM asks for that class by
`isinstance` and then goes past `apply`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config.vllm import get_current_vllm_config_or_none
from vllm.distributed import get_pp_group, get_tensor_model_parallel_rank
from vllm.model_executor.layers.linear import (
    WEIGHT_LOADER_V2_SUPPORTED,
    LinearMethodBase,
    UnquantizedLinearMethod,
    register_weight_loader_v2_supported_method,
)

import spon_vllm.ops  # noqa: F401 (registers torch.ops.spon_vllm)
from spon_plugin.adapter.mask import Mask
from spon_plugin.adapter.merged import Announced
from spon_plugin.errors import SponError
from spon_plugin.weights import RowWeight
from spon_plugin.weights.scaled import ScaledWeight
from spon_vllm import hosts, merged, rows, steps
from spon_vllm.fold import ask, product
from spon_vllm.report import Coverage
from spon_vllm.settings import BESIDE, ROWS, Settings
from spon_vllm.stored import stored_weight


@register_weight_loader_v2_supported_method
class SponLinearMethod(LinearMethodBase):
    """``y = W S(x) + b + W alpha``, around the method that holds `W`.

    It is computed as ``y = W (S(x) - center) + [b + W (center + alpha)]``.

    Args:
        inner: vLLM's method for the layer without SPON.
        paths: of the linears in the layer, as vLLM names them.
        masks: of each of them; of a merged checkpoint, what its config says of them.
        settings: what is served.
        coverage: told about the layer.
    """

    def __init__(
        self,
        inner: Any,
        paths: Sequence[str],
        masks: Sequence[Mask | Announced],
        settings: Settings,
        coverage: Coverage,
    ) -> None:
        self.inner, self.paths = inner, list(paths)
        self.announced = [mask for mask in masks if isinstance(mask, Announced)]
        self.masks = [mask for mask in masks if isinstance(mask, Mask)]  # a merged checkpoint's are not loaded yet
        self.settings, self.coverage = settings, coverage
        self.plain = isinstance(inner, UnquantizedLinearMethod)
        self.weights = ""  # `ROWS` or `BESIDE` where our kernels read a quantized weight
        self.layout: rows.Layout | None = None
        self.no_kernel: Exception | None = None
        self.host: Tensor | None = None
        self.shard_sizes: list[int] | None = None
        coverage.add(paths)

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Make the inner method's parameters, and those that a merged checkpoint fills.

        Raises:
            SponError: the layer fuses other linears than the adapter knows, or a vector has another length than the
                layer's input.
        """
        self._check(input_size, output_partition_sizes)
        self.sizes, self.in_part, self.in_full = list(output_partition_sizes), input_size_per_partition, input_size
        steps.configure(get_current_vllm_config_or_none())
        attributes = dict(extra_weight_attrs)
        if not self.plain and type(self.inner).__name__ not in WEIGHT_LOADER_V2_SUPPORTED:
            attributes["weight_loader"] = layer.weight_loader  # vLLM chose one by the name of this class
        partitions = (input_size_per_partition, output_partition_sizes, input_size, output_size)
        try:
            self.inner.create_weights(layer, *partitions, params_dtype, **attributes)
        except (ValueError, NotImplementedError) as error:
            if self.plain:
                raise
            with hosts.without_kernels(self.inner, layer):
                self.inner.create_weights(layer, *partitions, params_dtype, **attributes)
            self.no_kernel = error
        reason = hosts.dtype_objection(getattr(layer.quant_config, "inner", None), self.inner, params_dtype)
        if reason:
            self.no_kernel = ValueError(reason)
        # A layer before this one must not quantize for the inner method what is to be masked first (vLLM 0.32).
        layer.requires_unquantized_input = True
        if self.plain:
            layer.weight.data[:, 0] = torch.nan  # stays where the checkpoint has no such tensor
        if self.settings.merged:
            dense = self.settings.has_dense_bias
            loader = extra_weight_attrs["weight_loader"]
            merged.expect_tensors(layer, self.announced, self.sizes, input_size, params_dtype, dense, loader)

    def _check(self, input_size: int, output_partition_sizes: Sequence[int]) -> None:
        if len(self.paths) not in (1, len(output_partition_sizes)):
            raise SponError.of(
                self.paths[0], f"{len(self.paths)} linears", f"a layer of {len(output_partition_sizes)} in vLLM",
                "This layer is not supported; leave these linears out of target_modules.",
            )  # fmt: skip
        for path, mask in zip(self.paths, self.masks, strict=not self.settings.merged):
            mask.check_input(path, input_size, "the layer in vLLM", "The adapter was made for another model.")

    @torch.no_grad()
    def process_weights_after_loading(self, layer: Any) -> None:
        """Fold alpha into the bias and lay the weight out for the kernels, on the rank's own part."""
        if getattr(layer, "_use_min_latency_gemm", False):
            layer._use_min_latency_gemm = False  # DeepSeek V3 on Hopper: a kernel of its own would go past `apply`
        if self.plain:
            self._check_loaded(layer)
        masks = self.masks
        if self.settings.merged:
            masks = merged.take_masks(layer, self.paths, self.announced, self.in_full)
        # vLLM adds a row-parallel layer's bias on one rank, and none where the model adds it itself.
        row_parallel = self.in_part != self.in_full or hasattr(layer, "input_is_parallel")
        adds_bias = layer.bias is not None and not layer.skip_bias_add and not (row_parallel and layer.tp_rank > 0)
        weight, total = stored_weight(layer, self.sizes, self.in_part, self.inner), None
        # Biases, too, are read before the inner method repacks them, and it gets the dense one.
        if self.settings.merged:
            total = merged.take_bias(layer, adds_bias, row_parallel, self.settings.has_dense_bias)
        elif weight is not None:
            total = self._fold(layer, weight)
        bias = layer.bias.data.to(torch.float32, copy=True) if adds_bias else None
        if self.plain:
            # One copy, [in, out] in memory and [out, in] to everything that asks; the parameter keeps its loader.
            layer.weight.data = layer.weight.data.t().contiguous().t()
            if getattr(layer.weight, "_vllm_is_uva_offloaded", False):
                del layer.weight._vllm_is_uva_offloaded  # --cpu-offload-gb: the new data is to go to the host, too
        elif isinstance(weight, ScaledWeight):
            self._hold_rows(layer, weight.arranged())
        elif self.no_kernel is not None:
            raise SponError.of(
                self.paths[0], f"{type(self.inner).__name__} in {layer.params_dtype}: {hosts.said(self.no_kernel)}",
                "a weight that our kernels read, or one that its own method computes here",
                "Serve in another --dtype, or the base in another format.",
            ) from self.no_kernel  # fmt: skip
        else:
            self._prepare_inner(layer)
        thresholds, center = self._own_masks(layer, masks)
        if total is None:
            total = self._fold(layer, None)
        # A merged checkpoint's bias has the dense one in it. Where neither kernel is ours, the inner method adds that.
        ours = self.plain or bool(self.weights)
        if bias is not None and ours != self.settings.merged:
            total += bias if ours else -bias
        # Parameters, not buffers: when weights are loaded again, vLLM runs this method and copies what it made into the
        # tensors that graphs hold, except for buffers that no checkpoint stores.
        for name, vector in (("threshold", thresholds), ("center", center), ("bias", total)):
            own = None if vector is None else nn.Parameter(vector.to(total.device).contiguous(), requires_grad=False)
            layer.register_parameter(f"spon_{name}", own)
        self.coverage.finish(
            layer,
            4 * (total.numel() + thresholds.numel() + (0 if center is None else center.numel())),
            layer.quant_config,
            get_tensor_model_parallel_rank() == 0,
            get_pp_group().world_size == 1,
        )

    def _prepare_inner(self, layer: Any) -> None:
        self.inner.process_weights_after_loading(layer)
        if hasattr(layer, "_input_quant_key"):
            del layer._input_quant_key  # as `requires_unquantized_input`, before vLLM 0.32

    def _hold_rows(self, layer: Any, weight: ScaledWeight) -> None:
        """Put the weight by rows into the layer, beside the inner method's or in its place."""
        again = self.layout is not None
        if self.layout is None:
            self.weights = ROWS if self.no_kernel or self.settings.weights == ROWS else BESIDE
            self.layout = rows.Layout.of(weight)
        rows.hold(layer, rows.in_layout(weight, self.layout, self.paths[0]))
        reason = "" if self.no_kernel is None else hosts.said(self.no_kernel)
        if self.weights == BESIDE:
            bias = None if layer.bias is None else layer.bias.data.clone()
            self._prepare_inner(layer)
            if not again:
                reason = hosts.why_not(self.inner, layer, self.in_part)
                self.weights = ROWS if reason else BESIDE
                self.host = None if reason else hosts.number(layer)
            if self.weights == ROWS and bias is not None:
                layer.bias.data = bias  # as our kernels add it
        if self.weights == ROWS:
            rows.release(layer)
        layer.register_buffer("spon_host", self.host, persistent=False)
        if not again:
            layer.spon_own_rows = hosts.few_rows(weight.codes.device)
            kernel = rows.kernel_of(weight, layer.params_dtype)
            self.coverage.hold(self.weights, weight.format, kernel, rows.held_bytes(layer), type(self.inner), reason)

    def _check_loaded(self, layer: Any) -> None:
        """Check that every linear's weight has been loaded: vLLM itself does not, under ``--quantization``.

        Raises:
            SponError: the checkpoint has no such weight, or a broken one.
        """
        missing = torch.isnan(layer.weight.data[:, 0])
        if bool(missing.any()):
            ends = torch.tensor(self.sizes if len(self.paths) > 1 else [sum(self.sizes)]).cumsum(0)
            index = int((ends <= int(missing.nonzero()[0])).sum())
            raise SponError.of(
                f"{self.paths[index]}.weight", "no such tensor, or NaN", "one in the checkpoint",
                "The checkpoint is incomplete or damaged; copy or make it again.",
            )  # fmt: skip

    def _own_masks(self, layer: Any, masks: Sequence[Mask]) -> tuple[Tensor, Tensor | None]:
        """This rank's thresholds, as `ops.linear` takes them, and its part of the centre."""
        thresholds = [mask.threshold for mask in masks]
        if all(threshold.numel() == 1 for threshold in thresholds):
            own = torch.cat([threshold.reshape(1) for threshold in thresholds])
        else:
            own = torch.stack([self._own_part(layer, threshold.expand(self.in_full)) for threshold in thresholds])
        if bool((own == own[0]).all()):
            own = own[:1]
        else:
            self.shard_sizes = self.sizes
        center = masks[0].center
        return own, None if center is None else self._own_part(layer, center)

    def _own_part(self, layer: Any, vector: Tensor) -> Tensor:
        """This rank's part of a vector over the inputs of the whole layer."""
        first = layer.tp_rank * self.in_part if self.in_part != self.in_full else 0
        return vector[first : first + self.in_part].contiguous()

    def _fold(self, layer: Any, weight: RowWeight | None) -> Tensor:
        """``W (center + alpha)`` of this rank's inputs, float32 ``[out_features]``; the all-reduce adds them up.

        Args:
            layer: vLLM's.
            weight: as stored; None where it cannot be read, and the inner method is asked.
        """
        parts = []
        for index, mask in enumerate(self.masks):
            start = sum(self.sizes[:index])
            size = self.sizes[index] if len(self.masks) > 1 else sum(self.sizes)
            constant = mask.constant
            if constant is None:
                parts.append(torch.zeros(size, dtype=torch.float32, device=_device(layer)))
                continue
            alpha = self._own_part(layer, constant).to(_device(layer))
            if weight is not None:
                parts.append(product(weight, alpha, start, start + size))
            else:
                parts.append(ask(self.inner, layer, alpha, sum(self.sizes), self.paths[index])[start : start + size])
        return torch.cat(parts)

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Compute the layer.

        Args:
            layer: vLLM's.
            x: ``[tokens, in_features of this rank]``.
            bias: the dense model's, where this rank adds it.

        Returns:
            ``[tokens, out_features of this rank]`` in `x.dtype`.
        """
        return self.step(layer, x, bias, self.settings.limit)

    def step(self, layer: Any, x: Tensor, bias: Tensor | None, limit: int) -> Tensor:
        """`apply` with a limit of its own, see `ops.runs_sparse`."""
        threshold, folded = layer.spon_threshold, layer.spon_bias
        center, sizes = layer.spon_center, self.shard_sizes
        if self.plain:
            return torch.ops.spon_vllm.linear(x, layer.weight, threshold, folded, bias, sizes, limit, center)
        if self.layout is not None:
            parts = (layer.spon_codes, layer.spon_scales, layer.spon_zeros, layer.spon_group_of_row)
            way = (self.layout.group_size, self.layout.format, layer.spon_host)
            exact = self.settings.exact
            return torch.ops.spon_vllm.linear_rows(
                x, *parts, *way, threshold, folded, bias, sizes, limit, center, exact
            )
        if self.shard_sizes is None:
            y = self.inner.apply(layer, torch.ops.spon_vllm.mask(x, threshold, limit, center), bias)
        else:
            # A packed weight cannot be cut, so each mask runs the whole layer: right, and as slow as it sounds.
            outputs = []
            for index, size in enumerate(self.sizes):
                masked = torch.ops.spon_vllm.mask(x, threshold[index : index + 1], limit, center)
                whole = self.inner.apply(layer, masked, bias)
                outputs.append(whole.narrow(-1, sum(self.sizes[:index]), size))
            y = torch.cat(outputs, dim=-1)
        return torch.ops.spon_vllm.add_bias(y, folded, limit)


def _device(layer: Any) -> torch.device:
    """Where the layer computes."""
    tensor = next(layer.parameters(), None)
    return tensor.device if tensor is not None else torch.device("cpu")
