"""Patching with a given table of targets: finds quantizers, checks them and swaps their classes.

``fastvq.patch`` passes the table of every peer; the classes that a peer's file exports pass their own.
"""

from __future__ import annotations

import functools
import importlib.metadata
import re
from collections.abc import Iterator, Sequence

from torch import nn

from fastvq.compat._others import other_quantizers
from fastvq.compat._report import Patched, PatchReport, Skipped
from fastvq.compat._target import PatchedModule, PatchTarget, swap, type_of

__all__ = ["apply", "find_target"]

OP = "fastvq.patch"


def apply(module: nn.Module, targets: Sequence[PatchTarget], *, strict: bool = False) -> PatchReport:
    """Patches the quantizers of ``module`` that ``targets`` names, in place. See ``fastvq.patch``."""
    if not isinstance(module, nn.Module):
        raise TypeError(f"{OP}: module must be a torch.nn.Module, got {type(module).__name__}; pass the model itself")
    found = list(_quantizers(module, targets))
    compiled = [name for name, m in module.named_modules() if _is_compiled(m) and next(_quantizers(m, targets), None)]
    if compiled:
        raise ValueError(
            f"{OP}: {compiled[0] or 'module'} is compiled by torch.compile, which would go on running the code it "
            "compiled; patch the plain model first, then compile it"
        )
    report, swaps = PatchReport(), []
    own_code: dict[str, str] = {}  # modules that always run their own code, and so do those inside them
    for name, one, target, definer in found:
        shown = f"{type_of(one).__module__}.{type_of(one).__qualname__}"
        reason = next((why for outer, why in own_code.items() if not outer or name.startswith(f"{outer}.")), None)
        reason = reason or _objection(one, target, definer)
        if reason is None and (reason := target.fast.always_original(one)) is not None:
            own_code[name] = reason
        if reason is not None:
            report.left.append(Skipped(name, shown, reason))
            continue
        if not isinstance(one, PatchedModule):
            swaps.append((one, target.fast))
        report.replaced.append(Patched(name, shown, tuple(target.fast.limits(one))))
    report.others += other_quantizers(module, [name for name, *_ in found])
    report.notes += dict.fromkeys(note for _, _, target, _ in found if (note := _untested(target)))
    if strict and (report.left or not report.replaced):
        why = str(report) if report.left else "it holds no quantizer that fastvq knows; see fastvq.compat"
        raise ValueError(f"{OP}: strict=True and not every quantizer can be replaced; nothing was changed. {why}")
    for one, fast in swaps:
        swap(one, fast)
    return report


def find_target(cls: type, targets: Sequence[PatchTarget]) -> tuple[PatchTarget, type] | None:
    """The target that ``cls`` is or inherits from, and the peer's class among its ancestors."""
    for ancestor in cls.__mro__:
        if issubclass(ancestor, PatchedModule):
            continue
        for target in targets:
            if target.defines(ancestor):
                return target, ancestor
    return None


def _quantizers(
    module: nn.Module, targets: Sequence[PatchTarget]
) -> Iterator[tuple[str, nn.Module, PatchTarget, type]]:
    for name, one in module.named_modules():
        if (hit := find_target(type(one), targets)) is not None:
            yield name, one, *hit


def _objection(one: nn.Module, target: PatchTarget, definer: type) -> str | None:
    """Why an instance must stay as it is: user code in the place of what would be replaced, or an unknown layout."""
    own = type_of(one)
    for method in target.replaced_methods:
        if method in one.__dict__:
            return (
                f"its method {method} is replaced on the instance (as accelerate's hooks do); "
                "remove the hook, patch, then add it again"
            )
        theirs = getattr(definer, method, None)
        if theirs is None:
            return f"its class has no method {method}, so it is not the version that fastvq knows"
        if not issubclass(own, PatchedModule) and getattr(own, method, None) is not theirs:
            return f"its class {own.__qualname__} has its own {method}, which fastvq would bypass"
    return target.missing(one, definer) or target.reject(one)


def _is_compiled(module: nn.Module) -> bool:
    return type(module).__name__ == "OptimizedModule" or getattr(module, "_compiled_call_impl", None) is not None


@functools.cache
def _untested(target: PatchTarget) -> str:
    """A note where the installed version is newer than any that was compared, else empty."""
    try:
        version = importlib.metadata.version(target.distribution) if target.distribution else ""
    except importlib.metadata.PackageNotFoundError:
        return ""
    installed, tested = (tuple(map(int, re.findall(r"\d+", v)[:2])) for v in (version, target.tested))
    if installed > tested:
        return (
            f"{target.distribution} {version} is newer than {target.tested}, the newest version compared with fastvq; "
            "compare its results before and after"
        )
    return ""
