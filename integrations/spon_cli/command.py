# SPDX-License-Identifier: Apache-2.0
"""A command of typer from a function that takes one dataclass: options that commands share are base classes."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import MISSING, Field, dataclass, fields
from typing import Any, TypeVar, get_args, get_type_hints

from spon_cli.failures import in_a_sentence
from spon_cli.output import results_only
from spon_cli.progress import lines_for_the_log
from spon_plugin import SponError

Options = TypeVar("Options")


@dataclass(frozen=True)
class Between:
    """Which whole numbers an option takes; stands in its `Annotated` beside `typer.Option`."""

    low: int
    high: int

    def check(self, field: str, value: int | None) -> None:
        """Raise `SponError` unless `value` lies within the limits, or is None."""
        if value is not None and not self.low <= value <= self.high:
            least = "a positive number" if self.low == 1 else f"a number of at least {self.low}"
            raise SponError.of(field, value, least if value < self.low else f"at most {self.high}")


def command(run: Callable[[Options], None]) -> Callable[..., None]:
    """What typer takes for `run`, whose only argument is a dataclass of options.

    Each field is annotated as typer wants it, ``Annotated[type, typer.Option(...)] = default``, and may carry limits
    (`Between`), which are checked before `run` is called. Help lists a class's own options before those of its bases.

    Args:
        run: its docstring is the command's help.
    """
    hints = get_type_hints(run, include_extras=True)
    options: Any = hints[next(iter(inspect.signature(run).parameters))]
    annotations = get_type_hints(options, include_extras=True)
    ordered = _own_first(options)

    def call(**values: Any) -> None:
        with in_a_sentence(), results_only(), lines_for_the_log():
            for field in ordered:
                for limits in get_args(annotations[field.name])[1:]:
                    if isinstance(limits, Between):
                        limits.check(field.name, values[field.name])
            run(options(**values))

    signature = [
        inspect.Parameter(
            field.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=inspect.Parameter.empty if field.default is MISSING else field.default,
            annotation=annotations[field.name],
        )
        for field in ordered
    ]
    call.__signature__ = inspect.Signature(signature)  # type: ignore[attr-defined]
    call.__annotations__ = {field.name: annotations[field.name] for field in ordered}
    call.__doc__ = run.__doc__
    return call


def _own_first(options: type) -> list[Field[Any]]:
    """The fields of a dataclass, those of the class itself before those of its bases."""
    known = {field.name: field for field in fields(options)}
    names = dict.fromkeys(name for cls in options.__mro__ for name in vars(cls).get("__annotations__", ()))
    return [known[name] for name in names if name in known]
