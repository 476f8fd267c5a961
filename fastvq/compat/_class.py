"""``fastvq.patch_class``: every instance made from now on is patched."""

from __future__ import annotations

import functools
import importlib
import sys
from typing import Any

from torch import nn

from fastvq.compat._patch import patch
from fastvq.compat._registry import TARGETS
from fastvq.compat._target import PatchTarget

__all__ = ["patch_class", "unpatch_class"]

# Each patched class, and the __init__ it had in its own __dict__.
_inits: dict[type[nn.Module], Any] = {}


def patch_class(peer: str | type[nn.Module]) -> list[str]:
    """Patch every quantizer of ``peer`` that is made from now on; existing ones stay as they are.

    Args:
        peer: a package ("vector_quantize_pytorch", "encodec", "audiocraft", "moshi", "transformers", "diffusers",
            "taming", "var", "rosinality", "unixpickle"), or one class.

    Returns:
        The classes, by name. Idempotent.

    Raises:
        ValueError: fastvq knows no such package or class, or none of its modules can be imported here.
    """
    classes = _classes("fastvq.patch_class", peer)
    for cls in classes:
        if cls not in _inits:
            _inits[cls] = cls.__dict__.get("__init__")
            # The constructor, and not the methods: instances made before must stay as they were.
            cls.__init__ = _patching(cls.__init__)  # type: ignore[method-assign]
    return [f"{cls.__module__}.{cls.__qualname__}" for cls in classes]


def unpatch_class(peer: str | type[nn.Module]) -> list[str]:
    """Take ``patch_class`` back: instances made from now on are the peer's own. Those made meanwhile stay patched."""
    undone = []
    for cls in _classes("fastvq.unpatch_class", peer):
        if cls in _inits:
            before = _inits.pop(cls)
            if before is None:
                del cls.__init__
            else:
                cls.__init__ = before  # type: ignore[method-assign]
            undone.append(f"{cls.__module__}.{cls.__qualname__}")
    return undone


def _patching(init: Any) -> Any:
    @functools.wraps(init)
    def __init__(self: nn.Module, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        patch(self)

    return __init__


def _classes(op: str, peer: str | type[nn.Module]) -> list[type[nn.Module]]:
    if isinstance(peer, type):
        if not any(target.defines(peer) for target in TARGETS):
            raise ValueError(f"{op}: {peer.__module__}.{peer.__qualname__} is no class that fastvq knows")
        return [peer]
    targets = [target for target in TARGETS if target.peer == peer]
    if not targets:
        known = ", ".join(sorted({target.peer for target in TARGETS}))
        raise ValueError(f"{op}: peer must be one of {known}, or a class, got {peer!r}")
    found = [cls for target in targets for cls in _defined(target)]
    if not found:
        raise ValueError(
            f"{op}: no module of {peer!r} with a quantizer could be imported; install it, import it, or pass the class"
        )
    return list(dict.fromkeys(found))


def _defined(target: PatchTarget) -> list[type[nn.Module]]:
    """The target's class in the modules it can be imported from, and in those that are already imported."""
    for name in target.importable:
        try:
            importlib.import_module(name)
        except ImportError:
            continue
    classes = []
    for module in list(sys.modules.values()):
        cls = getattr(module, "__dict__", {}).get(target.name)
        if isinstance(cls, type) and issubclass(cls, nn.Module) and target.defines(cls):
            classes.append(cls)
    return classes
