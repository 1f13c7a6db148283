# SPDX-License-Identifier: Apache-2.0
"""What a server is asked to serve: where the masks come from, and which tokens they apply to.

Everything is read and checked in the process that makes vLLM's configuration, before a worker starts, and goes to the
workers as the JSON object that `Settings.as_config` makes.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any

from spon_plugin.adapter.directory import read_adapter
from spon_plugin.adapter.merged import (
    BASE_QUANTIZATION,
    DIGEST,
    FIELD,
    HEAD,
    HEADS,
    MASK_FIELDS,
    QUANT_METHOD,
    Announced,
    MergedConfig,
)
from spon_plugin.errors import SponError
from spon_plugin.kernels.few_rows import row_limit
from spon_plugin.masking import TOKEN_MODES

ADAPTER_VARIABLE = "SPON_ADAPTER"
TOKEN_MODE_VARIABLE = "SPON_TOKEN_MODE"
MAX_SPARSE_TOKENS_VARIABLE = "SPON_MAX_SPARSE_TOKENS"
WEIGHTS_VARIABLE = "SPON_WEIGHTS"
EXACT_VARIABLE = "SPON_EXACT"
HEAD_VARIABLE = "SPON_HEAD"

DEFAULT_TOKEN_MODE = "decode"
AUTO, ROWS, BESIDE = "auto", "rows", "beside"
"""How a quantized weight is held: see `Settings.weights`."""
FLOAT_HEAD = "none"
"""The output head as the base has it, as `spon merge --head` calls it."""
EVERY_STEP, NO_STEP, MEASURED = -1, 0, -2
"""Limits that are no number of tokens: every step is sparse, as in mode ``all``; none is; `steps.measured` says it."""

_NAME_IT = (
    "Name one: vllm serve ADAPTER_DIR, or vllm serve BASE --quantization spon --hf-overrides "
    '\'{"quantization_config": {"quant_method": "spon", "adapter": "ADAPTER_DIR"}}\', or SPON_ADAPTER=ADAPTER_DIR, '
    "or serve a checkpoint that `spon merge` wrote."
)
_KNOWN = (
    "quant_method",
    "adapter",
    DIGEST,
    "token_mode",
    "max_sparse_tokens",
    "weights",
    "exact",
    BASE_QUANTIZATION,
    HEAD,
)

_served_adapter: ContextVar[str | None] = ContextVar("spon_served_adapter", default=None)


@contextmanager
def serving_adapter(adapter: str | None) -> Iterator[None]:
    """While vLLM's configuration is made in this block, `adapter` is what it is made for."""
    token = _served_adapter.set(adapter)
    try:
        yield
    finally:
        _served_adapter.reset(token)


