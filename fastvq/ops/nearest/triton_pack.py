# mypy: disable-error-code="no-untyped-def, no-untyped-call, has-type"
"""Operands of the Triton filter: codes and rows rounded to 16 bits, and the columns that carry bias and error bound.

In units of a power of two per head (``scale``), with m a mean of the codes (euclidean and dot; 0 where useless),
c' = scale (c - m) (cosine: scale c / |c|) and x' = scale (x - m) (dot, cosine: any power of two times x),
the index is that of the largest t_k = x'.c'_k - |c'_k|^2 / 2 (dot, cosine: x'.c'_k). With x^ and c^ the 16-bit
operands, the tensor cores return ``upper_k >= t_k`` in one product, because five more columns ride along:

    row     256   1    2^-11   |x' - x^|   2^-8 |x'|
    code    ---- B_k ----      |c^_k|      2^8 (|c'_k - c^_k| + gamma |c^_k| + ...)

    B_k = -|c'_k|^2 / 2 + its own rounding + what the definition in float64 may lose, in three pieces

All norms are rounded up, residuals are measured, and gamma = (1.25 D' + 16) 2^-23 bounds the sum of D' products and
columns on tensor cores that align and truncate the 17 addends of a step of 16. They align a product by the exponents
of its operands, and that of a subnormal float16 is -14: gamma holds for the sum of max(|x_d|, 2^-14) max(|c_d|, 2^-14).
So with float16 SUBNORMAL is added to the norms |x'| and |c^_k| in the columns of the bound.

  what              tensor                         where
  mean              [H, D] float32                 ``_codebook_stats``
  info              [H, 2] float32                 scale; |m| in units of it
  flags             [H, 3] int32                   1: no certificate holds for this head; bits of the smallest norm
                                                   packed; bits of the smallest norm excluded as too large
  codes             [H, K', D'] 16 bits            ``_pack_codes``, zero beyond D and for codes that cannot win
  code_columns      [H, K', 16] 16 bits            the five columns, then the whole code where D <= 11
  norms, factors    [H, K'] float32                |c'_k|, or -1 for a code that cannot win; c' = factor (c - m)
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastvq.ops._triton_rows import to_float64

__all__ = ["COLUMNS", "FIRST_DATA", "gamma"]

COLUMNS: tl.constexpr = tl.constexpr(16)  # one step of the tensor cores
# Columns before this one hold the bias and the bound; the others hold vectors that are narrow enough.
FIRST_DATA: tl.constexpr = tl.constexpr(5)
MAX_CODE_NORM: tl.constexpr = tl.constexpr(4096.0)  # |c'|: half its square must fit in 256 times a float16
MAX_ROW_ELEMENT: tl.constexpr = tl.constexpr(60000.0)  # of a scaled row in float16
SAMPLE: tl.constexpr = tl.constexpr(256)  # codes that the mean and the scale are taken from
# More than twice 2^-14 sqrt(D' + 16) of the widest vectors that the filter takes.
SUBNORMAL: tl.constexpr = tl.constexpr(2.0**-6 * (1 + 2.0**-8))
# Marks an empty slot: the int32 bits of +inf, which no finite score has.
EMPTY_SLOT: tl.constexpr = tl.constexpr(0x7F800000)


def gamma(width: int) -> float:
    """Relative error of ``width`` products summed by tensor cores, for the sum of their absolute values."""
    return (1.25 * width + 16) * 2.0**-23


@triton.jit
def raised(v, IS_BF16: tl.constexpr):
    """A little above ``v >= 0``, so that the value rounded to 16 bits is not below v."""
    return v * (1 + (2.0**-7 if IS_BF16 else 2.0**-9)) + 2.0**-24


@triton.jit
def to_16_bits(v, IS_BF16: tl.constexpr):
    return v.to(tl.bfloat16) if IS_BF16 else v.to(tl.float16)


@triton.jit
def power_of_two(e):
    """2^e in float32, exactly, for -126 <= e <= 127."""
    return ((e + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _codebook_stats(
    codebook, stride_h, stride_k, stride_d, n_codes, dim,  # [H, K, D]
    mean, info, flags,
    METRIC: tl.constexpr, CENTRE: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """One program a head: the mean and the scale, from up to SAMPLE codes evenly spread. Any values are right."""
    head = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, SAMPLE)
    spread = n_codes > SAMPLE
    k = tl.where(spread, (i.to(tl.int64) * n_codes) // SAMPLE, i.to(tl.int64))
    there = k < n_codes
    rows = codebook + head * stride_h + k[:, None] * stride_k
    square = tl.zeros((SAMPLE,), tl.float64)
    for d0 in range(0, dim, BD):
        d = d0 + tl.arange(0, BD)
        inside = there[:, None] & (d < dim)[None, :]
        c = to_float64(tl.load(rows + d.to(tl.int64)[None, :] * stride_d, mask=inside, other=0.0))
        square += tl.sum(c * c, axis=1)
    used = there & (square <= 2.0**100)  # false for NaN
    n = tl.maximum(tl.sum(used.to(tl.int32)), 1)
    total = tl.sum(tl.where(used, square, 0.0))
    mean_square = total * 0
    if CENTRE:
        for d0 in range(0, dim, BD):
            d = d0 + tl.arange(0, BD)
            inside = used[:, None] & (d < dim)[None, :]
            c = to_float64(tl.load(rows + d.to(tl.int64)[None, :] * stride_d, mask=inside, other=0.0))
            m = (tl.sum(c, axis=0) / n).to(tl.float32).to(tl.float64)
            mean_square += tl.sum(m * m)
    # sum |c - m|^2 = sum |c|^2 - n |m|^2: the mean goes where that at least halves it.
    centred = (n * mean_square >= 0.5 * total) & (mean_square > 0)
    centred_square = tl.zeros((SAMPLE,), tl.float64)
    for d0 in range(0, dim, BD):
        d = d0 + tl.arange(0, BD)
        inside = used[:, None] & (d < dim)[None, :]
        c = to_float64(tl.load(rows + d.to(tl.int64)[None, :] * stride_d, mask=inside, other=0.0))
        m = tl.where(centred, (tl.sum(c, axis=0) / n).to(tl.float32), 0.0)
        tl.store(mean + head * dim + d, m, mask=d < dim)
        apart = tl.where(inside, c - m.to(tl.float64)[None, :], 0.0)
        centred_square += tl.sum(apart * apart, axis=1)
    mean_square = tl.where(centred, mean_square, 0.0)
    # A mean of exponents, not of norms: one huge code must not push all others to zero.
    exponent = ((centred_square.to(tl.int64, bitcast=True) >> 52) & 0x7FF).to(tl.int32) - 1023
    counted = used & (centred_square > 2.0**-100)
    average = tl.sum(tl.where(counted, exponent, 0)) // tl.maximum(tl.sum(counted.to(tl.int32)), 1)
    shift = 2 - average // 2
    if METRIC == 1:  # cosine: codes have norm 1
        shift = shift * 0 + 2
    regular = (shift >= -60) & (shift <= 60)
    scale = power_of_two(tl.where(regular, shift, 0))
    tl.store(info + head * 2, scale)
    tl.store(info + head * 2 + 1, tl.sqrt(mean_square.to(tl.float32)) * scale * (1 + 2.0**-10))
    tl.store(flags + head * 3, tl.where(regular, 0, 1))
    tl.store(flags + head * 3 + 1, EMPTY_SLOT)
    tl.store(flags + head * 3 + 2, EMPTY_SLOT)


@triton.jit
def _pack_codes(
    codebook, stride_h, stride_k, stride_d, n_codes, dim,  # [H, K, D]
    mean, info, flags,
    codes, code_columns, norms, factors, padded_codes, gamma,
    METRIC: tl.constexpr, IS_BF16: tl.constexpr, NARROW: tl.constexpr,  # NARROW: the code lies in the columns
    DP: tl.constexpr, BK: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1).to(tl.int64)
    k = tl.program_id(0).to(tl.int64) * BK + tl.arange(0, BK)
    there = k < n_codes
    rows = codebook + head * stride_h + k[:, None] * stride_k
    scale = tl.load(info + head * 2).to(tl.float64)
    raw_square = tl.zeros((BK,), tl.float64)
    square = tl.zeros((BK,), tl.float64)
    odd = tl.zeros((BK,), tl.float64)
    for d0 in range(0, dim, BD):
        d = d0 + tl.arange(0, BD)
        inside = there[:, None] & (d < dim)[None, :]
        c = to_float64(tl.load(rows + d.to(tl.int64)[None, :] * stride_d, mask=inside, other=0.0))
        m = tl.load(mean + head * dim + d, mask=d < dim, other=0.0).to(tl.float64)
        raw_square += tl.sum(c * c, axis=1)
        odd += tl.sum(c - c, axis=1)  # stays 0 for finite codes, becomes NaN for others
        v = tl.where(inside, (c - m[None, :]) * scale, 0.0)
        square += tl.sum(v * v, axis=1)
    finite = there & (odd == 0)
    same = tl.zeros((BK,), tl.int32)
    if METRIC == 1:
        held = finite & (raw_square >= 2.0**-230) & (raw_square <= 2.0**230)
        irregular = finite & ~held & (raw_square != 0)
        factor = scale / tl.sqrt(tl.where(held, raw_square, 1.0))
        norm = tl.where(held, scale, 0.0)
    else:
        factor = tl.zeros((BK,), tl.float64) + scale
        norm = tl.sqrt(square)
        held = finite & (norm <= MAX_CODE_NORM)
        excluded = finite & ~held
        irregular = excluded & (METRIC == 2)
        above = (norm * (1 + 2.0**-10)).to(tl.float32).to(tl.int32, bitcast=True)
        below = tl.minimum(norm * (1 - 2.0**-10), 2.0**120).to(tl.float32).to(tl.int32, bitcast=True)
        tl.atomic_min(flags + head * 3 + 1 + same, above, mask=held)
        tl.atomic_min(flags + head * 3 + 2 + same, below, mask=excluded)
    tl.atomic_max(flags + head * 3 + same, same + 1, mask=irregular)
    norm = tl.where(held, norm, 0.0)  # a column of NaN would make every score of the code NaN
    residual = tl.zeros((BK,), tl.float64)
    rounded_square = tl.zeros((BK,), tl.float64)
    at = (head * padded_codes + k)[:, None]
    for d0 in range(0, DP, BD):
        d = d0 + tl.arange(0, BD)
        inside = held[:, None] & (d < dim)[None, :]
        c = to_float64(tl.load(rows + d.to(tl.int64)[None, :] * stride_d, mask=inside, other=0.0))
        m = tl.load(mean + head * dim + d, mask=d < dim, other=0.0).to(tl.float64)
        v = tl.where(inside, (c - m[None, :]) * factor[:, None], 0.0)
        rounded = to_16_bits(v.to(tl.float32), IS_BF16)
        if NARROW:
            tl.store(
                code_columns + at * COLUMNS + FIRST_DATA + d[None, :], rounded, mask=(d < COLUMNS - FIRST_DATA)[None, :]
            )
        else:
            tl.store(codes + at * DP + d[None, :], rounded)
        back = to_float64(rounded)
        residual += tl.sum((v - back) * (v - back), axis=1)
        rounded_square += tl.sum(back * back, axis=1)
    rounded_norm = tl.sqrt(rounded_square)
    own = (dim + 3) * 2.0**-53
    subnormal = 0.0 if IS_BF16 else SUBNORMAL
    slope = tl.sqrt(residual) + 2.0**-50 * norm + gamma * (1 + 2.0**-8) * (rounded_norm + subnormal)
    # Subnormal pieces of the bias, which meet 256, 1 and 2^-11, are counted as 2^-14: together less than 2 SUBNORMAL.
    underflow = (dim + 1) * 2.0**-80 + gamma * (1 + 2.0**-8) * 2 * subnormal
    if METRIC == 0:
        half = 0.5 * norm * norm
        offset = (gamma * (1 + 2.0**-8) + 2.0**-22) * half + own * norm * norm
        bias = (offset + 2.0**-34 + underflow) * (1 + 2.0**-8) - half
    else:
        slope += 2 * own * (norm + tl.load(info + head * 2 + 1)) if METRIC == 2 else 2 * (own + 2.0**-50) * norm
        bias = tl.zeros((BK,), tl.float64) + 2.0**-34 + underflow
    bias = tl.where(held, bias, -256 * MAX_ROW_ELEMENT).to(tl.float32)
    first = to_16_bits(bias * 2.0**-8, IS_BF16)
    rest = bias - first.to(tl.float32) * 256
    second = to_16_bits(rest, IS_BF16)
    third = to_16_bits((rest - second.to(tl.float32)) * 2048, IS_BF16)
    grown = to_16_bits(raised(((1 + 2.0**-8) * (1 + gamma) * rounded_norm).to(tl.float32), IS_BF16), IS_BF16)
    slope16 = to_16_bits(raised(((1 + 2.0**-8) * slope).to(tl.float32) * 256, IS_BF16), IS_BF16)
    line = (head * padded_codes + k) * COLUMNS
    tl.store(code_columns + line, first)
    tl.store(code_columns + line + 1, second)
    tl.store(code_columns + line + 2, third)
    tl.store(code_columns + line + 3, grown)
    tl.store(code_columns + line + 4, slope16)
    if not NARROW:
        rest_of_line = FIRST_DATA + tl.arange(0, COLUMNS)
        zero = to_16_bits(tl.zeros((BK, COLUMNS), tl.float32), IS_BF16)
        tl.store(code_columns + line[:, None] + rest_of_line[None, :], zero, mask=(rest_of_line < COLUMNS)[None, :])
    tl.store(norms + head * padded_codes + k, tl.where(held, norm * (1 + 2.0**-10), -1.0).to(tl.float32))
    tl.store(factors + head * padded_codes + k, tl.where(held, factor, 0.0).to(tl.float32))
