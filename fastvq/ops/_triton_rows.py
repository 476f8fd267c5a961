# mypy: allow-untyped-defs
"""What Triton kernels over rows share: where a row lies, widening without a wrong bit, tiles of either order.

A tile of rows x columns has its columns in dimension ``AXIS``: 1 where a row's elements lie side by side, 0 where
neighbouring rows do (a channel-first image moved to channel-last), so that neighbouring threads read neighbouring
addresses either way.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

__all__ = ["at_least_float32", "axis_of", "code_strides", "finite", "row_offset", "saturate", "to_dtype", "to_float64"]


@triton.jit
def row_offset(row, n_inner, stride_outer, stride_inner):
    """Where ``row`` of a head starts, in elements (int64); the strides are those of ``fastvq.backends.views.Rows``.

    ``row`` is int32: a division of 64 bits is a hundred instructions and a call. See ``why_too_many_rows``
    in fastvq/backends/triton.py.
    """
    return (row // n_inner).to(tl.int64) * stride_outer + (row % n_inner).to(tl.int64) * stride_inner


@triton.jit
def at_least_float32(v):
    """float32, or float64 where it is: half types are widened before any arithmetic."""
    if v.dtype != tl.float64:
        v = v.to(tl.float32)
    return v


@triton.jit
def to_float64(v):
    """float64, by way of float32 for half types: the interpreter knows no other way from bfloat16."""
    return at_least_float32(v).to(tl.float64)


@triton.jit
def finite(v, axis: tl.constexpr):
    """Which rows of a tile of float32 or float64 hold no NaN and no infinity.

    Zero times either is NaN, which a sum keeps. (A sum of predicates is made a bit mask, which goes through memory.)
    """
    return tl.sum(v * 0.0, axis=axis) == 0


@triton.jit
def to_dtype(v, dtype: tl.constexpr):
    """float32 or float64 to any float type, to half types by way of float32, as torch does it."""
    if dtype != tl.float64:
        v = v.to(tl.float32)
    return v.to(dtype)


@triton.jit
def saturate(v, dtype: tl.constexpr):
    """float64 to float32 or float64; what lies beyond the largest finite number becomes that number. NaN stays NaN."""
    if dtype == tl.float64:
        most = tl.full([], 1.7976931348623157e308, tl.float64)
    else:
        most = tl.full([], 3.4028234663852886e38, tl.float64)
    v = tl.where(v > most, most, v)
    v = tl.where(v < -most, -most, v)
    return v.to(dtype)


def axis_of(stride_d: int, n_inner: int) -> int:
    """AXIS of a tensor's tiles: 1 where the elements of a row are adjacent or no two rows are, else 0."""
    return 1 if stride_d == 1 or n_inner == 1 else 0


def code_strides(
    codebook: Tensor,  # [K, D] or [H, K, D]
) -> tuple[int, int, int]:
    """Of a head, a code and an element."""
    return codebook.stride(0) if codebook.dim() == 3 else 0, codebook.stride(-2), codebook.stride(-1)
