# mypy: disable-error-code="no-untyped-def, no-untyped-call, has-type"
"""The definition on a GPU: d_k in float64, d = 0 ... D-1 in order, one accumulator, no fused multiply-add.

Every launch here passes ``enable_fp_fusion=False``. Division and square root of float64 are correctly rounded.
A lane holds one row and one code, so lanes side by side keep the order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastvq.ops.nearest.triton_filter import ROOM, append
from fastvq.ops.nearest.triton_pack import wide


@triton.jit
def step(v, c, total, square, METRIC: tl.constexpr):
    if METRIC == 0:
        t = v - c
        return total + t * t, square
    if METRIC == 1:
        square += c * c
    return total + v * c, square


@triton.jit
def distance(total, square, odd, METRIC: tl.constexpr):
    """d_k, infinite where the code may not win."""
    d = total if METRIC == 0 else -total
    if METRIC == 1:
        d = tl.where(square == 0, float("inf"), d / tl.sqrt(tl.where(square == 0, 1.0, square)))
    return tl.where((d == d) & (odd == 0), d, float("inf"))


@triton.jit(do_not_specialize=["i_stride_h", "slab"])
def _few(
    x, x_stride_h, x_stride_n, x_stride_d, dim,
    codebook, c_stride_h, c_stride_k, c_stride_d, n_codes,
    indices, i_stride_h, slab,
    counters, listed, candidates, candidate_counts, pending,
    METRIC: tl.constexpr, GROUP: tl.constexpr, LANES: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """Listed rows of few candidates: the best of these. Rows of more are left to ``_scan``."""
    head = tl.program_id(1).to(tl.int64)
    n_listed = tl.load(counters + head * 2)
    WIDE: tl.constexpr = ROOM * GROUP
    j = tl.arange(0, WIDE)
    for tile in range(tl.program_id(0), tl.cdiv(n_listed, BM), tl.num_programs(0)):
        i = tile * BM + tl.arange(0, BM)
        there = i < n_listed
        r = tl.load(listed + head * slab + i, mask=there, other=0)
        n = tl.load(candidate_counts + head * slab + i, mask=there, other=0)
        few = there & (n <= ROOM)
        append(counters + head * 2 + 1, pending + head * slab, r, there & ~few)
        noted = few[:, None] & ((j // GROUP)[None, :] < n[:, None])
        k = tl.load(candidates + (head * slab + i)[:, None] * ROOM + (j // GROUP)[None, :], mask=noted, other=0)
        k = k.to(tl.int64) + ((j % GROUP) * LANES)[None, :]
        noted = noted & (k < n_codes)
        row = x + head * x_stride_h + r.to(tl.int64) * x_stride_n
        code = codebook + head * c_stride_h + k * c_stride_k
        total = tl.zeros((BM, WIDE), tl.float64)
        square = tl.zeros((BM, WIDE), tl.float64)
        odd = tl.zeros((BM, WIDE), tl.float64)
        for _ in range(0, dim):
            v = wide(tl.load(row, mask=few, other=0.0))[:, None]
            c = wide(tl.load(code, mask=noted, other=0.0))
            total, square = step(v, c, total, square, METRIC)
            odd += c - c
            row += x_stride_d
            code += c_stride_d
        found = tl.where(noted, distance(total, square, odd, METRIC), float("inf"))
        least = tl.min(found, axis=1)[:, None]
        index = tl.min(tl.where(noted & (found == least), k, n_codes), axis=1)
        tl.store(indices + head * i_stride_h + r, tl.where(index < n_codes, index, 0), mask=few)


@triton.jit(do_not_specialize=["n_rows", "i_stride_h", "slab"])
def _scan(
    x, x_stride_h, x_stride_n, x_stride_d, n_rows, dim,
    codebook, c_stride_h, c_stride_k, c_stride_d, n_codes,
    indices, i_stride_h, slab,
    counters, pending,
    METRIC: tl.constexpr, LISTED: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Every code for the rows of a list (LISTED), or for all rows."""
    head = tl.program_id(1).to(tl.int64)
    n = n_rows
    if LISTED:
        n = tl.load(counters + head * 2 + 1)
    for tile in range(tl.program_id(0), tl.cdiv(n, BM), tl.num_programs(0)):
        i = tile * BM + tl.arange(0, BM)
        there = i < n
        r = i
        if LISTED:
            r = tl.load(pending + head * slab + i, mask=there, other=0)
        row_start = x + head * x_stride_h + r.to(tl.int64) * x_stride_n
        least = tl.full((BM,), float("inf"), tl.float64)
        index = tl.zeros((BM,), tl.int64)
        odd_row = tl.zeros((BM,), tl.float64)
        for k0 in range(0, n_codes, BN):
            k = (k0 + tl.arange(0, BN).to(tl.int64))[None, :]
            row = row_start
            code = codebook + head * c_stride_h + k * c_stride_k
            total = tl.zeros((BM, BN), tl.float64)
            square = tl.zeros((1, BN), tl.float64)
            odd = tl.zeros((1, BN), tl.float64)
            for _ in range(0, dim):
                v = wide(tl.load(row, mask=there, other=0.0))
                c = wide(tl.load(code, mask=k < n_codes, other=0.0))
                total, square = step(v[:, None], c, total, square, METRIC)
                odd += c - c
                odd_row += v - v
                row += x_stride_d
                code += c_stride_d
            found = distance(total, square, odd, METRIC)
            found = tl.where(k < n_codes, found, float("inf"))
            nearest = tl.min(found, axis=1)
            at = tl.min(tl.where(found == nearest[:, None], k, n_codes), axis=1)
            index = tl.where(nearest < least, at, index)
            least = tl.minimum(least, nearest)
        tl.store(indices + head * i_stride_h + r, tl.where(odd_row == 0, index, 0), mask=there)
