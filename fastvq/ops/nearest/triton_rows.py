# mypy: disable-error-code="no-untyped-def, no-untyped-call, has-type"
"""Rows as the Triton filter takes them: rounded to 16 bits, with the columns that meet the codes' (``triton_pack``).

Row scale: the head's scale (euclidean: bias and product must be in one unit), or the power of two that brings the
row's largest element to 8 ... 16 (dot, cosine: a positive factor of the row changes no choice).
A row that the filter cannot hold (not finite, beyond float16, so long that a code left out might be nearest) gets a
norm of NaN: no comparison with it succeeds.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastvq.ops._triton_rows import to_float64
from fastvq.ops.nearest.triton_pack import (
    COLUMNS,
    FIRST_DATA,
    MAX_ROW_ELEMENT,
    SUBNORMAL,
    power_of_two,
    raised,
    to_16_bits,
)

MAX_ROW_NORM: tl.constexpr = tl.constexpr(2.0**23)  # |x'|: 2^-8 of it must fit in a float16
SMALLEST_SEEN: tl.constexpr = tl.constexpr(2.0**-74)  # squares of smaller differences underflow in float32


@triton.jit
def away_from(v, m):
    """v - m in the wider of v's type and float32, rounded to float32."""
    return (to_float64(v) - m.to(tl.float64)).to(tl.float32) if v.dtype == tl.float64 else v.to(tl.float32) - m


@triton.jit
def row_piece(x, at, there, stride_d, mean, d, dim, SHIFT: tl.constexpr):
    """Elements ``d`` of rows at ``x + at``, less the mean where SHIFT says so: [rows, len(d)] float32."""
    inside = there[:, None] & (d < dim)[None, :]
    v = tl.load(x + at[:, None] + d.to(tl.int64)[None, :] * stride_d, mask=inside, other=0.0)
    if SHIFT:
        m = tl.load(mean + d, mask=d < dim, other=0.0)
        return tl.where(inside, away_from(v, m[None, :]), 0.0)
    return away_from(v, tl.zeros_like(v).to(tl.float32))


@triton.jit
def row_scale(top, scale, METRIC: tl.constexpr):
    if METRIC == 0:
        return tl.zeros_like(top) + scale
    exponent = ((top.to(tl.int32, bitcast=True) >> 23) & 0xFF) - 127
    return power_of_two(tl.minimum(tl.maximum(3 - exponent, -100), 100))


@triton.jit
def round_piece(f, IS_BF16: tl.constexpr):
    """Scaled elements as 16 bits. Elements out of range become 0; the filter does not serve their row anyway."""
    return to_16_bits(tl.where(tl.abs(f) <= MAX_ROW_ELEMENT, f, 0.0), IS_BF16)


@triton.jit
def norms_of(square, residual, top, flags, dim, METRIC: tl.constexpr, SHIFTED_X: tl.constexpr):
    """(|x'|, |x' - x^|) from their squares, rounded up; |x'| is NaN for a row that the filter cannot hold."""
    up = 1 + (dim + 16) * 2.0**-24
    norm = tl.sqrt(square) * up + dim * SMALLEST_SEEN
    off = tl.sqrt(residual) * up + dim * SMALLEST_SEEN
    if SHIFTED_X:  # x' itself was rounded to float32
        off += 2.0**-23 * norm
    flags += tl.zeros_like(norm).to(tl.int32)  # loaded once a row: the interpreter mixes no scalar into a mask
    good = (norm <= MAX_ROW_NORM) & (top <= MAX_ROW_ELEMENT) & (tl.load(flags) == 0)
    if METRIC == 0:
        # Served only if every excluded code is longer than 2 |x'| + |c'|, c' the shortest packed code.
        shortest = tl.load(flags + 1).to(tl.float32, bitcast=True)
        left_out = tl.load(flags + 2).to(tl.float32, bitcast=True)
        reach = (2 * norm + shortest) * (1 + 2.0**-8)
        good = good & (reach < left_out) & (shortest <= MAX_ROW_NORM)
    return tl.where(good, norm, float("nan")), off


