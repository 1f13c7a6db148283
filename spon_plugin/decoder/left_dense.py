# SPDX-License-Identifier: Apache-2.0
"""Which linears no mask may touch, and why: parts that see no text, experts, weights that the module around reads."""

from __future__ import annotations

import ast
import inspect
import textwrap
from functools import cache
from typing import Any

from torch import nn

from spon_plugin.weights.linears import is_linear

# Methods that set weights up, and attributes of a weight that are not its values.
_SET_UP = ("__init__", "_init", "init", "reset", "tie", "extra_repr")
# A condition made of these alone holds for as long as the module has its settings.
_CONDITIONS = (ast.Name, ast.Attribute, ast.Constant, ast.Compare, ast.BoolOp, ast.UnaryOp, ast.boolop, ast.unaryop,
               ast.cmpop, ast.expr_context)  # fmt: skip
_NOT_VALUES = ("dtype", "device", "shape", "ndim", "size", "dim", "numel", "is_meta", "requires_grad")


def text_decoder(model: Any) -> tuple[str, nn.Module]:
    """Path and module of the part that a mask may touch: a multimodal model's text decoder, or all of another model.

    A model is multimodal where its config has a text config of its own; `get_decoder` then finds the part. Image and
    audio towers see patches and frames, which calibration on text does not.
    """
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "get_text_config") or not hasattr(model, "get_decoder"):
        return "", model
    if getattr(config, "is_encoder_decoder", False) or config.get_text_config(decoder=True) is config:
        return "", model
    decoder = model.get_decoder()
    return next(((path, module) for path, module in model.named_modules() if module is decoder), ("", model))


def is_inside(path: str, part: str) -> bool:
    """Whether a module path is that of `part` or of something in it; ``""`` is the whole model."""
    return part == "" or path == part or path.startswith(part + ".")


def is_expert(path: str) -> bool:
    """Whether a module path belongs to a mixture of experts: experts and routers are left dense."""
    return any(word in part for part in path.lower().split(".") for word in ("expert", "router")) or any(
        path.lower().endswith(end) for end in ("mlp.gate", "moe.gate", "block_sparse_moe.gate")
    )


def reads_positions(path: str) -> bool:
    """Whether a module path is that of a linear that reads position embeddings, as DeBERTa's `pos_proj`: no token's."""
    return path.rpartition(".")[2].startswith("pos_")


def read_by_parents(model: nn.Module) -> dict[str, str]:
    """Linears whose weight the module around them multiplies itself, so that a mask on their input has no effect.

    Mamba's `dt_proj` is one, and what its fused kernel takes while training; `torch.nn.MultiheadAttention`'s `out_proj`
    is another. They are found in the source of the module's class.

    Returns:
        Path of the linear -> name of that class.
    """
    found = {}
    for path, module in model.named_modules():
        if not any(is_linear(child) for child in module.children()):
            continue
        reads = _Reads(module)
        kind: Any = type(module)
        for method in _methods(kind):
            reads.visit(method)
        for name in reads.names:
            if is_linear(getattr(module, name, nn.Identity())):
                found[f"{path}.{name}" if path else name] = type(module).__name__
    return found


def left_dense(model: nn.Module) -> dict[str, list[str]]:
    """Why linears are left dense wherever masks are made -> their paths; the output head is not listed."""
    part, _ = text_decoder(model)
    read = read_by_parents(model)
    reasons: dict[str, list[str]] = {}
    for path, module in model.named_modules():
        if not is_linear(module):
            continue
        if not is_inside(path, part):
            if path.rpartition(".")[2] != "lm_head":
                reasons.setdefault("outside the text decoder", []).append(path)
        elif is_expert(path):
            reasons.setdefault("experts and routers", []).append(path)
        elif reads_positions(path):
            reasons.setdefault("projections of positions", []).append(path)
        elif path in read:
            reasons.setdefault(f"multiplied by {read[path]} itself", []).append(path)
    return reasons


@cache
def _methods(cls: Any) -> tuple[ast.AST, ...]:
    """The syntax of what `cls` computes, as far as there is source."""
    found = []
    for base in cls.__mro__[: cls.__mro__.index(nn.Module)]:
        for name, method in vars(base).items():
            if inspect.isfunction(method) and not name.startswith(_SET_UP):
                try:
                    found.append(ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(method)))))
                except (OSError, TypeError, SyntaxError):  # compiled, or typed in
                    continue
    return tuple(found)


class _Reads(ast.NodeVisitor):
    """Collects the members of a module whose ``weight`` a method uses as a value, not through a call of the member."""

    def __init__(self, module: nn.Module) -> None:
        self.module, self.names = module, set[str]()

    def visit_Attribute(self, node: ast.Attribute) -> None:
        """``self.NAME.weight`` counts; ``self.NAME.weight.dtype`` and its like do not."""
        if _member(node) is not None:
            self.names.add(str(_member(node)))
        elif node.attr not in _NOT_VALUES or _member(node.value) is None:
            self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        """What is only asked for its type counts no more."""
        if not (isinstance(node.func, ast.Name) and node.func.id in ("isinstance", "hasattr")):
            self.generic_visit(node)

    def visit_If(self, node: ast.If) -> None:
        """A branch that the module's own settings rule out (Bloom's `slow_but_exact`) does not count."""
        taken = self._settled(node.test)
        branches = [node.test, *node.body, *node.orelse] if taken is None else node.body if taken else node.orelse
        for each in branches:
            self.visit(each)

    def _settled(self, test: ast.expr) -> bool | None:
        """The value of a condition on nothing but the module's settings; None for any other."""
        for node in ast.walk(test):
            fixed = not isinstance(node, ast.Attribute) or node.attr != "training"
            if not fixed or not isinstance(node, _CONDITIONS) or (isinstance(node, ast.Name) and node.id != "self"):
                return None
        try:
            return bool(eval(compile(ast.Expression(test), "<condition>", "eval"), {"self": self.module}))
        except (AttributeError, TypeError):
            return None


def _member(node: ast.AST) -> str | None:
    """NAME of ``self.NAME.weight`` where it is read."""
    if not (isinstance(node, ast.Attribute) and node.attr == "weight" and isinstance(node.ctx, ast.Load)):
        return None
    owner = node.value
    own = isinstance(owner, ast.Attribute) and isinstance(owner.value, ast.Name) and owner.value.id == "self"
    return owner.attr if own and isinstance(owner, ast.Attribute) else None
