# SPDX-License-Identifier: Apache-2.0
"""Registers SPON with PEFT, transformers and lm-eval without an import by the user.

torch (>= 2.5) calls :func:`autoload` at the end of ``import torch`` (entry point group ``torch.backends``) and turns an
exception raised there into a failure of ``import torch`` for the whole environment. So this module stands alone: the
standard library only, nothing that torch has not loaded already, none of our packages before a host needs them.
"""

import os
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.machinery import ModuleSpec
from types import ModuleType

# Host module -> "package:function", called without arguments right after the host module has been executed.
# peft.tuners rather than peft: where peft is what imports torch, peft/__init__ is already running when autoload() is
# called, while peft.tuners starts later, and everything a tuner registers with is importable when it ends.
HOOKS = {
    "peft.tuners": "spon_peft:register",
    "transformers.quantizers.auto": "spon_transformers:register",
    "lm_eval.models": "spon_lm_eval:register",
}
_pending = dict(HOOKS)
_searching: set[str] = set()  # hosts for which the finders behind ours are being asked


def _warn(host: str, error: Exception) -> None:
    import warnings

    message = (
        f"spon-plugin could not register with {host} ({type(error).__name__}: {error}). "
        "Reinstall spon-plugin, or set SPON_AUTOLOAD=0 to switch this off."
    )
    try:
        warnings.warn(message, RuntimeWarning, stacklevel=2)
    except Exception:  # under -W error, which must not break the host either
        print(message, file=sys.stderr)


def _running_spec(module: ModuleType | None) -> ModuleSpec | None:
    """The spec of a module whose execution has begun and not ended."""
    spec = getattr(module, "__spec__", None)
    return spec if getattr(spec, "_initializing", None) is True else None


def _running_of(package: str) -> ModuleSpec | None:
    """The spec of that module of a package which is being executed, or began first of several."""
    own = [module for name, module in list(sys.modules.items()) if f"{name}.".startswith(f"{package}.")]
    return next(filter(None, map(_running_spec, own)), None)


def _register(host: str, target: str) -> None:
    """Calls a hook; whatever goes wrong in our packages becomes a warning, so that the host keeps working."""
    package, _, function = target.partition(":")
    try:
        module = import_module(package)
        if getattr(module, "__file__", None):  # None: a directory that an uninstall left behind
            getattr(module, function)()
    except Exception as error:
        if not (isinstance(error, ModuleNotFoundError) and f"{package}.".startswith(f"{error.name}.")):
            _warn(host, error)  # otherwise our package is absent: half uninstalled, nothing to say


def _fire(host: str) -> None:
    """Runs the hook of an imported host, once, and withdraws the finder after the last one."""
    target = _pending.pop(host, None)
    if target is None:
        return
    try:
        if spec := _running_of(target.partition(":")[0]):
            # The user imported our package, or a module of it, which imported the host: what is registered may not be
            # defined yet. And another thread that does so must not be waited for: it may be waiting for the host.
            _watch(spec, _register, host, target)
        else:
            _register(host, target)
    except BaseException:  # KeyboardInterrupt and the like fail the import of the host; the next attempt tries again
        _pending[host] = target
        raise
    if not _pending and _FINDER in sys.meta_path:
        # A new list: until Python 3.14 importlib iterates over the list itself, and removing an element from that makes
        # an import in another thread skip a finder.
        sys.meta_path = [finder for finder in sys.meta_path if finder is not _FINDER]


def _watch(spec: ModuleSpec, action: Callable[..., None], *args: str) -> None:
    """Calls ``action(*args)`` when the module of `spec` has been executed, before another thread can get hold of it.

    importlib brackets the execution of a module by ``spec._initializing = True`` and ``= False``, inside the lock of
    that module. Listening to the second assignment is more robust than a proxy of the loader: the loader stays as it is
    (its type, resources and sources; one that is shared or rejects attributes), a spec that is only looked at has no
    effect, and it also works for a module whose execution has already begun.
    """
    base = type(spec)

    def setattr_(self: ModuleSpec, name: str, value: object) -> None:
        if name != "_initializing" or value:
            return base.__setattr__(self, name, value)
        self.__class__ = base
        try:
            if self.name in sys.modules:  # importlib has removed it if it raised
                action(*args)
        except BaseException:
            sys.modules.pop(self.name, None)  # as after any import that raises
            raise
        finally:
            setattr(self, name, value)

    try:
        spec.__class__ = type(base.__name__, (base,), {"__setattr__": setattr_})
    except Exception as error:  # a foreign kind of spec
        _warn(spec.name, error)


class _Finder:
    """Finds what the finders behind it find, and watches the specs of the hosts."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        # The second condition: a finder behind ours asks all of sys.meta_path in its turn. No other thread is meant, as
        # importlib calls finders under its global lock.
        if name not in _pending or name in _searching:
            return None
        finders = list(sys.meta_path)
        _searching.add(name)
        try:
            for finder in finders[finders.index(self) + 1 if self in finders else 0 :]:
                find_spec = getattr(finder, "find_spec", None)
                spec: ModuleSpec | None = find_spec(name, path, target) if find_spec else None
                if spec is not None:
                    _watch(spec, _fire, name)
                    return spec
        finally:
            _searching.discard(name)
        return None


_FINDER = _Finder()


def autoload() -> None:
    """Arranges for the hooks to run when their hosts have been imported; torch calls this at the end of its import.

    Imports neither a host nor our packages, so that ``import torch`` costs the same with and without SPON. Calling it
    again is harmless. ``SPON_AUTOLOAD=0`` in the environment switches it off.
    """
    if os.environ.get("SPON_AUTOLOAD") == "0":
        return
    try:
        if _pending and _FINDER not in sys.meta_path:
            sys.meta_path.insert(0, _FINDER)
        for host in list(_pending):
            module = sys.modules.get(host)  # None: not imported, or barred from being imported
            if spec := _running_spec(module):
                _watch(spec, _fire, host)
            elif module is not None:
                _fire(host)
    except Exception as error:  # torch would fail to import
        _warn("torch", error)
