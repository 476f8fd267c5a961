"""How a peer's quantizer is recognised, and the class that replaces it.

A patched module stays the same object: only ``module.__class__`` changes, to a class made here that inherits from ours
and from the module's class. Nothing is bound to the instance, so ``copy.deepcopy``, pickling, DataParallel's replicas
and DDP find no reference to another module. ``super()`` still reaches the peer's code for calls that fall back to it.
Unpatching assigns the old class. Parameters, buffers, hooks and the instance's ``__dict__`` do not change.
"""

from __future__ import annotations

import functools
import re
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from torch import nn

__all__ = [
    "FallbackWarning",
    "PatchTarget",
    "PatchedModule",
    "_rebuild",
    "all_of",
    "hooked",
    "peer_module",
    "require",
    "swap",
    "swap_back",
    "type_of",
]


class FallbackWarning(UserWarning):
    """A patched module used its original code for a call, because of an option that fastvq does not do."""


@dataclass(frozen=True)
class PatchTarget:
    """One class of a peer: how it is recognised, and what replaces it."""

    peer: str  # what patch_class takes
    modules: str  # regular expression for the module that defines it
    name: str
    fast: type[PatchedModule]
    replaced_methods: tuple[str, ...]  # the peer's methods that ``fast`` replaces or calls
    reject: Callable[[nn.Module], str | None] = field(default=lambda module: None)  # why an instance cannot be patched
    attributes: tuple[str, ...] = ()  # other attributes that ``fast`` reads; may be None; "a.b" is b of a
    helpers: tuple[
        str, ...
    ] = ()  # functions and classes of the peer's module that ``fast`` uses through ``peer_module``
    importable: tuple[str, ...] = ()  # where patch_class finds it; empty: only once it has been imported
    distribution: str = ""
    tested: str = ""  # the newest version that its behaviour was compared with

    def defines(self, cls: type) -> bool:
        return cls.__name__ == self.name and re.fullmatch(self.modules, cls.__module__) is not None

    def missing(self, module: nn.Module, definer: type) -> str | None:
        """What of ``attributes`` and ``helpers`` this version of the peer does not have."""
        for name in self.attributes:
            one: Any = module
            *path, last = name.split(".")
            for part in path:
                one = getattr(one, part, None)
            if not _has(one, last):
                return f"it has no {name}, so it is not the class that fastvq knows by this name"
        file = sys.modules.get(definer.__module__)
        for name in self.helpers:
            if not hasattr(file, name):
                return f"{definer.__module__} has no {name}, so it is not the version that fastvq knows"
        return None


def _has(module: Any, name: str) -> bool:
    """Whether an attribute exists, without computing it: a property may be costly, or cache what it finds."""
    if hasattr(type(module), name) or name in getattr(module, "__dict__", ()):
        return True
    return isinstance(module, nn.Module) and any(
        name in held for held in (module._parameters, module._buffers, module._modules)
    )


class PatchedModule(nn.Module):
    """Base of every class that replaces a peer's; ``original`` is set on the classes that ``_class_for`` makes."""

    original: ClassVar[type[nn.Module]]

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any: ...  # the peer's attributes, whatever they are

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle as (ours, theirs) instead of by name: the class that both make has no name to import it by."""
        plain: Any = super().__reduce_ex__(protocol)
        make, arguments, *rest = plain
        cls = type(self)
        if "original" not in cls.__dict__ or arguments[:1] != (cls,):
            return (make, arguments, *rest)
        return (_rebuild, (cls.__bases__[0], cls.original), *rest)

    @classmethod
    def always_original(cls, module: nn.Module) -> str | None:
        """Why every call of this instance would run its original code, so that it is left as it is; else None."""
        return None

    @classmethod
    def limits(cls, module: nn.Module) -> list[str]:
        """Where calls of this instance will use its original code, as far as its options tell: "in training: why"."""
        return []

    def _fall_back(self, reason: str) -> None:
        """Say once per class and reason that a call used the original code."""
        _warn_once(f"{type(self).__module__}.{type(self).__qualname__}", reason)


@functools.cache
def _warn_once(name: str, reason: str) -> None:
    if torch.compiler.is_compiling():
        return
    warnings.warn(f"fastvq: {name} used its original code: {reason}", FallbackWarning, stacklevel=4)


# One class a pair, so that two patched modules of one class are of one class again.
_made: dict[tuple[type, type], type[PatchedModule]] = {}


def _class_for(fast: type[PatchedModule], original: type[nn.Module]) -> type[PatchedModule]:
    """The class that does ours and falls back to theirs, named like theirs: repr and log lines stay as they were."""
    if (fast, original) in _made:
        return _made[fast, original]
    members = {
        "original": original,
        "__module__": original.__module__,
        "__qualname__": original.__qualname__,
        "__doc__": original.__doc__,
    }
    _made[fast, original] = made = cast(type[PatchedModule], type(original.__name__, (fast, original), members))
    return made


def swap(module: nn.Module, fast: type[PatchedModule]) -> None:
    module.__class__ = _class_for(fast, type(module))


def swap_back(module: nn.Module) -> bool:
    cls = type(module)
    if not (isinstance(module, PatchedModule) and "original" in cls.__dict__):
        return False
    module.__class__ = cls.__dict__["original"]
    return True


def _rebuild(fast: type[PatchedModule], original: type[nn.Module]) -> PatchedModule:
    """An instance without state, for pickle and copy."""
    cls = _class_for(fast, original)
    return cls.__new__(cls)


remake = _rebuild  # the name in pickles of earlier versions


def type_of(module: nn.Module) -> type[nn.Module]:
    """The peer's class, of a patched module too."""
    return type(module).__dict__.get("original", type(module))


def peer_module(module: nn.Module, name: str) -> Any:
    """The file that defines ``name`` among the module's classes. Use nothing of it but the target's ``helpers``."""
    definer = next(cls for cls in type(module).__mro__ if cls.__name__ == name and not issubclass(cls, PatchedModule))
    return sys.modules[definer.__module__]


def hooked(module: nn.Module) -> bool:
    """Whether someone waits for its calls, which therefore have to be made."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def require(**shapes: str) -> Callable[[nn.Module], str | None]:
    """Attributes an instance must have: a tensor of so many dimensions ("2"), or anything ("")."""

    def reject(module: nn.Module) -> str | None:
        for name, dimensions in shapes.items():
            value: Any = module
            for part in name.split("__"):
                value = getattr(value, part, None)
            if value is None:
                return f"it has no {name.replace('__', '.')}, so it is not the class that fastvq knows by this name"
            if dimensions and (not isinstance(value, torch.Tensor) or value.dim() != int(dimensions)):
                return f"its {name.replace('__', '.')} is not a tensor of {dimensions} dimensions"
        return None

    return reject


def all_of(*checks: Callable[[nn.Module], str | None]) -> Callable[[nn.Module], str | None]:
    """The first objection of several checks."""

    def reject(module: nn.Module) -> str | None:
        return next((reason for check in checks if (reason := check(module)) is not None), None)

    return reject
