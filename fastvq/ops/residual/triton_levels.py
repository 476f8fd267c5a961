# mypy: disable-error-code="no-untyped-def, no-untyped-call, has-type"
"""All levels of residual quantization in one launch: a program keeps its rows' residual in registers.

                        for each level q
  residual [BM, D']     1. rounded to 16 bits, with the columns of its bound (triton_rows.py)
  (kept)                2. upper bounds of all codes, BN at a time (triton_filter.py): in each lane the two best groups
                           with their block numbers, and the third best, a bound on all groups that have no name
                        3. the best group in float32: the index proved, or a threshold below the nearest's score
                        4. rows not proved: the named groups that reach the threshold, by the definition in float64;
                           every code where a group without a name may reach it, or where the row is not the filter's
                        5. residual -= code; the squares of the difference, in float64
  at the end            the codes are gathered again, in order, and their sum is written

The codebooks are packed before, as heads of one codebook, in two launches. Step 4 stays in the program: it writes the
residuals of the open rows alone, to the place where the sums of their codes go later, and lists those rows in a
workspace of 8 (LANES + 1) bytes a row. Apart from that each row is read once, and its sum and indices are written once,
for any number of levels. The bound and the definition are those of a launch a level, so the indices are the same.

``served`` is the rule when this kernel is used; elsewhere triton_ops.py makes a launch a level. Wider rows than WIDEST
do not fit: at D = 256 the residual alone takes 64 of a thread's 255 registers, and the compiler spills 300 bytes.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastvq.backends import triton as triton_backend
from fastvq.backends.tiles import Tile, pick
from fastvq.ops.nearest import triton_ops as lookup
from fastvq.ops.nearest.triton_exact import best_of_all, best_of_candidates
from fastvq.ops.nearest.triton_filter import LOWEST, multiplied, separated, upper_bounds
from fastvq.ops.nearest.triton_pack import COLUMNS, FIRST_DATA
from fastvq.ops.nearest.triton_rows import columns_of, norms_of, round_piece, row_scale

__all__ = ["TILES", "as_work", "residual_quantize", "served"]

WIDEST = 128  # elements of a row whose residual the registers hold
MOST_ROWS = (
    triton_backend.ROWS_OF_ALL_LEVELS
)  # more are faster a launch a level: the lookup's kernels keep a card busier


def _rows(capability: int, dim: int, **meta: int) -> Tile:
    return Tile(capability, dim, torch.float16, meta)


# fmt: off
TILES = [
    _rows(80, 64, BM=128, BN=64, GROUP=8, num_warps=8, num_stages=3),
    _rows(80, 128, BM=64, BN=64, GROUP=8, num_warps=8, num_stages=3),
]
# fmt: on


@triton.jit
def as_work(v, WORK: tl.constexpr):
    """Exact in WORK, float32 or float64. By way of float32: the interpreter converts bfloat16 to nothing else."""
    return v if v.dtype == WORK else v.to(tl.float32).to(WORK)


@triton.jit
def best_groups(
    tile, columns, codes, code_columns, n_blocks,
    INTERPRETED: tl.constexpr, NARROW: tl.constexpr, SPLIT_BIAS: tl.constexpr, BITS: tl.constexpr,
    DP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """The largest upper bounds of groups in each lane, [BM, BN / GROUP]: two with block numbers, and the next.

    SPLIT_BIAS: Triton assigns different layouts to two chained dots when a warp has fewer than 16 rows, and converts
    every score between them. Computing the bias product separately and subtracting it avoids the conversion; the extra
    rounding is covered by gamma.
    """
    LANES: tl.constexpr = BN // GROUP
    MASK: tl.constexpr = (1 << BITS) - 1
    best = tl.full((BM, LANES), LOWEST, tl.float32)
    second = tl.full((BM, LANES), LOWEST, tl.float32)
    third = tl.full((BM, LANES), LOWEST, tl.float32)
    for b in range(0, n_blocks):
        upper = upper_bounds(tile, -columns if SPLIT_BIAS else columns, codes, 0, codes, code_columns, b * BN,
                             INTERPRETED, NARROW or SPLIT_BIAS, True, DP, BM, BN, DP)  # fmt: skip
        if SPLIT_BIAS:
            code = tl.load(codes + b * BN * DP + (tl.arange(0, BN) * DP)[:, None] + tl.arange(0, DP)[None, :])
            upper = multiplied(tile, code, tl.zeros((BM, BN), tl.float32), INTERPRETED) - upper
        top = tl.max(tl.reshape(upper, (BM, GROUP, LANES)), axis=1)
        top = ((top.to(tl.int32, bitcast=True) & ~MASK) | b).to(tl.float32, bitcast=True)
        lesser = tl.minimum(best, top)
        best = tl.maximum(best, top)
        third = tl.maximum(third, tl.minimum(second, lesser))
        second = tl.maximum(second, lesser)
    return best, second, third


@triton.jit
def scores_of(f, group, codebook, stride_k, stride_d, mean, norms, factors, d, dim,
              METRIC: tl.constexpr, SHIFT: tl.constexpr, GROUP: tl.constexpr, LANES: tl.constexpr,
              BM: tl.constexpr):  # fmt: skip
    """Scores in float32 of the codes of each row's group, [BM, GROUP], lowest for those that cannot win."""
    column = (d >= 0) & (d < dim)
    member = tl.arange(0, GROUP)[None, :]
    score = tl.full((BM, GROUP), LOWEST, tl.float32)
    for j in range(0, GROUP):
        k = group + j * LANES
        held = tl.load(norms + k) >= 0
        inside = held[:, None] & column[None, :]
        from_code = codebook + k.to(tl.int64)[:, None] * stride_k + d.to(tl.int64)[None, :] * stride_d
        c = as_work(tl.load(from_code, mask=inside, other=0.0), tl.float32)
        if SHIFT:
            c = c - tl.load(mean + d, mask=column, other=0.0)[None, :]
        c = c * tl.load(factors + k)[:, None]
        found = tl.sum(c * (f - 0.5 * c if METRIC == 0 else f), axis=1)
        score = tl.where((member == j) & held[:, None], found[:, None], score)
    return score


