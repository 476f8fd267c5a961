"""One style of error: the op, the argument, what was expected, what came, and what to do."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Sequence
from typing import NoReturn

import torch
from torch import Tensor

from fastvq import _env
from fastvq._shorten import shorten

__all__ = [
    "FLOATS",
    "LARGEST",
    "check_backend_name",
    "check_codebook",
    "check_codes",
    "check_dense",
    "check_float",
    "check_generator",
    "check_ids",
    "check_indices",
    "check_integer",
    "check_mask",
    "check_number",
    "check_option",
    "check_same_device",
    "check_sizes",
    "check_weight",
    "raise_bad_index",
]

LARGEST = 2**63 - 1
FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def check_option(op: str, argument: str, value: object, allowed: Iterable[str]) -> None:
    allowed = tuple(allowed)
    if not isinstance(value, str) or value not in allowed:  # comparing an array gives an array
        raise ValueError(f"{op}: {argument} must be one of {', '.join(map(repr, allowed))}, got {shorten(value)}")


def check_backend_name(op: str, backend: object) -> None:
    if backend is not None and not isinstance(backend, str):
        raise TypeError(f"{op}: backend must be the name of a backend or None, got {type(backend).__name__}")


def check_integer(op: str, argument: str, value: object) -> None:
    """An integer that 64 bits hold; callers check its range. torch's symbolic sizes are integers too."""
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        if isinstance(value, (bool, Tensor)) or not hasattr(value, "__index__"):
            raise TypeError(f"{op}: {argument} must be an integer, got {type(value).__name__} {shorten(value)}")
        try:
            value = operator.index(value)
        except TypeError:  # an array of integers
            raise TypeError(
                f"{op}: {argument} must be an integer, got {type(value).__name__} {shorten(value)}"
            ) from None
    if isinstance(value, int) and not -LARGEST <= value <= LARGEST:
        raise ValueError(f"{op}: {argument} must be below 2^63, got {shorten(value)}")


def check_sizes(op: str, argument: str, value: object) -> None:
    """A sequence of integers."""
    if isinstance(value, (str, bytes)) or not isinstance(value, Sequence):
        raise TypeError(f"{op}: {argument} must be a sequence of integers, got {type(value).__name__} {shorten(value)}")
    for i, size in enumerate(value):
        check_integer(op, f"{argument}[{i}]", size)


def check_number(op: str, argument: str, value: object) -> None:
    """A real number that a float holds, or a tensor or an array of one."""
    if type(value) is float:
        return
    if not isinstance(value, (bool, str, bytes, complex)) and hasattr(value, "__float__"):
        try:
            float(value)  # a tensor or an array of several, of none, of a complex one, or without memory has no number
            return
        except OverflowError:
            raise ValueError(f"{op}: {argument} must be a number that a float holds, got {shorten(value)}") from None
        except (TypeError, ValueError, RuntimeError):
            pass
    raise TypeError(f"{op}: {argument} must be a number, got {type(value).__name__} {shorten(value)}")


def check_weight(op: str, argument: str, value: float) -> None:
    """The weight of a loss."""
    check_number(op, argument, value)
    if not 0 <= value < math.inf:
        raise ValueError(f"{op}: {argument} must be finite and 0 or more, got {shorten(value)}")


def check_generator(op: str, value: object) -> None:
    if value is not None and not isinstance(value, torch.Generator):
        raise TypeError(f"{op}: generator must be a torch.Generator or None, got {type(value).__name__}")