@triton.jit
def columns_of(norm, off, f, IS_BF16: tl.constexpr, NARROW: tl.constexpr):
    """The rows' columns [rows, 16]: multipliers of the bias, norms of the bound, and ``f`` where NARROW.

    f: the scaled row itself, its first element in column FIRST_DATA.
    """
    j = tl.arange(0, COLUMNS)[None, :]
    good = norm >= 0
    # Twice SUBNORMAL: so the column itself is no subnormal number.
    length = tl.where(good, raised((norm + (0.0 if IS_BF16 else 2 * SUBNORMAL)) * 2.0**-8, IS_BF16), 0.0)
    error = tl.where(good, raised(off, IS_BF16), 0.0)
    v = tl.where(j == 0, 256.0, tl.where(j == 1, 1.0, tl.where(j == 2, 2.0**-11, 0.0)))
    v = tl.where(j == 3, error[:, None], tl.where(j == 4, length[:, None], v))
    if NARROW:
        v = tl.where((j < FIRST_DATA) | ~good[:, None], v, tl.where(tl.abs(f) <= MAX_ROW_ELEMENT, f, 0.0))
    return to_16_bits(v, IS_BF16)


@triton.jit(do_not_specialize=["n_rows", "slab"])
def _pack_rows(
    x, stride_h, stride_n, stride_d, n_rows, dim,  # [H, N, D]
    mean, info, flags,
    rows, row_columns, row_norms, row_scales, slab,
    METRIC: tl.constexpr, SHIFT: tl.constexpr, SHIFTED_X: tl.constexpr, IS_BF16: tl.constexpr, NARROW: tl.constexpr,
    DP: tl.constexpr, BR: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """rows [H, slab, D'], row_columns [H, slab, 16], row_norms and row_scales [H, slab]."""
    head = tl.program_id(1).to(tl.int64)
    r = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    there = r < n_rows
    at = r * stride_n
    x += head * stride_h
    mean += head * dim
    scale = tl.load(info + head * 2)
    top = tl.zeros((BR,), tl.float32)
    if METRIC != 0:
        for d0 in range(0, dim, BD):
            f = row_piece(x, at, there, stride_d, mean, d0 + tl.arange(0, BD), dim, SHIFT)
            top = tl.maximum(top, tl.max(tl.abs(f), axis=1))
    factor = row_scale(top, scale, METRIC)
    top *= factor
    square = tl.zeros((BR,), tl.float32)
    residual = tl.zeros((BR,), tl.float32)
    line = head * slab + r
    for d0 in range(0, DP, BD):
        d = d0 + tl.arange(0, BD)
        f = row_piece(x, at, there, stride_d, mean, d, dim, SHIFT) * factor[:, None]
        if METRIC == 0:
            top = tl.maximum(top, tl.max(tl.abs(f), axis=1))
        rounded = round_piece(f, IS_BF16)
        if not NARROW:
            tl.store(rows + line[:, None] * DP + d[None, :], rounded, mask=there[:, None])
        square += tl.sum(f * f, axis=1)
        gap = f - rounded.to(tl.float32)
        residual += tl.sum(gap * gap, axis=1)
    norm, off = norms_of(square, residual, top, flags + head * 3, dim, METRIC, SHIFTED_X)
    own = norm[:, None]
    if NARROW:
        d = tl.arange(0, COLUMNS) - FIRST_DATA
        own = row_piece(x, at, there, stride_d, mean, tl.where(d < 0, dim, d), dim, SHIFT) * factor[:, None]
    columns = columns_of(norm, off, own, IS_BF16, NARROW)
    tl.store(row_columns + line[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :], columns, mask=there[:, None])
    tl.store(row_norms + line, norm, mask=there)
    tl.store(row_scales + line, factor, mask=there)