@triton.jit
def lifted(v, packing):
    """At least the bound that ``v`` was before a block number replaced its low bits."""
    return v + tl.abs(v) * packing


@triton.jit
def list_open_rows(
    best, second, third, least, packing, finite, open_row, bounds, thresholds, listed, BM: tl.constexpr,
    LANES: tl.constexpr,
):  # fmt: skip
    """Lists the open rows: from the front those whose candidate groups are all known, from the back those to scan."""
    few = open_row & finite & (tl.max(lifted(third, packing), axis=1) < least)
    scanned = open_row & ~few
    r = tl.arange(0, BM)
    tl.store(listed + tl.cumsum(few.to(tl.int32)) - 1, r, mask=few)
    tl.store(listed + BM - tl.cumsum(scanned.to(tl.int32)), r, mask=scanned)
    tl.store(thresholds + r, least, mask=few)
    line = bounds + r[:, None] * (2 * LANES) + tl.arange(0, LANES)[None, :]
    tl.store(line, best, mask=few[:, None])
    tl.store(line + LANES, second, mask=few[:, None])
    return tl.sum(few.to(tl.int32)), tl.sum(scanned.to(tl.int32))


@triton.jit
def resolve_open_rows(
    n_few, n_scanned, bounds, thresholds, listed, packing, rest, dim, codebook, stride_k, stride_d, n_codes,
    indices, stride_i,
    METRIC: tl.constexpr, BITS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, GROUP: tl.constexpr,
    FEW: tl.constexpr, NAMED: tl.constexpr, SCANNED: tl.constexpr, SCAN_N: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """The indices of the listed rows, by the definition: FEW rows and NAMED of their groups at a time."""
    MASK: tl.constexpr = (1 << BITS) - 1
    LANES: tl.constexpr = BN // GROUP
    lane = tl.arange(0, 2 * LANES)[None, :]
    slot = tl.arange(0, NAMED)[None, :]
    for t in range(0, n_few, FEW):
        i = t + tl.arange(0, FEW)
        there = i < n_few
        r = tl.load(listed + i, mask=there, other=0)
        threshold = tl.load(thresholds + r, mask=there, other=float("inf"))
        bound = tl.load(bounds + r[:, None] * (2 * LANES) + lane)
        reaches = there[:, None] & (lifted(bound, packing) >= threshold[:, None])
        rank = tl.where(reaches, tl.cumsum(reaches.to(tl.int32), axis=1) - 1, -1)
        group = (bound.to(tl.int32, bitcast=True) & MASK) * BN + lane % LANES
        n = tl.sum(reaches.to(tl.int32), axis=1)
        least = tl.full((FEW,), float("inf"), tl.float64)
        index = tl.zeros((FEW,), tl.int64) + n_codes
        for s in range(0, tl.max(n), NAMED):
            named = tl.where(rank[:, None, :] == (s + slot)[:, :, None], group[:, None, :], 0)
            first = tl.sum(named, axis=2)
            k = tl.reshape(first[:, :, None] + (tl.arange(0, GROUP) * LANES)[None, None, :], (FEW, NAMED * GROUP))
            chosen = (s + slot < n[:, None])[:, :, None] & (tl.arange(0, GROUP) >= 0)[None, None, :]
            chosen = tl.reshape(chosen, (FEW, NAMED * GROUP)) & (k < n_codes)
            found, at = best_of_candidates(rest + r.to(tl.int64) * dim, 1, there, codebook, stride_k, stride_d,
                                           k.to(tl.int64), chosen, n_codes, dim, METRIC, UNROLL)  # fmt: skip
            index = tl.where((found < least) | ((found == least) & (at < index)), at, index)
            least = tl.minimum(least, found)
        tl.store(indices + r * stride_i, tl.where(index < n_codes, index, 0), mask=there)
    for t in range(0, n_scanned, SCANNED):
        i = t + tl.arange(0, SCANNED)
        there = i < n_scanned
        r = tl.load(listed + BM - 1 - i, mask=there, other=0)
        index = best_of_all(rest + r.to(tl.int64) * dim, 1, there, codebook, stride_k, stride_d, n_codes, dim,
                            METRIC, SCANNED, SCAN_N, UNROLL)  # fmt: skip
        tl.store(indices + r * stride_i, index, mask=there)


@triton.jit(do_not_specialize=["n_rows", "n_levels", "n_blocks", "n_programs"])
def _levels(
    x, x_stride_n, x_stride_d, n_rows, dim,  # [N, D]
    codebooks, stride_q, stride_k, stride_d, n_codes, n_levels,  # [Q, K, D]
    mean, info, flags, codes, code_columns, norms, factors, n_blocks,  # of triton_pack.py, a head a level
    mask, indices, total, squares, n_programs,  # [N], [N, Q], [N, D], [Q, programs]
    bounds, thresholds, listed, packing, sum_error,  # workspace, BM rows a program
    METRIC: tl.constexpr, SHIFT_X: tl.constexpr, SHIFT_C: tl.constexpr, MASKED: tl.constexpr, FAST: tl.constexpr,
    INTERPRETED: tl.constexpr, NARROW: tl.constexpr, SPLIT_BIAS: tl.constexpr, BITS: tl.constexpr, DP: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, GROUP: tl.constexpr, FEW: tl.constexpr, NAMED: tl.constexpr,
    SCANNED: tl.constexpr, SCAN_N: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    LANES: tl.constexpr = BN // GROUP
    MASK: tl.constexpr = (1 << BITS) - 1
    padded = n_blocks.to(tl.int64) * BN
    base = tl.program_id(0).to(tl.int64) * BM
    r = tl.arange(0, BM)
    there = r < n_rows - base
    real = there
    if MASKED:
        real = there & (tl.load(mask + base + r, mask=there, other=0) != 0)
    d = tl.arange(0, DP)
    if NARROW:  # as the columns hold the row
        d = d - FIRST_DATA
    column = (d >= 0) & (d < dim)
    inside = real[:, None] & column[None, :]
    from_x = x + (base + r)[:, None] * x_stride_n + d.to(tl.int64)[None, :] * x_stride_d
    residual = as_work(tl.load(from_x, mask=inside, other=0.0), tl.float32)
    total += base * dim
    indices += base * n_levels
    own = indices + r * n_levels
    listed += base
    thresholds += base
    bounds += base * (2 * LANES)
    lanes = tl.arange(0, LANES)[None, :]
    level = codebooks
    # Disable LICM: hoisting the shared-memory address computations makes registers spill.
    for q in tl.range(0, n_levels, disable_licm=True):
        f = residual
        if SHIFT_X:
            f = f - tl.load(mean + d, mask=column, other=0.0)[None, :]
        factor = row_scale(tl.max(tl.abs(f), axis=1), tl.load(info), METRIC)
        f = f * factor[:, None]
        rounded = round_piece(f, False)
        gap = f - rounded.to(tl.float32)
        length, off = norms_of(tl.sum(f * f, axis=1), tl.sum(gap * gap, axis=1), tl.max(tl.abs(f), axis=1),
                               flags, dim, METRIC, SHIFT_X)  # fmt: skip
        columns = columns_of(length, off, f, False, NARROW)
        best, second, third = best_groups(rounded, columns, codes, code_columns, n_blocks,
                                          INTERPRETED, NARROW, SPLIT_BIAS, BITS, DP, BM, BN, GROUP)  # fmt: skip
        highest = tl.max(best, axis=1)
        lane = tl.min(tl.where(best == highest[:, None], lanes, LANES - 1), axis=1)
        group = (highest.to(tl.int32, bitcast=True) & MASK) * BN + lane
        score = scores_of(f, group, level, stride_k, stride_d, mean, norms, factors, d, dim,
                          METRIC, SHIFT_C, GROUP, LANES, BM)  # fmt: skip
        k = group[:, None] + (tl.arange(0, GROUP) * LANES)[None, :]
        norm = tl.load(norms + k)
        finite = real & (length >= 0)
        if FAST:
            winner = score == tl.max(score, axis=1)[:, None]
            certain = finite & (tl.max(norm, axis=1) >= 0)
            least = tl.full((BM,), float("inf"), tl.float32)
            finite = certain  # precision="fast" lists no candidates: the other rows are scanned
        else:
            winner, least = separated(score, norm, length, tl.load(info + 1), dim, sum_error, METRIC)
            runner_up = tl.max(tl.where(lanes == lane[:, None], second, best), axis=1)
            certain = finite & (tl.sum(winner.to(tl.int32), axis=1) == 1) & (lifted(runner_up, packing) < least)
        index = tl.min(tl.where(winner, k, n_blocks * BN), axis=1).to(tl.int64)
        tl.store(own + q, tl.where(real, index, -1), mask=there & (certain | ~real))
        open_row = real & ~certain
        if tl.sum(open_row.to(tl.int32)) > 0:
            tl.store(total + r[:, None] * dim + d[None, :], residual, mask=open_row[:, None] & column[None, :])
            n_few, n_scanned = list_open_rows(best, second, third, least, packing, finite, open_row,
                                    bounds, thresholds, listed, BM, LANES)  # fmt: skip
            tl.debug_barrier()  # other threads read these rows
            resolve_open_rows(n_few, n_scanned, bounds, thresholds, listed, packing, total, dim, level, stride_k,
                              stride_d, n_codes, indices + q, n_levels,
                              METRIC, BITS, BM, BN, GROUP, FEW, NAMED, SCANNED, SCAN_N, UNROLL)  # fmt: skip
        tl.debug_barrier()
        chosen = tl.load(own + q, mask=real, other=0)
        from_code = level + chosen[:, None] * stride_k + d.to(tl.int64)[None, :] * stride_d
        code = as_work(tl.load(from_code, mask=inside, other=0.0), tl.float32)
        apart = residual.to(tl.float64) - code.to(tl.float64)
        square = tl.sum(tl.sum(apart * apart, axis=1))
        # Infinite only where a residual holds infinity, which stands for no distance at all: NaN then.
        tl.store(squares + tl.program_id(0), square + (square - square))
        residual -= code
        level += stride_q
        mean += dim
        info += 2
        flags += 3
        codes += padded * DP
        code_columns += padded * COLUMNS
        norms += padded
        factors += padded
        squares += n_programs
    added = tl.zeros((BM, DP), tl.float32)
    for q in range(0, n_levels):
        chosen = tl.load(own + q, mask=real, other=0)
        from_code = codebooks + chosen[:, None] * stride_k + d.to(tl.int64)[None, :] * stride_d
        added += as_work(tl.load(from_code, mask=inside, other=0.0), tl.float32)
        codebooks += stride_q
    tl.store(total + r[:, None] * dim + d[None, :], added, mask=there[:, None] & column[None, :])


def served(x: Tensor, codebooks: Tensor) -> bool:
    """Whether the levels run in one launch: two levels and more, of float32 and narrower, D and N not too large.

    On an H100, 8 levels of 1024 codes of width 128: 300,000 rows take 10.8 ms so and 7.4 as eight lookups; 2,000 rows
    0.4 ms, and 0.9 a launch a level.

    One level gains nothing; float64 residuals take twice the registers; and codebooks that the lookup does not pack
    (up to MIN_FILTERED_SCORES elements) go to the definition, level by level.
    """
    n_levels, n_codes, dim = codebooks.shape
    return (
        n_levels > 1 and dim <= WIDEST and 0 < x.numel() <= MOST_ROWS * dim
        and n_codes * dim > lookup.MIN_FILTERED_SCORES
        and torch.float64 not in (x.dtype, codebooks.dtype)
    )  # fmt: skip


def _launch(
    x: Tensor,  # [N, D], any strides
    codebooks: Tensor,  # [Q, K, D]
    mask: Tensor | None,  # [N] bool
    metric: int,
    fast: bool,
    meta: Mapping[str, int],
) -> tuple[Tensor, Tensor, Tensor]:
    (n, dim), (n_levels, n_codes, _) = x.shape, codebooks.shape
    packed = lookup.pack(codebooks, metric, False, metric != 1, {**meta, "BD": WIDEST})
    bm, programs = meta["BM"], triton.cdiv(n, meta["BM"])
    n_blocks = packed.columns.shape[1] // meta["BN"]
    bits = lookup.block_bits(n_blocks)
    split_bias = not packed.narrow and bm < 16 * meta["num_warps"]
    total = x.new_empty(n, dim, dtype=torch.float32)
    indices = torch.empty(n, n_levels, dtype=torch.int64, device=x.device)
    squares = torch.empty(n_levels, programs, dtype=torch.float64, device=x.device)
    lanes = meta["BN"] // meta["GROUP"]
    bounds = torch.empty(programs * bm, 2 * lanes, dtype=torch.float32, device=x.device)
    thresholds = torch.empty(programs * bm, dtype=torch.float32, device=x.device)
    listed = torch.empty(programs * bm, dtype=torch.int32, device=x.device)
    if triton_backend.interpreting():
        definition = {"FEW": 128, "NAMED": 8, "SCANNED": 128, "SCAN_N": 1024, "UNROLL": 3}
    else:
        definition = {"FEW": 4, "NAMED": 4, "SCANNED": 4, "SCAN_N": 128, "UNROLL": 8}
    _levels[(programs,)](
        x, *x.stride(), n, dim, codebooks, *codebooks.stride(), n_codes, n_levels,
        packed.mean, packed.info, packed.flags, packed.codes, packed.columns, packed.norms, packed.factors, n_blocks,
        indices if mask is None else mask, indices, total, squares, programs, bounds, thresholds, listed,
        2.0 ** (bits - 22), (dim + 14) * 2.0**-24 * (1 + 2.0**-6),
        METRIC=metric, SHIFT_X=metric == 0, SHIFT_C=metric != 1, MASKED=mask is not None, FAST=fast,
        INTERPRETED=triton_backend.interpreting(), NARROW=packed.narrow, SPLIT_BIAS=split_bias, BITS=bits,
        DP=packed.width, **meta, **definition, enable_fp_fusion=False,
    )  # fmt: skip
    return total, indices, squares


def residual_quantize(
    x: Tensor,  # [N, D], any strides
    codebooks: Tensor,  # [Q, K, D]
    mask: Tensor | None,  # [N] bool
    metric: str,
    precision: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """The sum of the codes [N, D] float32, the indices [N, Q], and the squares of the differences [Q, programs]."""
    code, fast = lookup.METRICS[metric], precision == "fast"

    def launch(meta: Mapping[str, int]) -> None:  # for tuning
        _launch(x, codebooks, mask, code, fast, meta)

    meta = pick("residual_quantize", TILES, x.device, codebooks.shape[-1], torch.float16, launch)
    return _launch(x, codebooks, mask, code, fast, meta)