def check_float(op: str, argument: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(
            f"{op}: {argument} must be a torch.Tensor, got {type(value).__name__}; convert it with torch.as_tensor"
        )
    if value.dtype not in FLOATS:
        raise TypeError(
            f"{op}: {argument} must be float32, float64, float16 or bfloat16, got {value.dtype}; "
            "convert it with .float()"
        )
    check_dense(op, argument, value)


def check_dense(op: str, argument: str, value: Tensor) -> None:
    if value.is_nested:
        raise TypeError(
            f"{op}: {argument} must be a dense tensor, got a nested one; pad it with torch.nested.to_padded_tensor and "
            "pass a mask"
        )
    if value.layout != torch.strided:
        raise TypeError(f"{op}: {argument} must be a dense tensor, got layout {value.layout}; convert with .to_dense()")


def check_same_device(op: str, first: str, a: Tensor, second: str, b: Tensor) -> None:
    if a.device != b.device:
        raise ValueError(
            f"{op}: {first} and {second} must be on one device, got {a.device} and {b.device}; move one with .to()"
        )


def check_codes(op: str, codebook: Tensor) -> None:
    """codebook [K, D] or [H, K, D] by itself."""
    check_float(op, "codebook", codebook)
    shape = list(codebook.shape)
    if codebook.dim() not in (2, 3):
        raise ValueError(f"{op}: codebook must be [K, D], or [H, K, D] with heads, got {shape}")
    for size, what in zip(reversed(shape), ("one element a code (D", "one code (K", "one head (H"), strict=False):
        if size == 0:
            raise ValueError(f"{op}: codebook must have at least {what} >= 1), got {shape}")


def check_codebook(op: str, x: Tensor, codebook: Tensor) -> None:
    """x [..., D] against codebook [K, D], or x [H, ..., D] against [H, K, D]."""
    check_float(op, "x", x)
    check_float(op, "codebook", codebook)
    check_same_device(op, "x", x, "codebook", codebook)
    if x.dim() < 1:
        raise ValueError(f"{op}: x must be [..., D], got a scalar; give one vector as x[None]")
    width = x.shape[-1]
    shape = list(codebook.shape)
    if width == 0:
        raise ValueError(
            f"{op}: x must be [..., D] with D >= 1, got {list(x.shape)}; vectors need at least one element"
        )
    if codebook.dim() not in (2, 3):
        raise ValueError(f"{op}: codebook must be [K, D], or [H, K, D] with heads, got {shape}")
    if codebook.shape[-1] != width:
        raise ValueError(
            f"{op}: codebook must be [K, D] with D = {width} to match x, got {shape}; transpose it or project x first"
        )
    if codebook.shape[-2] == 0:
        raise ValueError(f"{op}: codebook must hold at least one code (K >= 1), got {shape}")
    if codebook.dim() == 3:
        if x.dim() < 2 or x.shape[0] != codebook.shape[0]:
            raise ValueError(
                f"{op}: with a codebook [H, K, D] = {shape}, x must be [H, ..., D] with H = {codebook.shape[0]}, "
                f"got {list(x.shape)}; put the heads first or pass one codebook [K, D]"
            )
        if codebook.shape[0] == 0:
            raise ValueError(f"{op}: codebook must have at least one head (H >= 1), got {shape}")


def check_indices(op: str, argument: str, indices: object, lowest: int, n: int) -> Tensor:
    """Integers of any dtype as int64; TypeError for others, ValueError for values outside [lowest, n).

    The range is checked on a CPU. Elsewhere that would wait for the device: there only under FASTVQ_CHECK=1.
    """
    return check_ids(op, argument, indices, lowest, n)[0]


def check_ids(op: str, argument: str, indices: object, lowest: int, n: int) -> tuple[Tensor, bool]:
    """``check_indices``, and whether all of them are known to be at least 0."""
    if not isinstance(indices, Tensor):
        raise TypeError(
            f"{op}: {argument} must be an integer tensor, got {type(indices).__name__}; convert it with torch.as_tensor"
        )
    if indices.is_floating_point() or indices.is_complex() or indices.dtype == torch.bool:
        raise TypeError(f"{op}: {argument} must be an integer tensor, got {indices.dtype}; convert it with .long()")
    check_dense(op, argument, indices)
    if indices.dtype != torch.int64:
        indices = indices.long()
    if torch.compiler.is_compiling() or not indices.numel():
        return indices, False
    if indices.device.type == "cpu" or (not indices.is_meta and _env.read("FASTVQ_CHECK") in ("1", "2")):
        low, high = map(int, torch.aminmax(indices))
        if low < lowest or high >= n:
            bad = ((indices < lowest) | (indices >= n)).reshape(-1)
            raise_bad_index(op, argument, indices, lowest, n, int(bad.nonzero()[0]))
        return indices, low >= 0
    return indices, False


def raise_bad_index(op: str, argument: str, indices: Tensor, lowest: int, n: int, flat_row: int) -> NoReturn:
    """The error of the index at ``flat_row``, which lies outside [lowest, n)."""
    value = indices.reshape(-1)[flat_row].item()
    row = tuple(int(i) for i in torch.unravel_index(torch.tensor(flat_row, device="cpu"), indices.shape))
    no_code = " (-1: no code)" if lowest == -1 else ""
    raise ValueError(f"{op}: {argument} must be in [{lowest}, {n}){no_code}, got {value} at row {row}")


def check_mask(op: str, x: Tensor, mask: Tensor | None) -> None:
    """mask [...] bool, one element a vector of x [..., D]."""
    if mask is None:
        return
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"{op}: mask must be a bool tensor, got {got}; True marks a real vector, convert with .bool()")
    check_dense(op, "mask", mask)
    check_same_device(op, "x", x, "mask", mask)
    if mask.shape != x.shape[:-1]:
        raise ValueError(
            f"{op}: mask must be {list(x.shape[:-1])}, one element a vector of x {list(x.shape)}, "
            f"got {list(mask.shape)}; expand it to x.shape[:-1]"
        )