@dataclass(frozen=True)
class Settings:
    """One model's masks and how they are served.

    Attributes:
        adapter: the adapter directory; None for a merged checkpoint, which holds its own masks.
        announced: module path -> what a merged checkpoint's config says of its mask. Empty with an adapter.
        modules: the paths of the sparsified linears, as the base model names them.
        digest: of the adapter (`spon_plugin.Adapter.digest`); it makes vLLM's compile cache tell adapters apart.
        sparsity: the target.
        has_dense_bias: whether a merged checkpoint holds the dense model's biases beside the folded ones.
        token_mode: ``all``, every step is sparse; ``decode``, steps of more than `max_sparse_tokens` tokens are dense.
        max_sparse_tokens: the largest number of tokens in a step that runs sparse in mode ``decode``; where nobody says
            one, `spon_plugin.kernels.few_rows.row_limit` of the adapter's sparsity and the platform.
        measures: ``max_sparse_tokens: auto``: that number is where the measurement of `spon_vllm.crossover` starts.
        base_quantization: `quantization_config` of the base model, if its weights are quantized.
        weights: of a quantized base: ``rows``, one copy, which our kernels read; ``beside``, a copy for our kernels
            beside the base's own method, which then runs large and dense steps; ``auto``, beside where the base's own
            method can run here.
        exact: whether four-bit weights are multiplied by inputs as they are; see `spon_plugin.kernels.sparse_linear`.
        head: what a floating-point output head is rounded to, one of `HEADS`; None for none. Where nobody says it, a
            merged checkpoint's own word counts, and with an adapter ``int8`` on a quantized base.
    """

    adapter: str | None = None
    announced: Mapping[str, Announced] = field(default_factory=dict)
    modules: tuple[str, ...] = ()
    digest: str = ""
    sparsity: float = 0.0
    has_dense_bias: bool = False
    token_mode: str = DEFAULT_TOKEN_MODE
    max_sparse_tokens: int = 1
    measures: bool = False
    base_quantization: Mapping[str, Any] | None = None
    weights: str = AUTO
    exact: bool = False
    head: str | None = None

    @property
    def merged(self) -> bool:
        """Whether the masks are those of a merged checkpoint."""
        return self.adapter is None

    @property
    def limit(self) -> int:
        """The largest number of tokens in a step that runs sparse; `EVERY_STEP` for no limit, or `MEASURED`."""
        if self.token_mode == "all":
            return EVERY_STEP
        return MEASURED if self.measures else self.max_sparse_tokens

    def as_config(self, merged_fields: Mapping[str, Any]) -> dict[str, Any]:
        """``quantization_config`` that says the same; `resolve` reads it back.

        Args:
            merged_fields: the fields of a merged checkpoint's `quantization_config`, kept as they are.
        """
        config: dict[str, Any] = {key: merged_fields[key] for key in MASK_FIELDS if key in merged_fields}
        config |= {
            "quant_method": QUANT_METHOD,
            DIGEST: self.digest,
            "token_mode": self.token_mode,
            "max_sparse_tokens": AUTO if self.measures else self.max_sparse_tokens,
            HEAD: self.head or FLOAT_HEAD,
        }
        if self.adapter is not None:
            config["adapter"] = self.adapter
        if self.base_quantization is not None:
            config["weights"] = self.weights
            config["exact"] = self.exact
            config[BASE_QUANTIZATION] = dict(self.base_quantization)
        return config


def resolve(given: Mapping[str, Any] | None, stored: Mapping[str, Any] | None) -> tuple[Settings, dict[str, Any]]:
    """Find out what is to be served.

    Args:
        given: `quantization_config` as vLLM has it: of the checkpoint, or from ``--hf-overrides``.
        stored: `quantization_config` in the model's own `config.json`, which an override replaces as a whole.

    Returns:
        The settings, and the fields of a merged checkpoint.

    Raises:
        SponError: no adapter is named, or two are; it cannot be read; a setting is unknown or wrong, or asks a merged
            checkpoint for what it does not hold.
    """
    given, base, merged = _split(given, stored)
    own_head = (stored or {}).get(HEAD) if merged is not None else HEADS[0] if base is not None else None
    settings = Settings(
        token_mode=_token_mode(given),
        base_quantization=base,
        weights=_weights(given),
        exact=_exact(given),
        head=_head(given, own_head),
    )
    limit, measures = _max_sparse_tokens(given)
    settings = replace(settings, measures=measures)
    adapter = given.get("adapter") or _served_adapter.get() or os.environ.get(ADAPTER_VARIABLE)
    if merged is None:
        settings = _with_adapter(settings, adapter)
        return replace(settings, max_sparse_tokens=limit or _row_limit(settings.sparsity)), {}
    if adapter is not None and read_adapter(adapter).digest != merged.get(DIGEST):
        raise SponError.of(
            "adapter", adapter, "none, as the checkpoint has another one merged into it", "Serve the base model."
        )
    checkpoint = MergedConfig.of(merged)
    settings = replace(
        settings,
        announced=checkpoint.masks,
        modules=tuple(checkpoint.masks),
        digest=str(checkpoint.digest),
        sparsity=checkpoint.fields.sparsity,
        max_sparse_tokens=limit or _row_limit(checkpoint.fields.sparsity),
        has_dense_bias=checkpoint.has_dense_biases,
    )
    if not settings.has_dense_bias and settings.token_mode == "decode":
        # Dense steps need the dense model's biases, and this checkpoint has nothing but the folded ones.
        if _asked_mode(given):
            raise SponError.of(
                "token_mode",
                "decode",
                "all: this merged checkpoint of format 1 lacks the dense model's biases",
                "Serve the adapter instead, or merge it again.",
            )
        settings = replace(settings, token_mode="all")
    return settings, dict(merged)


