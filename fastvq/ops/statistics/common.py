"""Helpers of code statistics that several backends, and the modules, share."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["STATISTICS", "choose_rows", "replace_dead_codes_"]

STATISTICS = "fastvq.ops.code_statistics"


def _saturate(
    wide: Tensor,  # float64
    dtype: torch.dtype,
) -> Tensor:
    """``wide`` as ``dtype``; what lies beyond its largest finite number becomes that number. NaN stays NaN."""
    most = torch.finfo(dtype).max
    return wide.clamp(-most, most).to(dtype)


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
    """``fastvq.ops.replace_dead_codes_`` in torch, without host synchronisation."""
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
    sums = _saturate((samples * threshold).double(), codebook.dtype)
    codebook.copy_(torch.where(dead[:, None], samples, codebook))
    embed_sum.copy_(torch.where(dead[:, None], sums, embed_sum))
    cluster_size.masked_fill_(dead, threshold)
    return dead.sum()
