"""The definitions of code statistics, their moving average and the replacement of dead codes, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from fastvq._checks import check_indices

__all__ = ["choose_rows", "code_statistics", "ema_update_", "replace_dead_codes_", "saturate"]

STATISTICS = "fastvq.ops.code_statistics"


def saturate(
    wide: Tensor,  # float64
    dtype: torch.dtype,
) -> Tensor:
    """``wide`` as ``dtype``; what lies beyond its largest finite number becomes that number. NaN stays NaN."""
    most = torch.finfo(dtype).max
    return wide.clamp(-most, most).to(dtype)


def code_statistics(
    x: Tensor,  # [..., D] or [H, ..., D]
    indices: Tensor,  # [...] or [H, ...] int64
    n_codes: int,
    n_heads: int | None,
    deterministic: bool = True,  # this one always is
) -> tuple[Tensor, Tensor]:
    """sums_k = float32(sum in float64, in row order, of x_r where index_r = k), counts_k = how many.

    Rows with index -1 and rows that hold NaN or infinity are left out. A sum beyond the largest finite number of its
    type is that number. float64 x: float64 sums.
    """
    check_indices(STATISTICS, "indices", indices, -1, n_codes)
    if n_heads is not None:
        each = [code_statistics(a, i, n_codes, None) for a, i in zip(x, indices, strict=True)]
        return torch.stack([s for s, _ in each]), torch.stack([c for _, c in each])
    rows, index = x.reshape(-1, x.shape[-1]), indices.reshape(-1)
    used = (index >= 0) & rows.isfinite().all(dim=-1)
    # Rows left out are added to a code of their own: a choice by mask would have to wait for their number on a GPU.
    index = torch.where(used, index, n_codes)
    wide = torch.where(used[:, None], rows, 0).double()
    sums = wide.new_zeros(n_codes + 1, x.shape[-1]).index_add_(0, index, wide)[:n_codes]
    counts = index.new_zeros(n_codes + 1).index_add_(0, index, torch.ones_like(index))[:n_codes]
    return saturate(sums, torch.float64 if x.dtype == torch.float64 else torch.float32), counts.clone()


def ema_update_(
    codebook: Tensor,  # [K, D] or [H, K, D]
    embed_sum: Tensor,  # [K, D] or [H, K, D]
    cluster_size: Tensor,  # [K] or [H, K]
    sums: Tensor,  # [K, D] or [H, K, D]
    counts: Tensor,  # [K] or [H, K] int64
    decay: float,
    eps: float,
    smoothing: str,
    debias: bool,
) -> None:
    """The formulas of ``fastvq.ops.ema_update_`` in float64, each stored value rounded once."""
    dtype = codebook.dtype
    counted = (counts.sum(dim=-1, keepdim=True) > 0)[..., None]
    empty_before = cluster_size == 0
    size = (decay * cluster_size.double() + (1 - decay) * counts.double()).to(dtype)
    keep = torch.full_like(size, decay, dtype=torch.float64)
    if debias:
        keep = torch.where(empty_before, 0, keep)
    old = torch.where(keep[..., None] == 0, 0, keep[..., None] * embed_sum.double())
    average = saturate(old + (1 - decay) * saturate(sums.double(), sums.dtype).double(), dtype)
    wide = size.double()
    total = wide.sum(dim=-1, keepdim=True)
    laplace = (wide + eps) / (total + size.shape[-1] * eps) * total
    divisor = laplace if smoothing == "laplace" else wide.clamp(min=eps)
    stays = total == 0
    if debias:
        stays = stays | (size == 0)
    new = torch.where(stays[..., None], codebook, saturate(average.double() / divisor[..., None], dtype))
    codebook.copy_(torch.where(counted, new, codebook))
    embed_sum.copy_(torch.where(counted, average, embed_sum))
    cluster_size.copy_(torch.where(counted[..., 0], size, cluster_size))


def choose_rows(
    usable: Tensor,  # [N] bool, N >= 1
    slots: Tensor,  # [M] int64: which of the n_slots draws each is, 0 ... n_slots-1
    n_slots: Tensor,  # [] int64
    uniforms: Tensor,  # [M] in [0, 1)
) -> Tensor:  # [M] int64
    """Randomly chosen usable rows, no two alike as long as there are n_slots usable ones; without host synchronisation.

    Of n usable rows draw j takes one at random from the j-th of n_slots equal stretches [j*n // m, (j+1)*n // m). With
    fewer usable rows than draws, rows repeat; with none the result means nothing.
    """
    rank = usable.cumsum(0)
    n, m = rank[-1], n_slots.clamp(min=1)
    low, high = slots * n // m, (slots + 1) * n // m
    nth = low + (uniforms.double() * (high - low)).long()
    nth = torch.minimum(nth, torch.maximum(high - 1, low))
    return torch.searchsorted(rank, nth + 1).clamp(max=usable.shape[0] - 1)


def replace_dead_codes_(
    codebook: Tensor,  # [K, D] or [H, K, D]
    embed_sum: Tensor,  # [K, D] or [H, K, D]
    cluster_size: Tensor,  # [K] or [H, K]
    x: Tensor,  # [..., D] or [H, ..., D]
    uniforms: Tensor,  # [K] or [H, K]
    threshold: float,
) -> Tensor:  # [] int64
    if codebook.dim() == 3:
        heads = zip(codebook, embed_sum, cluster_size, x, uniforms, strict=True)
        return torch.stack([replace_dead_codes_(*head, threshold) for head in heads]).sum()
    rows = x.reshape(-1, x.shape[-1])
    if rows.shape[0] == 0:
        return torch.zeros((), dtype=torch.int64, device=x.device)
    # NaN and infinity come through, and no N x D tensor is made. Rows must be finite as codes will be.
    low, high = (t.to(codebook.dtype) for t in torch.aminmax(rows, dim=-1))
    usable = low.isfinite() & high.isfinite()
    dead = (cluster_size < threshold) & usable.any()
    chosen = choose_rows(usable, dead.cumsum(0) - 1, dead.sum(), uniforms)
    samples = rows[chosen].to(codebook.dtype)
    sums = saturate((samples * threshold).double(), codebook.dtype)
    codebook.copy_(torch.where(dead[:, None], samples, codebook))
    embed_sum.copy_(torch.where(dead[:, None], sums, embed_sum))
    cluster_size.masked_fill_(dead, threshold)
    return dead.sum()
