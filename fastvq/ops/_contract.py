"""What the kernels rely on, checked in the registered ops, which graphs and exports call without the public functions.

A call that is right passes a few comparisons. One that is not gets the message of the public function's check.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from fastvq._checks import FLOATS, check_codebook, check_indices, check_mask, check_option, raise_bad_index
from fastvq.backends import cpu as cpu_backend
from fastvq.backends import views

__all__ = [
    "check_choices",
    "check_gradient",
    "check_lookup",
    "check_overlap",
    "check_tensor",
    "checking_indices",
    "count_real",
]

METRICS = ("euclidean", "cosine", "dot")
PRECISIONS = ("exact", "fast")


def check_lookup(op: str, x: Tensor, codebook: Tensor, mask: Tensor | None = None) -> None:
    """x [..., D] against codebook [K, D], or x [H, ..., D] against [H, K, D]; mask [...] or [H, ...]."""
    shape, codes = x.shape, codebook.shape
    if not (
        shape
        and shape[-1] == codes[-1]
        and 0 not in codes
        and (len(codes) == 2 or (len(codes) == 3 and len(shape) > 1 and shape[0] == codes[0]))
        and x.dtype in FLOATS
        and codebook.dtype in FLOATS
        and x.device == codebook.device
    ):
        check_codebook(op, x, codebook)
    if mask is not None and (mask.dtype != torch.bool or mask.shape != shape[:-1] or mask.device != x.device):
        check_mask(op, x, mask)


def check_choices(op: str, metric: str, precision: str) -> None:
    check_option(op, "metric", metric, METRICS)
    check_option(op, "precision", precision, PRECISIONS)


def check_tensor(
    op: str, name: str, value: Tensor, shape: tuple[int, ...], dtype: torch.dtype | None, device: torch.device
) -> None:
    """ValueError unless ``value`` has exactly that shape, dtype (None: any float) and device."""
    fits = value.dtype in FLOATS if dtype is None else value.dtype == dtype
    if not fits or value.shape != shape or value.device != device:
        wanted = "a float type" if dtype is None else dtype
        raise ValueError(
            f"{op}: {name} must be {wanted} {list(shape)} on {device}, got {value.dtype} {list(value.shape)} on "
            f"{value.device}; pass what the forward op took or returned"
        )


def check_gradient(op: str, name: str, value: Tensor | None, like: Tensor) -> None:
    if value is not None:
        check_tensor(op, name, value, like.shape, like.dtype, like.device)


def checking_indices(op: str, run: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """``run`` of a gradient by a backend that does not look at the indices itself. The CPU kernels do, as they count.

    The second argument of its call is the codebook [..., K, D].
    """

    def checked(call: Any) -> Any:
        check_indices(op, "indices", call.indices, -1, call[1].shape[-2])
        return run(call)

    return checked


def count_real(
    op: str,
    indices: Tensor,  # [...] or [..., Q] with Q levels, contiguous, on the CPU
    n_codes: int,
    n_levels: int = 1,
) -> int:
    """How many vectors have a code. ValueError on the first index that is neither -1 nor a code, and on a vector that
    has a code on some levels alone."""
    n_rows = indices.numel() // n_levels
    first_bad, n_real = cpu_backend._cpu.count_indices(views.address(indices), n_rows, n_levels, n_codes)
    if first_bad >= 0:
        raise_bad_index(op, "indices", indices, -1, n_codes, first_bad)
    return int(n_real)


def check_overlap(op: str, written: dict[str, Tensor], read: dict[str, Tensor]) -> None:
    """RuntimeError, as torch's own in-place functions raise, where a tensor that is written has two elements in one
    place of memory, or shares a place with another tensor of the call."""
    if _apart(written.values(), read.values()):
        return
    for name, value in written.items():
        if not value.is_contiguous() and _repeats(value):
            raise RuntimeError(
                f"{op}: unsupported operation: more than one element of the written-to tensor {name} refers to a "
                "single memory location. Please clone() the tensor before performing the operation."
            )
    names = list(written)
    spans = {name: _span(value) for name, value in (written | read).items()}
    for i, first in enumerate(names):
        for second in (*names[i + 1 :], *read):
            (low, high), (other_low, other_high) = spans[first], spans[second]
            if low < other_high and other_low < high and _shares(written[first], (written | read)[second]):
                raise RuntimeError(
                    f"{op}: unsupported operation: some elements of {second} and of the written-to tensor {first} "
                    "refer to a single memory location. Please clone() the tensor before performing the operation."
                )


def _apart(written: Iterable[Tensor], read: Iterable[Tensor]) -> bool:
    """Whether it takes only addresses to see that nothing is shared, as in almost every call: 2 microseconds."""
    spans = []
    for t in written:
        if not t.is_contiguous():
            return False
        at = t.data_ptr()
        spans.append((at, at + t.nbytes))
    for t in read:
        at = t.data_ptr()
        spans.append((at, at + t.nbytes) if t.is_contiguous() else _span(t))
    spans.sort()
    end = 0
    for low, high in spans:
        if low < end:
            return False
        end = high
    return True


def _span(t: Tensor) -> tuple[int, int]:
    """The addresses that hold ``t``, from the first byte to one past the last; torch has no negative strides."""
    at = t.data_ptr()
    if t.numel() == 0:
        return at, at
    reach = sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
    return at, at + (reach + 1) * t.element_size()


def _repeats(t: Tensor) -> bool:
    if any(stride == 0 and size > 1 for size, stride in zip(t.shape, t.stride(), strict=True)):
        return True
    # Dimensions from the innermost out: each has to step over all that the ones within reach.
    reach = 0
    for stride, size in sorted(zip(t.stride(), t.shape, strict=True)):
        if size > 1:
            if stride <= reach:
                return _counted(t)
            reach += (size - 1) * stride
    return False


def _counted(t: Tensor) -> bool:
    places = _places(t, 0)
    return places.unique().numel() < places.numel()


def _shares(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors whose spans overlap have a place in common: interleaved views need not."""
    if a.is_contiguous() and b.is_contiguous():
        return True
    low = min(a.data_ptr(), b.data_ptr())
    return bool(torch.isin(_places(a, low), _places(b, low)).any())


def _places(t: Tensor, low: int) -> Tensor:
    """The pairs of bytes that hold the elements of ``t``, counted from the address ``low`` on."""
    size = t.element_size()
    pair = torch.full((1,), (t.data_ptr() - low if low else 0) // 2, dtype=torch.int64, device="cpu")
    for n, stride in zip(t.shape, t.stride(), strict=True):
        pair = (pair[:, None] + torch.arange(n, device="cpu") * (stride * size // 2)).reshape(-1)
    return (pair[:, None] + torch.arange(max(1, size // 2), device="cpu")).reshape(-1)
