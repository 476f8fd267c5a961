# mypy: disable-error-code="no-untyped-def, no-untyped-call, has-type"
"""The Triton filter: upper bounds of all codes on the tensor cores, and a certificate for the row's winner.

            block of BN codes, streamed              1. upper[r, k] >= t_k: one product, bias and bound ride in columns
  tile of    c c c c c c c c                             (triton_pack); no arithmetic per score beyond it
  BM rows  x . . . . . . . .                         2. the largest of GROUP codes, then the two largest of those, block
  (kept)   x . . . . . . . .                             number packed into the low bits of the first
                                                     3. codes of the best group scored again in float32: lower bound L
                                                     4. second group and all but one of the first below L: proved.
                                                        Otherwise the row and its L go on a list.

``_filter`` does steps 1 and 2, ``_certify`` the others: in one kernel, the registers of 3 would keep a second block of
threads off the multiprocessor, whose products run while the first one compares. ``_collect_candidates`` scores the
listed rows again and lists, for each, the groups that reach its L; triton_exact.py rescores those by the definition.

Nothing of size N x K exists. Shared memory: BM * D' + stages * BN * (D' + 16) elements of 16 bits, D' being BD where
the row tile is not kept. Arithmetic: (GROUP - 1 + 4) / GROUP operations a score, 1.75 for groups of 4, 1.375 for groups
of 8; but these give step 3 twice as many codes to read. In one run on an H100 a whole lookup took 0.79 ms with groups
of 4 and 0.96 with 8 (1048576 x 1024 x 64, bfloat16; float32 1.05 and 1.41), 9.45 and 9.93 (1048576 x 8192 x 256,
bfloat16), but 0.87 and 0.83 at 262144 x 16384 x 8 (float32).
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastvq.ops.nearest.triton_pack import COLUMNS
from fastvq.ops.nearest.triton_rows import row_piece

# A row with more candidate groups goes to the exhaustive scan.
MAX_CANDIDATE_GROUPS: tl.constexpr = tl.constexpr(8)
LOWEST: tl.constexpr = tl.constexpr(-3e38)


@triton.jit
def multiplied(a, b, start, INTERPRETED: tl.constexpr):
    if INTERPRETED:  # the interpreter multiplies the bits of bfloat16 as integers, and is slow in float16
        return tl.dot(a.to(tl.float32), tl.trans(b.to(tl.float32)), start)
    return tl.dot(a, tl.trans(b), start)


@triton.jit
def upper_bounds(
    tile, columns, rows, line, codes, code_columns, block,  # block: first code of the block, head included
    INTERPRETED: tl.constexpr, NARROW: tl.constexpr, RESIDENT: tl.constexpr,
    DP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    k = tl.arange(0, BN)[:, None]
    c = tl.load(code_columns + block * COLUMNS + k * COLUMNS + tl.arange(0, COLUMNS)[None, :])
    upper = multiplied(columns, c, tl.zeros((BM, BN), tl.float32), INTERPRETED)
    if not NARROW:
        d = tl.arange(0, BD)[None, :]
        if RESIDENT:
            code = tl.load(codes + block * DP + k * DP + d)
            upper = multiplied(tile, code, upper, INTERPRETED)
        else:
            for d0 in range(0, DP, BD):
                piece = tl.load(rows + line[:, None] * DP + d0 + d)
                code_piece = tl.load(codes + block * DP + d0 + k * DP + d)
                upper = multiplied(piece, code_piece, upper, INTERPRETED)
    return upper


@triton.jit
def row_operands(rows, row_columns, line, NARROW: tl.constexpr, RESIDENT: tl.constexpr, DP: tl.constexpr):
    columns = tl.load(row_columns + line[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :])
    tile = columns
    if RESIDENT and not NARROW:
        tile = tl.load(rows + line[:, None] * DP + tl.arange(0, DP)[None, :])
    return tile, columns


@triton.jit
def push_to_list(counter, entries, items, chosen):
    """Appends the chosen items to a list in memory; returns the place of each."""
    ones = chosen.to(tl.int32)
    first = tl.atomic_add(counter, tl.sum(ones))
    at = first + tl.cumsum(ones) - ones
    tl.store(entries + at, items, mask=chosen)
    return at


@triton.jit(do_not_specialize=["n_rows", "n_blocks", "slab"])
def _filter(
    codes, code_columns, n_blocks, rows, row_columns, n_rows, slab,
    groups, runners_up, packing,
    INTERPRETED: tl.constexpr, NARROW: tl.constexpr, RESIDENT: tl.constexpr, BITS: tl.constexpr,
    DP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Steps 1 and 2: the first code of each row's best group [H, slab], and a bound on all other groups."""
    head = tl.program_id(1).to(tl.int64)
    r = tl.program_id(0) * BM + tl.arange(0, BM)
    there = r < n_rows
    line = head * slab + tl.where(there, r, 0)
    tile, columns = row_operands(rows, row_columns, line, NARROW, RESIDENT, DP)
    # A lane holds the groups at its place of every block.
    LANES: tl.constexpr = BN // GROUP
    MASK: tl.constexpr = (1 << BITS) - 1
    best = tl.full((BM, LANES), LOWEST, tl.float32)
    second = tl.full((BM, LANES), LOWEST, tl.float32)
    first_code = head * n_blocks * BN
    for b in range(0, n_blocks):
        upper = upper_bounds(tile, columns, rows, line, codes, code_columns, first_code + b * BN,
                             INTERPRETED, NARROW, RESIDENT, DP, BM, BN, BD)  # fmt: skip
        top = tl.max(tl.reshape(upper, (BM, GROUP, LANES)), axis=1)
        top = ((top.to(tl.int32, bitcast=True) & ~MASK) | b).to(tl.float32, bitcast=True)
        second = tl.maximum(second, tl.minimum(best, top))
        best = tl.maximum(best, top)
    highest = tl.max(best, axis=1)
    lanes = tl.arange(0, LANES)[None, :]
    lane = tl.min(tl.where(best == highest[:, None], lanes, LANES - 1), axis=1)
    runner_up = tl.max(tl.where(lanes == lane[:, None], second, best), axis=1)
    tl.store(groups + line, (highest.to(tl.int32, bitcast=True) & MASK) * BN + lane, mask=there)
    tl.store(runners_up + line, runner_up + tl.abs(runner_up) * packing, mask=there)


