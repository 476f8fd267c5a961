# mypy: allow-untyped-defs
"""What Triton kernels over rows share: where a row lies, widening without a wrong bit, tiles of either order.

A tile of rows x columns has its columns in dimension ``AXIS``: 1 where a row's elements lie side by side, 0 where
neighbouring rows do (a channel-first image moved to channel-last), so that neighbouring threads read neighbouring
addresses either way.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["axis_of", "narrow", "row_offset", "wide"]


@triton.jit
def row_offset(row, n_inner, stride_outer, stride_inner):
    """Where ``row`` (int64) of a head starts, in elements; the strides are those of ``fastvq._rows.Rows``."""
    return (row // n_inner) * stride_outer + (row % n_inner) * stride_inner


@triton.jit
def wide(v):
    """float64, by way of float32 for half types: the interpreter knows no other way from bfloat16."""
    if v.dtype != tl.float64:
        v = v.to(tl.float32)
    return v.to(tl.float64)


@triton.jit
def narrow(v, dtype: tl.constexpr):
    """float32 or float64 to any float type, to half types by way of float32, as torch does it."""
    if dtype != tl.float64:
        v = v.to(tl.float32)
    return v.to(dtype)


def axis_of(stride_d: int, n_inner: int) -> int:
    """AXIS of a tensor's tiles: 0 where its elements lie apart and its rows do not."""
    return 1 if stride_d == 1 or n_inner == 1 else 0
