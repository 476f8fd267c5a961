"""``from fastvq.compat.<peer> import <Class>``: the peer's class, patched when it is made."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from fastvq.compat._apply import apply
from fastvq.compat._target import PatchTarget

__all__ = ["subclasses_of"]


def subclasses_of(
    module: str, classes: Mapping[str, str], targets: Sequence[PatchTarget]
) -> Callable[[str], type[nn.Module]]:
    """A module's ``__getattr__`` that makes, of the classes named, subclasses whose instances are patched.

    Made on first use: importing fastvq must not import a peer, or need one.
    """
    made: dict[str, type[nn.Module]] = {}

    def __getattr__(name: str) -> type[nn.Module]:
        if name not in classes:
            raise AttributeError(f"module {module!r} has no attribute {name!r}; it has {', '.join(classes)}")
        if name not in made:
            original = getattr(importlib.import_module(classes[name]), name)
            made[name] = _patched(module, original, targets)
        return made[name]

    return __getattr__


def _patched(module: str, original: type[nn.Module], targets: Sequence[PatchTarget]) -> type[nn.Module]:
    def __init__(self: nn.Module, *args: Any, **kwargs: Any) -> None:
        original.__init__(self, *args, **kwargs)
        apply(self, targets)

    members = {
        "__init__": __init__,
        "__module__": module,
        "__qualname__": original.__qualname__,
        "__doc__": original.__doc__,
    }
    return type(original.__name__, (original,), members)
