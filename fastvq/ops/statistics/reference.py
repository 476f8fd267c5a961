"""The definitions of code statistics, their moving average and the replacement of dead codes, in plain torch."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastvq._checks import check_indices

__all__ = ["code_statistics", "ema_update_", "replace_dead_codes_"]


def _saturate(
    wide: Tensor,  # float64
    dtype: torch.dtype,
) -> Tensor:
    """``wide`` as ``dtype``; what lies beyond its largest finite number becomes that number. NaN stays NaN."""
    return torch.nan_to_num(wide.to(dtype), nan=math.nan)


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
    check_indices("fastvq.ops.code_statistics", "indices", indices, -1, n_codes)
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
    return _saturate(sums, torch.float64 if x.dtype == torch.float64 else torch.float32), counts.clone()


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
    average = _saturate(old + (1 - decay) * _saturate(sums.double(), sums.dtype).double(), dtype)
    wide = size.double()
    total = wide.sum(dim=-1, keepdim=True)
    laplace = (wide + eps) / (total + size.shape[-1] * eps) * total
    divisor = laplace if smoothing == "laplace" else wide.clamp(min=eps)
    stays = total == 0
    if debias:
        stays = stays | (size == 0)
    new = torch.where(stays[..., None], codebook, _saturate(average.double() / divisor[..., None], dtype))
    codebook.copy_(torch.where(counted, new, codebook))
    embed_sum.copy_(torch.where(counted, average, embed_sum))
    cluster_size.copy_(torch.where(counted[..., 0], size, cluster_size))


def replace_dead_codes_(
    codebook: Tensor,  # [K, D] or [H, K, D]
    embed_sum: Tensor,  # [K, D] or [H, K, D]
    cluster_size: Tensor,  # [K] or [H, K]
    x: Tensor,  # [..., D] or [H, ..., D]
    uniforms: Tensor,  # [K] or [H, K]
    threshold: float,
) -> Tensor:  # [] int64
    """Every code with a size below the threshold becomes a row of x that is finite in the codebook's dtype.

    Of n such rows and m dead codes, dead code j takes one at random from the j-th of m equal stretches,
    j*n // m ... (j+1)*n // m - 1; the first of an empty stretch. Its size becomes the threshold, its sum the row times
    the threshold.
    """
    if codebook.dim() == 3:
        heads = zip(codebook, embed_sum, cluster_size, x, uniforms, strict=True)
        return torch.stack([replace_dead_codes_(*head, threshold) for head in heads]).sum()
    rows = x.reshape(-1, x.shape[-1]).to(codebook.dtype)
    usable = rows.isfinite().all(dim=-1).nonzero()[:, 0]
    dead = (cluster_size < threshold).nonzero()[:, 0]
    n, m = len(usable), len(dead)
    if n == 0 or m == 0:
        return torch.zeros((), dtype=torch.int64, device=x.device)
    stretch = torch.arange(m + 1, device=x.device) * n // m
    low, size = stretch[:-1], stretch.diff()
    nth = low + torch.minimum((uniforms[dead].double() * size).long(), (size - 1).clamp(min=0))
    samples = rows[usable[nth]]
    codebook[dead] = samples
    embed_sum[dead] = _saturate((samples * threshold).double(), codebook.dtype)
    cluster_size[dead] = threshold
    return torch.full((), m, dtype=torch.int64, device=x.device)
