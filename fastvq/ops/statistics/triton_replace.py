# mypy: allow-untyped-defs
"""Replacement of dead codes on a GPU, without waiting for the device: the rows that the reference chooses.

1. ``_usable``: which rows of x [H, N, D] hold no NaN and no infinity; torch.cumsum: how many up to each row
2. torch: which codes are dead, and the number of each among them
3. ``_replace``, CODES codes a program: each dead one finds its row by bisection and copies it
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastvq.backends import tiles, views
from fastvq.backends.triton import float64_bits
from fastvq.ops._triton_rows import at_least_float32, axis_of, finite, row_offset, saturate, to_float64
from fastvq.ops.statistics.call import ReplaceCall

__all__ = ["replace_dead_codes_"]

CODES = 16
TILES = [
    tiles.Tile(80, 16, torch.float64, {"ROWS": 128, "BLOCK_D": 16, "num_warps": 4}),
    tiles.Tile(80, 1 << 62, torch.float64, {"ROWS": 32, "BLOCK_D": 64, "num_warps": 4}),
]


@triton.jit(do_not_specialize=["n_rows", "n_total", "n_inner"])
def _usable(
    x, usable, n_rows, n_total, n_inner, stride_head, stride_outer, stride_inner, stride_d,
    D: tl.constexpr, AXIS: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    head = row // n_rows
    at = head.to(tl.int64) * stride_head + row_offset(row - head * n_rows, n_inner, stride_outer, stride_inner)
    good = row < n_total
    for begin in range(0, D, BLOCK_D):
        column = tl.expand_dims((begin + tl.arange(0, BLOCK_D)).to(tl.int64), 1 - AXIS)
        here = tl.expand_dims(row < n_total, AXIS) & (column < D)
        good &= finite(
            at_least_float32(tl.load(x + tl.expand_dims(at, AXIS) + column * stride_d, mask=here, other=0.0)), AXIS
        )
    tl.store(usable + row, good.to(tl.int8), mask=row < n_total)


@triton.jit
def _quotient(a, b):
    """a // b of int64, where it is below 2^31: float64 is then off by one at most, and needs no call."""
    q = (a.to(tl.float64) / b.to(tl.float64)).to(tl.int64)
    rest = a - q * b
    return q + (rest >= b).to(tl.int64) - (rest < 0).to(tl.int64)


@triton.jit(do_not_specialize=["n_codes", "n_keys", "n_rows", "n_inner", "threshold_bits"])
def _replace(
    codebook, embed_sum, cluster_size, x, dead, slots, uniforms, rank, n_codes, n_keys, n_rows, n_inner,
    stride_head, stride_outer, stride_inner, stride_d, codebook_head, codebook_k, codebook_d,
    embed_sum_head, embed_sum_k, embed_sum_d, cluster_size_head, cluster_size_k, threshold_bits,
    D: tl.constexpr, CODES: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    key = tl.program_id(0) * CODES + tl.arange(0, CODES)
    threshold = threshold_bits.to(tl.int64).to(tl.float64, bitcast=True)
    mine = key < n_keys
    head = tl.where(mine, key // n_codes, 0).to(tl.int64)
    code = key - head * n_codes
    n = tl.load(rank + head * n_rows + n_rows - 1)  # usable rows of the head
    n_slots = tl.load(slots + head * n_codes + n_codes - 1)
    taken = tl.load(dead + key, mask=mine, other=0).to(tl.int1) & (n > 0)
    slot = tl.load(slots + key, mask=taken, other=1) - 1
    # As ``choose_rows`` of common.py: one of an even share of the usable rows.
    n_slots = tl.maximum(n_slots, 1)
    first, last = _quotient(slot * n, n_slots), _quotient((slot + 1) * n, n_slots)
    uniform = tl.load(uniforms + key, mask=taken, other=0.0).to(tl.float64)
    nth = first + (uniform * (last - first).to(tl.float64)).to(tl.int64)
    nth = tl.minimum(nth, tl.maximum(last - 1, first))
    # The row of that number: the first whose rank is above it.
    low, high = tl.zeros([CODES], tl.int64), tl.zeros([CODES], tl.int64) + (n_rows - 1)
    while tl.max((low < high).to(tl.int32), axis=0) > 0:
        middle = (low + high) // 2
        behind = tl.load(rank + head * n_rows + middle) > nth
        high = tl.where(behind, middle, high)
        low = tl.where(behind, low, tl.minimum(middle + 1, high))
    at = head * stride_head + row_offset(low.to(tl.int32), n_inner, stride_outer, stride_inner)
    dtype = codebook.dtype.element_ty
    for begin in range(0, D, BLOCK_D):
        column = (begin + tl.arange(0, BLOCK_D)).to(tl.int64)
        here = taken[:, None] & (column < D)[None, :]
        value = to_float64(tl.load(x + at[:, None] + column[None, :] * stride_d, mask=here, other=0.0)).to(dtype)
        place = (head * codebook_head + code * codebook_k)[:, None] + column[None, :] * codebook_d
        tl.store(codebook + place, value, mask=here)
        place = (head * embed_sum_head + code * embed_sum_k)[:, None] + column[None, :] * embed_sum_d
        tl.store(embed_sum + place, saturate((value * threshold.to(dtype)).to(tl.float64), dtype), mask=here)
    size = tl.zeros([CODES], tl.float64) + threshold
    tl.store(cluster_size + head * cluster_size_head + code * cluster_size_k, size.to(dtype), mask=taken)


def replace_dead_codes_(call: ReplaceCall) -> Tensor:  # [] int64
    codebook, embed_sum, cluster_size, x, uniforms, threshold, _ = call
    if x.dtype == torch.float64 and codebook.dtype == torch.float32:
        x = x.float()  # a row that float32 does not hold is not finite there, and is not taken
    view = views.rows(x, codebook.shape[0] if codebook.dim() == 3 else None)
    if codebook.dim() == 2:
        codebook, embed_sum, cluster_size = (t.unsqueeze(0) for t in (codebook, embed_sum, cluster_size))
    heads, n_codes, dim = codebook.shape
    n_rows = view.n_rows
    if n_rows == 0:
        return torch.zeros((), dtype=torch.int64, device=x.device)
    tile = tiles.pick("replace_dead_codes_", TILES, x.device, dim, torch.float64)
    usable = torch.empty((heads, n_rows), dtype=torch.int8, device=x.device)
    _usable[(triton.cdiv(heads * n_rows, tile["ROWS"]),)](
        view.tensor,
        usable,
        n_rows,
        heads * n_rows,
        *view.steps,
        D=dim,
        AXIS=axis_of(view.stride_d, view.n_inner),
        **tile,
    )
    rank = usable.cumsum(-1)
    dead = cluster_size.contiguous() < threshold
    slots = dead.cumsum(-1)
    _replace[(triton.cdiv(heads * n_codes, CODES),)](
        codebook, embed_sum, cluster_size, view.tensor, dead, slots, uniforms.contiguous(), rank,
        n_codes, heads * n_codes, n_rows, *view.steps, *codebook.stride(), *embed_sum.stride(), *cluster_size.stride(),
        float64_bits(threshold), D=dim, CODES=CODES, BLOCK_D=tile["BLOCK_D"], enable_fp_fusion=False,
    )  # fmt: skip
    return torch.where(rank.select(1, -1) > 0, slots.select(1, -1), 0).sum()
