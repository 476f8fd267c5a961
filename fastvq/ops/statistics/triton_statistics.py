# mypy: allow-untyped-defs
"""Counts and sums of the rows that chose each code, on a GPU.

tensors                                                   H heads, N rows a head, K codes, D columns
    x         [H, N, D]   any float, any strides that ``fastvq.backends.views`` can walk
    indices   [H, N]      int64; -1 is no code, and neither is anything out of range
    sums      [H, K, D]   float32 (float64 where asked)     counts  [H, K]  int64

Deterministic, by sorting (``deterministic=True``):

    1. ``_keys``: a row's key is h*K + index, or H*K for a row that is left out; the narrowest integer that holds it, as
       a radix sort takes a pass a byte. Rows too wide for one tile are tested for NaN and infinity here.
    2. torch.sort, stable: rows of one code side by side, in row order; torch.searchsorted: where each code starts
    3. ``_plan``: codes with more than CHUNK rows are cut in pieces of CHUNK; pieces up to and including each code
    4. ``_add``: program k < H*K adds code k if it is not cut; program H*K + p adds piece p, found by bisection, to
       ``partial`` [pieces, D]. There are fewer than 2 H N / CHUNK pieces for all indices, so the grid needs no
       answer from the device, and a code that holds nearly every row is added by all processors.
    5. ``_join``: the pieces of each cut code, in order

x is read once, 16 bytes a row and sort pass besides. Every accumulator is float64 and the order of additions depends on
the indices and the tile alone. Registers: ROWS x BLOCK_D float64 accumulators a program.

Not deterministic (``deterministic=False``): ``_scatter`` adds each row to its code with atomics in the type of sums, in
the order in which rows arrive. One pass, no sort, no workspace.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastvq._checks import check_indices
from fastvq.backends import tiles, views
from fastvq.ops._triton_rows import at_least_float32, finite, row_offset, saturate
from fastvq.ops.statistics.common import STATISTICS

__all__ = ["code_statistics"]

CHUNK = 256
KEYS = 1024  # rows a program of _keys where it reads no x
WIDEST = 1024  # columns of a row that one tile holds
# By width alone: every element is loaded once and added in float64. ROWS x BLOCK_D elements are in flight a program.
TILES = [
    tiles.Tile(80, 16, torch.float64, {"ROWS": 128, "BLOCK_D": 16, "num_warps": 4}),
    tiles.Tile(80, 32, torch.float64, {"ROWS": 64, "BLOCK_D": 32, "num_warps": 4}),
    tiles.Tile(80, 64, torch.float64, {"ROWS": 32, "BLOCK_D": 64, "num_warps": 4}),
    tiles.Tile(80, 128, torch.float64, {"ROWS": 16, "BLOCK_D": 128, "num_warps": 4}),
    tiles.Tile(80, 256, torch.float64, {"ROWS": 8, "BLOCK_D": 256, "num_warps": 4}),
    tiles.Tile(80, 512, torch.float64, {"ROWS": 4, "BLOCK_D": 512, "num_warps": 4}),
    tiles.Tile(80, 1 << 62, torch.float64, {"ROWS": 4, "BLOCK_D": WIDEST, "num_warps": 8}),
]


@triton.jit(do_not_specialize=["n_rows", "n_total", "n_codes", "left_out", "n_inner"])
def _keys(
    indices, keys, x, n_rows, n_total, n_codes, left_out, n_inner, stride_head, stride_outer, stride_inner, stride_d,
    D: tl.constexpr, READ_X: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    index = tl.load(indices + row, mask=row < n_total, other=-1)
    used = (index >= 0) & (index < n_codes)
    head = row // n_rows
    if READ_X:
        at = head.to(tl.int64) * stride_head + row_offset(row - head * n_rows, n_inner, stride_outer, stride_inner)
        for begin in range(0, D, BLOCK_D):
            column = (begin + tl.arange(0, BLOCK_D)).to(tl.int64)
            here = used[:, None] & (column < D)[None, :]
            used &= finite(
                at_least_float32(tl.load(x + at[:, None] + column[None, :] * stride_d, mask=here, other=0.0)), 1
            )
    key = tl.where(used, head.to(tl.int64) * n_codes + index, left_out)
    tl.store(keys + row, key.to(keys.dtype.element_ty), mask=row < n_total)


@triton.jit(do_not_specialize=["n_keys"])
def _plan(starts, ends, n_keys, CHUNK: tl.constexpr, BLOCK: tl.constexpr):
    done = tl.zeros([], tl.int64)
    for begin in range(0, n_keys, BLOCK):
        code = begin + tl.arange(0, BLOCK)
        here = code < n_keys
        n = tl.load(starts + code + 1, mask=here, other=0) - tl.load(starts + code, mask=here, other=0)
        pieces = tl.where(n > CHUNK, (n + CHUNK - 1) // CHUNK, 0)
        tl.store(ends + code, done + tl.cumsum(pieces, 0), mask=here)
        done += tl.sum(pieces, 0)


@triton.jit(do_not_specialize=["n_rows", "n_codes", "n_keys", "n_inner"])
def _add(
    x, order, starts, ends, sums, counts, partial, partial_counts, n_rows, n_codes, n_keys, n_inner,
    stride_head, stride_outer, stride_inner, stride_d,
    D: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    column = tl.program_id(1).to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)
    piece = program - n_keys  # below 0: a whole code
    # The first code whose pieces end behind this one.
    low, high = tl.zeros([], tl.int32), tl.zeros([], tl.int32)
    if piece < 0:
        low += program
    else:
        high += n_keys
    while low < high:
        middle = (low + high) // 2
        behind = tl.load(ends + middle) > piece
        high = tl.where(behind, middle, high)
        low = tl.where(behind, low, middle + 1)
    if low < n_keys:
        first, last = tl.load(starts + low), tl.load(starts + low + 1)
        whole = piece < 0
        if piece >= 0:
            pieces = (last - first + CHUNK - 1) // CHUNK
            first += (piece - (tl.load(ends + low) - pieces)) * CHUNK
            last = tl.minimum(last, first + CHUNK)
        if last - first <= CHUNK:
            head = low // n_codes
            total = tl.zeros([ROWS, BLOCK_D], tl.float64)
            n = tl.zeros([ROWS], tl.int64)
            for begin in range(first, last, ROWS):
                position = begin + tl.arange(0, ROWS)
                here = position < last
                row = tl.load(order + position, mask=here, other=0).to(tl.int32) - head * n_rows
                row = tl.where(here, row, 0)
                at = head.to(tl.int64) * stride_head + row_offset(row, n_inner, stride_outer, stride_inner)
                value = tl.load(
                    x + at[:, None] + column[None, :] * stride_d, mask=here[:, None] & (column < D)[None, :], other=0.0
                )
                value = at_least_float32(value)
                if D <= BLOCK_D:
                    here &= finite(value, 1)
                    value = tl.where(here[:, None], value, 0.0)
                total += value.to(tl.float64)
                n += here.to(tl.int64)
            result, n_here = tl.sum(total, axis=0), tl.sum(n, axis=0)
            if whole:
                tl.store(sums + low.to(tl.int64) * D + column, saturate(result, sums.dtype.element_ty), mask=column < D)
                if tl.program_id(1) == 0:
                    tl.store(counts + low, n_here)
            else:
                tl.store(partial + piece.to(tl.int64) * D + column, result, mask=column < D)
                if tl.program_id(1) == 0:
                    tl.store(partial_counts + piece, n_here)


@triton.jit
def _join(
    ends, sums, counts, partial, partial_counts, D: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    code = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1).to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)
    first, last = tl.load(ends + code - 1, mask=code > 0, other=0), tl.load(ends + code)
    if last > first:
        total = tl.zeros([ROWS, BLOCK_D], tl.float64)
        n = tl.zeros([ROWS], tl.int64)
        for begin in range(first, last, ROWS):
            piece = begin + tl.arange(0, ROWS)
            here = piece < last
            total += tl.load(
                partial + piece[:, None] * D + column[None, :], mask=here[:, None] & (column < D)[None, :], other=0.0
            )
            n += tl.load(partial_counts + piece, mask=here, other=0)
        tl.store(sums + code * D + column, saturate(tl.sum(total, axis=0), sums.dtype.element_ty), mask=column < D)
        if tl.program_id(1) == 0:
            tl.store(counts + code, tl.sum(n, axis=0))


@triton.jit(do_not_specialize=["n_rows", "n_total", "left_out", "n_inner"])
def _scatter(
    x, keys, sums, counts, n_rows, n_total, left_out, n_inner, stride_head, stride_outer, stride_inner, stride_d,
    D: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1).to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)
    key = tl.load(keys + row, mask=row < n_total, other=0).to(tl.int64)
    here = (row < n_total) & (key < left_out)
    head = row // n_rows
    at = head.to(tl.int64) * stride_head + row_offset(row - head * n_rows, n_inner, stride_outer, stride_inner)
    value = tl.load(x + at[:, None] + column[None, :] * stride_d, mask=here[:, None] & (column < D)[None, :], other=0.0)
    value = at_least_float32(value)
    if D <= BLOCK_D:
        here &= finite(value, 1)
    tl.atomic_add(
        sums + key[:, None] * D + column[None, :], value, mask=here[:, None] & (column < D)[None, :], sem="relaxed"
    )
    if tl.program_id(1) == 0:
        tl.atomic_add(counts + key, tl.full([ROWS], 1, tl.int64), mask=here, sem="relaxed")


def code_statistics(
    x: Tensor,  # [..., D] or [H, ..., D]
    indices: Tensor,  # [...] or [H, ...] int64
    n_codes: int,
    n_heads: int | None,
    deterministic: bool = True,
    sums_dtype: torch.dtype | None = None,  # float32 or float64; x's own, at least float32, where None
) -> tuple[Tensor, Tensor]:
    check_indices(STATISTICS, "indices", indices, -1, n_codes)
    if sums_dtype is None:
        sums_dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    if deterministic and x.stride(-1) != 1:
        # Sorted rows lie anywhere in memory. Elements that lie apart would fetch a sector each.
        x = x.contiguous()
    view, indices = views.rows(x, n_heads), indices.contiguous()
    n_keys, n_total, dim = view.n_heads * n_codes, view.n_heads * view.n_rows, view.dim
    lead = () if n_heads is None else (n_heads,)
    new = x.new_zeros if n_total == 0 or not deterministic else x.new_empty
    sums = new((*lead, n_codes, dim), dtype=sums_dtype)
    counts = new((*lead, n_codes), dtype=torch.int64)
    if n_total == 0:
        return sums, counts

    tile = tiles.pick("code_statistics", TILES, x.device, dim, torch.float64)
    keys = indices.new_empty(n_total, dtype=_key_type(n_keys))
    if dim > tile["BLOCK_D"]:
        source, steps, blocks = view.tensor, view.steps, {"D": dim, "READ_X": True, **tile}
    else:  # one kernel for all widths and dtypes
        source, steps, blocks = indices, (1, 0, 0, 0, 0), {"D": 0, "READ_X": False, "ROWS": KEYS, "BLOCK_D": 1}
    _keys[(triton.cdiv(n_total, blocks["ROWS"]),)](
        indices, keys, source, view.n_rows, n_total, n_codes, n_keys, *steps, **blocks
    )
    column_tiles = triton.cdiv(dim, tile["BLOCK_D"])
    if not deterministic:
        _scatter[(triton.cdiv(n_total, tile["ROWS"]), column_tiles)](
            view.tensor, keys, sums, counts, view.n_rows, n_total, n_keys, *view.steps, D=dim, **tile
        )
        return sums, counts

    keys, order = torch.sort(keys, stable=True)
    starts = torch.searchsorted(keys, torch.arange(n_keys + 1, device=x.device, dtype=keys.dtype))
    ends = torch.empty_like(starts)
    _plan[(1,)](starts, ends, n_keys, CHUNK=CHUNK, BLOCK=1024)
    most = 2 * n_total // CHUNK  # a code that is cut holds more than CHUNK rows: n / CHUNK pieces, rounded up
    partial = x.new_empty((most, dim), dtype=torch.float64)
    partial_counts = indices.new_empty(most)
    _add[(n_keys + most, column_tiles)](
        view.tensor, order, starts, ends, sums, counts, partial, partial_counts, view.n_rows, n_codes, n_keys,
        *view.steps, D=dim, CHUNK=CHUNK, **tile,
    )  # fmt: skip
    if most:
        _join[(n_keys, column_tiles)](ends, sums, counts, partial, partial_counts, D=dim, **tile)
    return sums, counts


def _key_type(n_keys: int) -> torch.dtype:
    """The narrowest integer that holds 0 ... n_keys."""
    for dtype in (torch.uint8, torch.int16, torch.int32):
        if n_keys <= torch.iinfo(dtype).max:
            return dtype
    return torch.int64
