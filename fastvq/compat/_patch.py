"""``fastvq.patch``: one line that makes the quantizers of a finished model faster."""

from __future__ import annotations

import functools
import importlib.metadata
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from torch import nn

from fastvq.compat._registry import TARGETS
from fastvq.compat._target import Fast, Target, swap, swap_back, type_of

__all__ = ["Left", "PatchReport", "Replaced", "patch", "unpatch"]

OP = "fastvq.patch"


@dataclass(frozen=True)
class Replaced:
    """One module that runs on fastvq's kernels; ``limits`` says which of its calls still use the original code."""

    name: str
    cls: str
    limits: tuple[str, ...] = ()


@dataclass(frozen=True)
class Left:
    """One quantizer that stays as it was, and why."""

    name: str
    cls: str
    reason: str


@dataclass
class PatchReport:
    """What ``patch`` did. True if anything runs on fastvq now; ``print`` shows a line a module."""

    replaced: list[Replaced] = field(default_factory=list)
    left: list[Left] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.replaced)

    def __str__(self) -> str:
        lines = [f"fastvq: {len(self.replaced)} replaced, {len(self.left)} left as they were"]
        for done in self.replaced:
            lines.append(f"  replaced {done.name or '(the module itself)'}: {done.cls}")
            lines += [f"    original code for {limit}" for limit in done.limits]
        lines += [f"  left {one.name or '(the module itself)'}: {one.cls}: {one.reason}" for one in self.left]
        return "\n".join(lines)


def patch(module: nn.Module, *, strict: bool = False) -> PatchReport:
    """Make the quantizers inside ``module`` faster, in place.

    Quantizers of the packages in ``fastvq.compat`` are recognised by module path and class name, then checked by their
    attributes. What is swapped is the class of the object, to a subclass whose lookup, statistics and update are
    fastvq's: state_dict keys, parameters, buffers, hooks, optimiser references, device, dtype, return values and the
    order of updates stay as they were. Indices are exact float64 ones, under autocast too (``fastvq.ops.nearest``);
    values are within float32 rounding of the original's. A call with an option that fastvq does not do runs the
    original code, bit for bit, and warns once with ``FallbackWarning``.

    Call it again at any time: what is patched stays so. Works before or after DistributedDataParallel wraps the
    model. ``copy.deepcopy`` and pickles of a patched module are patched; a state_dict fits patched and unpatched
    models alike.

    Args:
        module: any module, itself a quantizer or holding some.
        strict: raise unless every quantizer was replaced, and at least one.

    Returns:
        ``PatchReport(replaced, left)``, with the reason for every one left.

    Raises:
        ValueError: a quantizer lies inside a module that ``torch.compile`` has compiled; patch, then compile. With
            ``strict``: something was left, or nothing was recognised.
        TypeError: ``module`` is no ``torch.nn.Module``.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"{OP}: module must be a torch.nn.Module, got {type(module).__name__}; pass the model itself")
    found = list(_quantizers(module))
    compiled = [name for name, m in module.named_modules() if _is_compiled(m) and next(_quantizers(m), None)]
    if compiled:
        raise ValueError(
            f"{OP}: {compiled[0] or 'module'} is compiled by torch.compile, which would go on running the code it "
            "compiled; patch the plain model first, then compile it"
        )
    report, swaps = PatchReport(), []
    for name, one, target, definer in found:
        shown = f"{type_of(one).__module__}.{type_of(one).__qualname__}"
        if (reason := _objection(one, target, definer)) is not None:
            report.left.append(Left(name, shown, reason))
            continue
        if not isinstance(one, Fast):
            swaps.append((one, target.fast))
        report.replaced.append(Replaced(name, shown, (*target.fast.limits(one), *_untested(target))))
    if strict and (report.left or not report.replaced):
        why = str(report) if report.left else "it holds no quantizer that fastvq knows; see fastvq.compat"
        raise ValueError(f"{OP}: strict=True and not every quantizer can be replaced; nothing was changed. {why}")
    for one, fast in swaps:
        swap(one, fast)
    return report


def unpatch(module: nn.Module) -> int:
    """Give every patched module inside ``module`` its own class back; returns how many there were."""
    if not isinstance(module, nn.Module):
        raise TypeError(f"fastvq.unpatch: module must be a torch.nn.Module, got {type(module).__name__}")
    return sum(swap_back(one) for one in list(module.modules()))


def find_target(cls: type) -> tuple[Target, type] | None:
    """The target that ``cls`` is or inherits from, and the peer's class among its ancestors."""
    for ancestor in cls.__mro__:
        if issubclass(ancestor, Fast):
            continue
        for target in TARGETS:
            if target.defines(ancestor):
                return target, ancestor
    return None


def _quantizers(module: nn.Module) -> Iterator[tuple[str, nn.Module, Target, type]]:
    for name, one in module.named_modules():
        if (hit := find_target(type(one))) is not None:
            yield name, one, *hit


def _objection(one: nn.Module, target: Target, definer: type) -> str | None:
    """Why an instance must stay as it is: user code in the place of what would be replaced, or an unknown layout."""
    own = type_of(one)
    for seam in target.seams:
        if seam in one.__dict__:
            return (
                f"its method {seam} is replaced on the instance (as accelerate's hooks do); "
                "remove the hook, patch, then add it again"
            )
        theirs = getattr(definer, seam, None)
        if theirs is None:
            return f"its class has no method {seam}, so it is not the version that fastvq knows"
        if not issubclass(own, Fast) and getattr(own, seam, None) is not theirs:
            return f"its class {own.__qualname__} has its own {seam}, which fastvq would bypass"
    return target.missing(one, definer) or target.unfit(one)


def _is_compiled(module: nn.Module) -> bool:
    return type(module).__name__ == "OptimizedModule" or getattr(module, "_compiled_call_impl", None) is not None


@functools.cache
def _untested(target: Target) -> tuple[str, ...]:
    """A line where the installed version is newer than any that was compared."""
    try:
        version = importlib.metadata.version(target.distribution) if target.distribution else ""
    except importlib.metadata.PackageNotFoundError:
        return ()
    installed, tested = (tuple(map(int, re.findall(r"\d+", v)[:2])) for v in (version, target.tested))
    if installed > tested:
        return (f"nothing, but {target.distribution} {version} is newer than {target.tested}, the newest compared",)
    return ()
