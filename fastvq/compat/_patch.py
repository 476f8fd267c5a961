"""``fastvq.patch``: one line that makes the quantizers of a finished model faster."""

from __future__ import annotations

from torch import nn

from fastvq.compat._apply import apply
from fastvq.compat._registry import TARGETS
from fastvq.compat._report import PatchReport
from fastvq.compat._target import swap_back

__all__ = ["patch", "unpatch"]


def patch(module: nn.Module, *, strict: bool = False) -> PatchReport:
    """Make the quantizers inside ``module`` faster, in place.

    Quantizers of the packages in ``fastvq.compat`` are recognised by module path and class name, then checked by their
    attributes. What is swapped is the class of the object, to a subclass whose lookup, statistics and update are
    fastvq's: state_dict keys, parameters, buffers, hooks, optimiser references, device, dtype, kinds of returned
    values and the order of updates stay as they were. Indices are exact float64 ones, under autocast too
    (``fastvq.ops.nearest``); values are within float32 rounding of the original's. A call with an option that fastvq
    does not do runs the original code, bit for bit, and warns once with ``FallbackWarning``.

    Call it again at any time: what is patched stays so. Works before or after DistributedDataParallel wraps the
    model. ``copy.deepcopy`` and pickles of a patched module are patched; a state_dict fits patched and unpatched
    models alike.

    Args:
        module: any module, itself a quantizer or holding some.
        strict: raise unless every quantizer was replaced, and at least one.

    Returns:
        ``PatchReport(replaced, left, others, notes)``: what is faster; what fastvq knows and left as it is, with the
        reason; what is none of its quantizers (FSQ, LFQ and the like); and notes on installed versions.

    Raises:
        ValueError: a quantizer lies inside a module that ``torch.compile`` has compiled; patch, then compile. With
            ``strict``: something was left, or nothing was recognised.
        TypeError: ``module`` is no ``torch.nn.Module``.

    Example:
        >>> from vector_quantize_pytorch import VectorQuantize
        >>> model = nn.Sequential(VectorQuantize(dim=64, codebook_size=512))
        >>> print(fastvq.patch(model))
        fastvq: 1 faster, 0 left as is, 0 not of ours
        faster:
          0: vector_quantize_pytorch.VectorQuantize and 1 module inside it
    """
    return apply(module, TARGETS, strict=strict)


def unpatch(module: nn.Module) -> int:
    """Give every patched module inside ``module`` its own class back; returns how many there were."""
    if not isinstance(module, nn.Module):
        raise TypeError(f"fastvq.unpatch: module must be a torch.nn.Module, got {type(module).__name__}")
    return sum(swap_back(one) for one in list(module.modules()))
