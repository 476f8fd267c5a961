# mypy: allow-untyped-defs
"""The moving average of the statistics per code, and the codebook it gives, on a GPU.

tensors                                                     H heads, K codes, D columns
    codebook, embed_sum  [H, K, D]   cluster_size  [H, K]   float32 or float64, any strides, in place
    sums  [H, K, D] float32 or 64    counts  [H, K] int64   contiguous
    plan  [2, H, K] float64          per code: what to divide by, or a mark; the share of the old sum that stays

    1. ``_sizes``, a program a head: the sum of the new sizes over k in a fixed order, then cluster_size and ``plan``
    2. ``_elements``, ROWS codes a program: embed_sum and codebook, each element read once and written once

It packs no operands for the next lookup and flags no dead codes. Before that lookup a quantizer normalises its codes
(cosine) and ``replace_dead_codes_`` writes to them, so operands packed here would be packed again. At N = 65536,
K = 1024, D = 64 packing moves 1 MB in the cache, and the lookup 50 MB (rows read, rounded, read again). Packing takes
1e6 operations, the lookup 1e10. A flag is one comparison of K sizes; the replacement passes over all candidates.

Arithmetic is float64 without fused multiply-adds and each stored value is rounded once. So the result equals that of
the CPU's kernel to the bit, except for the sum of the sizes, which is added in another order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fastvq.backends import tiles
from fastvq.backends.triton import float64_bits
from fastvq.ops._triton_rows import saturate
from fastvq.ops.statistics.call import UpdateCall

__all__ = ["ema_update_"]

BLOCK_K = 1024  # codes a step of _sizes
STAYS = tl.constexpr(-1.0)  # marks a code that keeps its row of the codebook
UNTOUCHED = tl.constexpr(-2.0)  # marks a code of a head that counted nothing
TILES = [
    tiles.Tile(80, 16, torch.float64, {"ROWS": 64, "BLOCK_D": 16, "num_warps": 4}),
    tiles.Tile(80, 64, torch.float64, {"ROWS": 16, "BLOCK_D": 64, "num_warps": 4}),
    tiles.Tile(80, 1 << 62, torch.float64, {"ROWS": 4, "BLOCK_D": 256, "num_warps": 4}),
]


@triton.jit
def _new_size(old, count, decay, take, dtype: tl.constexpr):
    """The stored size, in float64 again."""
    return (decay * old + take * count.to(tl.float64)).to(dtype).to(tl.float64)


@triton.jit(do_not_specialize=["n_codes", "decay_bits", "take_bits", "eps_bits", "k_eps_bits"])
def _sizes(
    cluster_size, counts, plan, n_codes, n_plan, stride_head, stride_k, decay_bits, take_bits, eps_bits, k_eps_bits,
    LAPLACE: tl.constexpr, DEBIAS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0).to(tl.int64)
    decay = decay_bits.to(tl.int64).to(tl.float64, bitcast=True)
    take = take_bits.to(tl.int64).to(tl.float64, bitcast=True)
    eps = eps_bits.to(tl.int64).to(tl.float64, bitcast=True)
    k_eps = k_eps_bits.to(tl.int64).to(tl.float64, bitcast=True)
    dtype = cluster_size.dtype.element_ty
    counted = tl.zeros([BLOCK], tl.int64)
    sizes = tl.zeros([BLOCK], tl.float64)
    for begin in range(0, n_codes, BLOCK):
        code = (begin + tl.arange(0, BLOCK)).to(tl.int64)
        here = code < n_codes
        old = tl.load(cluster_size + head * stride_head + code * stride_k, mask=here, other=0.0).to(tl.float64)
        count = tl.load(counts + head * n_codes + code, mask=here, other=0)
        counted += count
        sizes += _new_size(old, count, decay, take, dtype)
    n, total = tl.sum(counted, axis=0), tl.sum(sizes, axis=0)
    for begin in range(0, n_codes, BLOCK):
        code = (begin + tl.arange(0, BLOCK)).to(tl.int64)
        here = code < n_codes
        at = cluster_size + head * stride_head + code * stride_k
        old = tl.load(at, mask=here, other=0.0).to(tl.float64)
        size = _new_size(old, tl.load(counts + head * n_codes + code, mask=here, other=0), decay, take, dtype)
        keep = tl.zeros([BLOCK], tl.float64) + decay
        laplace = (size + eps) / (total + k_eps) * total
        divisor = laplace if LAPLACE else tl.where(size < eps, eps, size)
        divisor = tl.where(total == 0, STAYS, divisor)
        if DEBIAS:
            divisor = tl.where(size == 0, STAYS, divisor)
            keep = tl.where(old == 0, 0.0, keep)
        divisor = tl.where(n > 0, divisor, UNTOUCHED)
        tl.store(plan + head * n_codes + code, divisor, mask=here)
        tl.store(plan + n_plan + head * n_codes + code, keep, mask=here)
        tl.store(at, size.to(dtype), mask=here & (divisor != UNTOUCHED))


@triton.jit(do_not_specialize=["n_codes", "n_plan", "take_bits"])
def _elements(
    codebook, embed_sum, sums, plan, n_codes, n_plan, codebook_head, codebook_k, codebook_d,
    embed_sum_head, embed_sum_k, embed_sum_d, take_bits, D: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1).to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)
    take = take_bits.to(tl.int64).to(tl.float64, bitcast=True)
    divisor = tl.load(plan + row, mask=row < n_plan, other=UNTOUCHED)[:, None]
    keep = tl.load(plan + n_plan + row, mask=row < n_plan, other=0.0)[:, None]
    here = (divisor != UNTOUCHED) & (column < D)[None, :]
    head = (row // n_codes).to(tl.int64)
    code = row - head * n_codes
    average = (embed_sum + head * embed_sum_head + code * embed_sum_k)[:, None] + column[None, :] * embed_sum_d
    dtype = embed_sum.dtype.element_ty
    old = tl.load(average, mask=here & (keep != 0), other=0.0).to(tl.float64)  # 0 times a NaN would be one
    new = tl.load(sums + row[:, None].to(tl.int64) * D + column[None, :], mask=here, other=0.0).to(tl.float64)
    new = saturate(new, sums.dtype.element_ty).to(tl.float64)
    now = saturate(keep * old + take * new, dtype)
    tl.store(average, now, mask=here)
    place = (codebook + head * codebook_head + code * codebook_k)[:, None] + column[None, :] * codebook_d
    tl.store(place, saturate(now.to(tl.float64) / divisor, dtype), mask=here & (divisor != STAYS))


def ema_update_(call: UpdateCall) -> None:
    codebook, embed_sum, cluster_size, sums, counts, decay, eps, smoothing, debias, _ = call
    if codebook.dim() == 2:
        codebook, embed_sum, cluster_size = (t.unsqueeze(0) for t in (codebook, embed_sum, cluster_size))
    heads, n_codes, dim = codebook.shape
    sums, counts = sums.contiguous(), counts.contiguous()
    n_plan = heads * n_codes
    plan = codebook.new_empty((2, n_plan), dtype=torch.float64)
    take = float64_bits(1 - decay)
    _sizes[(heads,)](
        cluster_size, counts, plan, n_codes, n_plan, *cluster_size.stride(), float64_bits(decay), take,
        float64_bits(eps), float64_bits(n_codes * eps), LAPLACE=smoothing == "laplace", DEBIAS=debias, BLOCK=BLOCK_K,
        enable_fp_fusion=False,
    )  # fmt: skip
    tile = tiles.pick("ema_update_", TILES, codebook.device, dim, torch.float64)
    _elements[(triton.cdiv(n_plan, tile["ROWS"]), triton.cdiv(dim, tile["BLOCK_D"]))](
        codebook, embed_sum, sums, plan, n_codes, n_plan, *codebook.stride(), *embed_sum.stride(), take,
        D=dim, enable_fp_fusion=False, **tile,
    )  # fmt: skip
