# mypy: disable-error-code="no-untyped-def, no-untyped-call, has-type"
"""The definition on a GPU: d_k in float64, d = 0 ... D-1 in order, one accumulator, no fused multiply-add.

Every launch here passes ``enable_fp_fusion=False``. Division and square root of float64 are correctly rounded.
A lane holds one row and one code, so lanes side by side keep the order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastvq.ops._triton_rows import to_float64
from fastvq.ops.nearest.triton_filter import MAX_CANDIDATE_GROUPS, push_to_list


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


@triton.jit
def best_of_candidates(row, row_step, there, codes, stride_k, code_step, k, is_candidate, n_codes, dim,
               METRIC: tl.constexpr, UNROLL: tl.constexpr):  # fmt: skip
    """Least d_k of the candidates ``k`` [rows, codes] and its k, n_codes where there is none.

    UNROLL: elements loaded before the first is used.
    """
    code = codes + k * stride_k
    total = tl.zeros_like(k).to(tl.float64)
    square = tl.zeros_like(total)
    odd = tl.zeros_like(total)
    for d0 in range(0, dim, UNROLL):
        for i in tl.static_range(UNROLL):
            inside = (d0 + i + tl.zeros((1,), tl.int32)) < dim  # beyond, 0 is added, which changes no sum
            v = to_float64(tl.load(row, mask=there & inside, other=0.0))[:, None]
            c = to_float64(tl.load(code, mask=is_candidate & inside[None, :], other=0.0))
            total, square = step(v, c, total, square, METRIC)
            odd += c - c
            row += row_step
            code += code_step
    found = tl.where(is_candidate, distance(total, square, odd, METRIC), float("inf"))
    least = tl.min(found, axis=1)
    return least, tl.min(tl.where(is_candidate & (found == least[:, None]), k, n_codes), axis=1)


@triton.jit
def best_of_all(row_start, row_step, there, codes, stride_k, code_step, n_codes, dim,
                METRIC: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, UNROLL: tl.constexpr):  # fmt: skip
    """The nearest of all codes for the BM rows at ``row_start``; 0 for a row that is not finite."""
    least = tl.full((BM,), float("inf"), tl.float64)
    index = tl.zeros((BM,), tl.int64)
    odd_row = tl.zeros((BM,), tl.float64)
    for k0 in range(0, n_codes, BN):
        k = (k0 + tl.arange(0, BN).to(tl.int64))[None, :]
        row = row_start
        code = codes + k * stride_k
        total = tl.zeros((BM, BN), tl.float64)
        square = tl.zeros((1, BN), tl.float64)
        odd = tl.zeros((1, BN), tl.float64)
        for d0 in range(0, dim, UNROLL):
            for i in tl.static_range(UNROLL):
                inside = (d0 + i + tl.zeros((1,), tl.int32)) < dim
                v = to_float64(tl.load(row, mask=there & inside, other=0.0))
                c = to_float64(tl.load(code, mask=(k < n_codes) & inside[None, :], other=0.0))
                total, square = step(v[:, None], c, total, square, METRIC)
                odd += c - c
                odd_row += v - v
                row += row_step
                code += code_step
        found = distance(total, square, odd, METRIC)
        found = tl.where(k < n_codes, found, float("inf"))
        nearest = tl.min(found, axis=1)
        at = tl.min(tl.where(found == nearest[:, None], k, n_codes), axis=1)
        index = tl.where(nearest < least, at, index)
        least = tl.minimum(least, nearest)
    return tl.where(odd_row == 0, index, 0)


@triton.jit(do_not_specialize=["i_stride_h", "slab"])
def _rescore_candidates(
    x, x_stride_h, x_stride_n, x_stride_d, dim,
    codebook, c_stride_h, c_stride_k, c_stride_d, n_codes,
    indices, i_stride_h, slab,
    counters, listed, candidates, candidate_counts, pending,
    METRIC: tl.constexpr, GROUP: tl.constexpr, LANES: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """Listed rows with few candidates: the best of them by the definition. Other rows go to ``_exhaustive``."""
    head = tl.program_id(1).to(tl.int64)
    n_listed = tl.load(counters + head * 2)
    WIDE: tl.constexpr = MAX_CANDIDATE_GROUPS * GROUP
    j = tl.arange(0, WIDE)
    for tile in range(tl.program_id(0), tl.cdiv(n_listed, BM), tl.num_programs(0)):
        i = tile * BM + tl.arange(0, BM)
        there = i < n_listed
        r = tl.load(listed + head * slab + i, mask=there, other=0)
        n = tl.load(candidate_counts + head * slab + i, mask=there, other=0)
        few = there & (n <= MAX_CANDIDATE_GROUPS)
        push_to_list(counters + head * 2 + 1, pending + head * slab, r, there & ~few)
        is_candidate = few[:, None] & ((j // GROUP)[None, :] < n[:, None])
        k = tl.load(
            candidates + (head * slab + i)[:, None] * MAX_CANDIDATE_GROUPS + (j // GROUP)[None, :],
            mask=is_candidate,
            other=0,
        )
        k = k.to(tl.int64) + ((j % GROUP) * LANES)[None, :]
        is_candidate = is_candidate & (k < n_codes)
        row = x + head * x_stride_h + r.to(tl.int64) * x_stride_n
        _, index = best_of_candidates(row, x_stride_d, few, codebook + head * c_stride_h, c_stride_k, c_stride_d, k,
                                      is_candidate, n_codes, dim, METRIC, 1)  # fmt: skip
        tl.store(indices + head * i_stride_h + r, tl.where(index < n_codes, index, 0), mask=few)


@triton.jit(do_not_specialize=["n_rows", "i_stride_h", "slab"])
def _exhaustive(
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
        index = best_of_all(row_start, x_stride_d, there, codebook + head * c_stride_h, c_stride_k, c_stride_d,
                            n_codes, dim, METRIC, BM, BN, 1)  # fmt: skip
        tl.store(indices + head * i_stride_h + r, index, mask=there)