@triton.jit
def separated(score, norm, length, mean_norm, dim, sum_error, METRIC: tl.constexpr):
    """Which of the codes scored in float32 [rows, codes] may be the nearest; a lower bound of the nearest's score."""
    own = (dim + 3) * 2.0**-53
    held = norm >= 0
    error = sum_error * (length[:, None] * norm + 0.5 * norm * norm) + dim * 2.0**-80
    error += 2 * own * (length[:, None] * (norm + mean_norm) + norm * norm)
    least = tl.max(tl.where(held, score - error, LOWEST), axis=1)
    if METRIC == 0:
        least -= 2 * own * length * length
    return held & (score + error >= least[:, None]), least


@triton.jit(do_not_specialize=["n_rows", "i_stride_h", "slab"])
def _certify(
    x, x_stride_h, x_stride_n, x_stride_d, n_rows, dim,  # [H, N, D]
    codebook, c_stride_h, c_stride_k, c_stride_d,  # [H, K, D]
    indices, i_stride_h,  # [H, N]
    mean, info, norms, factors, padded_codes, row_norms, row_scales, slab,
    groups, runners_up, counters, listed, thresholds, pending, candidate_counts, sum_error,
    METRIC: tl.constexpr, SHIFT_X: tl.constexpr, SHIFT_C: tl.constexpr, FAST: tl.constexpr,
    GROUP: tl.constexpr, LANES: tl.constexpr, BM: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Steps 3 and 4: rescores the best group in float32, then writes the index or lists the row."""
    head = tl.program_id(1).to(tl.int64)
    x += head * x_stride_h
    codebook += head * c_stride_h
    mean += head * dim
    # A line is a row and a code of its group. Code addresses are computed from lines directly: the compiler loses the
    # divisibility of a reshaped index, and would load elements one by one.
    line = tl.arange(0, BM * GROUP)
    row = tl.program_id(0) * BM + line // GROUP
    real = row < n_rows
    code = tl.load(groups + head * slab + row, mask=real, other=0).to(tl.int64) + line % GROUP * LANES
    code_norm = tl.load(norms + head * padded_codes + code)
    code_held = code_norm >= 0
    row_factor = tl.load(row_scales + head * slab + row, mask=real, other=0.0)[:, None]
    code_factor = tl.load(factors + head * padded_codes + code)[:, None]
    row_at = row.to(tl.int64) * x_stride_n
    code_at = code * c_stride_k
    products = tl.zeros((BM * GROUP,), tl.float32)
    for d0 in range(0, dim, CHUNK):
        d = d0 + tl.arange(0, CHUNK)
        f = row_piece(x, row_at, real, x_stride_d, mean, d, dim, SHIFT_X) * row_factor
        c = row_piece(codebook, code_at, code_held, c_stride_d, mean, d, dim, SHIFT_C) * code_factor
        products += tl.sum(c * (f - 0.5 * c) if METRIC == 0 else c * f, axis=1)
    r = tl.program_id(0) * BM + tl.arange(0, BM)
    there = r < n_rows
    k = tl.reshape(code, (BM, GROUP))
    norm = tl.reshape(code_norm, (BM, GROUP))
    held = norm >= 0
    score = tl.reshape(products, (BM, GROUP))
    length = tl.load(row_norms + head * slab + r, mask=there, other=0.0)
    score = tl.where(held, score, LOWEST)
    finite = there & (length >= 0)
    if FAST:
        winner = score == tl.max(score, axis=1)[:, None]
        certain = finite & (tl.max(norm, axis=1) >= 0)
    else:
        winner, least = separated(score, norm, length, tl.load(info + head * 2 + 1), dim, sum_error, METRIC)
        runner_up = tl.load(runners_up + head * slab + r, mask=there, other=0.0)
        certain = finite & (tl.sum(winner.to(tl.int32), axis=1) == 1) & (runner_up < least)
    index = tl.min(tl.where(winner, k, padded_codes), axis=1)
    tl.store(indices + head * i_stride_h + r, index, mask=certain)
    if not FAST:
        place = push_to_list(counters + head * 2, listed + head * slab, r, finite & ~certain)
        tl.store(thresholds + head * slab + place, least, mask=finite & ~certain)
        tl.store(candidate_counts + head * slab + place, tl.zeros((BM,), tl.int32), mask=finite & ~certain)
        certain = finite
    push_to_list(counters + head * 2 + 1, pending + head * slab, r, there & ~certain)


@triton.jit(do_not_specialize=["n_blocks", "slab", "n_parts"])
def _collect_candidates(
    codes, code_columns, n_blocks, rows, row_columns, slab, n_parts,
    counters, listed, thresholds, candidates, candidate_counts,
    INTERPRETED: tl.constexpr, NARROW: tl.constexpr, RESIDENT: tl.constexpr,
    DP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Lists, for every row of the list, the groups of codes whose upper bound reaches the row's threshold.

    Few rows are listed, so the codes are split over ``n_parts`` programs (split-K): otherwise most programs would idle.
    """
    head = tl.program_id(1).to(tl.int64)
    n_listed = tl.load(counters + head * 2)
    LANES: tl.constexpr = BN // GROUP
    lanes = tl.arange(0, LANES)[None, :]
    first_code = head * n_blocks * BN
    part_blocks = tl.cdiv(n_blocks, n_parts)
    for t in range(tl.program_id(0), tl.cdiv(n_listed, BM) * n_parts, tl.num_programs(0)):
        i = t // n_parts * BM + tl.arange(0, BM)
        there = i < n_listed
        line = head * slab + tl.load(listed + head * slab + i, mask=there, other=0)
        tile, columns = row_operands(rows, row_columns, line, NARROW, RESIDENT, DP)
        threshold = tl.load(thresholds + head * slab + i, mask=there, other=float("inf"))
        at = (head * slab + i)[:, None]
        first = t % n_parts * part_blocks
        for b in range(first, tl.minimum(first + part_blocks, n_blocks)):
            upper = upper_bounds(tile, columns, rows, line, codes, code_columns, first_code + b * BN,
                                 INTERPRETED, NARROW, RESIDENT, DP, BM, BN, BD)  # fmt: skip
            reaches = tl.max(tl.reshape(upper, (BM, GROUP, LANES)), axis=1) >= threshold[:, None]
            reaches = reaches & there[:, None]
            if tl.sum(reaches.to(tl.int32)) > 0:
                place = tl.atomic_add(candidate_counts + at + tl.zeros_like(lanes), 1, mask=reaches)
                tl.store(
                    candidates + at * MAX_CANDIDATE_GROUPS + place,
                    b * BN + lanes,
                    mask=reaches & (place < MAX_CANDIDATE_GROUPS),
                )