def _split(
    given: Mapping[str, Any] | None, stored: Mapping[str, Any] | None
) -> tuple[dict[str, Any], dict[str, Any] | None, dict[str, Any] | None]:
    """Tell apart what was asked for, the base's own quantization, and a merged checkpoint's fields."""
    given, stored = dict(given or {}), dict(stored or {})
    base = given.pop(BASE_QUANTIZATION, None)
    if given.get("quant_method", QUANT_METHOD) != QUANT_METHOD:
        base, given = given, {}
    elif base is None and stored.get("quant_method", QUANT_METHOD) != QUANT_METHOD:
        base = stored
    elif base is None:  # a merged checkpoint's, which an override replaces, too
        base = stored.get(BASE_QUANTIZATION)
    # An override on a merged checkpoint takes the place of the whole object, masks and all: bring them back.
    fields = {**{key: stored[key] for key in (*MASK_FIELDS, DIGEST) if key in stored}, **given}
    fields.pop(HEAD, None)  # `_head` reads it
    if given.get(HEAD) == stored.get(HEAD):  # the checkpoint's own word
        given.pop(HEAD, None)
    merged = fields if "thresholds" in fields else None
    unknown = sorted(key for key in given if key not in _KNOWN and key not in MASK_FIELDS)
    if unknown:
        raise SponError.of(FIELD, unknown, "fields among " + ", ".join(_KNOWN))
    return given, base, merged


def _asked_mode(given: Mapping[str, Any]) -> Any:
    return given.get("token_mode") or os.environ.get(TOKEN_MODE_VARIABLE)


def _token_mode(given: Mapping[str, Any]) -> str:
    mode = _asked_mode(given) or DEFAULT_TOKEN_MODE
    if mode not in TOKEN_MODES:
        raise SponError.of("token_mode", mode, "one of " + ", ".join(TOKEN_MODES))
    return str(mode)


def _weights(given: Mapping[str, Any]) -> str:
    weights = given.get("weights") or os.environ.get(WEIGHTS_VARIABLE) or AUTO
    if weights not in (AUTO, ROWS, BESIDE):
        raise SponError.of("weights", weights, f"one of {AUTO}, {ROWS}, {BESIDE}")
    return str(weights)


def _exact(given: Mapping[str, Any]) -> bool:
    exact: Any = given.get("exact")
    if exact is None:
        exact = {"": False, "0": False, "1": True}.get(
            os.environ.get(EXACT_VARIABLE, ""), os.environ.get(EXACT_VARIABLE)
        )
    if not isinstance(exact, bool):
        raise SponError.of("exact", exact, f"true or false, or {EXACT_VARIABLE} 0 or 1")
    return exact


def _head(given: Mapping[str, Any], own: Any) -> str | None:
    """What the head is rounded to: as asked for, or else `own`, which is the checkpoint's word or the default."""
    asked = given.get(HEAD) or os.environ.get(HEAD_VARIABLE) or own
    if asked not in (None, FLOAT_HEAD, *HEADS):
        raise SponError.of(HEAD, asked, "one of " + ", ".join((FLOAT_HEAD, *HEADS)))
    return None if asked == FLOAT_HEAD else asked


def _max_sparse_tokens(given: Mapping[str, Any]) -> tuple[int | None, bool]:
    """The number that is asked for, None for that of the rule; and whether it is to be measured."""
    limit: Any = given.get("max_sparse_tokens")
    if limit is None:
        limit = os.environ.get(MAX_SPARSE_TOKENS_VARIABLE)
    if limit in (None, AUTO):
        return None, limit == AUTO
    try:
        number = -1 if isinstance(limit, bool | float) else int(limit)
    except (TypeError, ValueError):
        number = -1
    if number < 1:
        raise SponError.of("max_sparse_tokens", limit, f"a whole number >= 1, or {AUTO}")
    return number, False


def _row_limit(sparsity: float) -> int:
    from vllm.platforms import current_platform

    return row_limit(sparsity, current_platform.device_type)


def _with_adapter(settings: Settings, adapter: Any) -> Settings:
    if adapter is None:
        raise SponError.of("adapter", None, "a SPON adapter for --quantization spon", _NAME_IT)
    if not isinstance(adapter, str) or not os.path.isdir(os.path.expanduser(adapter)):
        raise SponError.of(
            "adapter",
            adapter,
            "an existing adapter directory",
            "Check the path; download one from a hub first.",
        )
    path = os.path.abspath(os.path.expanduser(adapter))
    loaded = read_adapter(path)
    modules = tuple(loaded.masks)
    return replace(settings, adapter=path, modules=modules, digest=loaded.digest, sparsity=loaded.fields.sparsity)
