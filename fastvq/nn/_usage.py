"""Use of the codes: counts of one training step, and totals over many forwards."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastvq.ops._library import serialisable

__all__ = ["CodeUsage", "count_codes", "usage_of"]


@serialisable("nn.CodeUsage")
class CodeUsage(NamedTuple):
    """Use of the codes in the last training step, or in all forwards since ``track_usage``.

    Attributes:
        perplexity: [...] exp of the entropy of the counts: 1 (one code) ... K (all equally often).
        used: [...] int64, codes with at least one vector.
        counts: [..., K] int64.
    """

    perplexity: Tensor
    used: Tensor
    counts: Tensor


def usage_of(
    counts: Tensor,  # [..., K] int64
) -> CodeUsage:
    share = counts.double() / counts.sum(dim=-1, keepdim=True).clamp(min=1)
    perplexity = torch.exp(torch.special.entr(share).sum(dim=-1)).float()
    return CodeUsage(perplexity, (counts > 0).sum(dim=-1), counts.clone())


def count_codes(
    indices: Tensor,  # [H, ...] int64; -1 is not counted
    usable: Tensor,  # [H, ...] bool
    n_codes: int,
) -> Tensor:  # [H, K] int64
    """The number of vectors of each code."""
    n_heads = indices.shape[0]
    head = torch.arange(n_heads, device=indices.device).view(-1, *[1] * (indices.dim() - 1))
    counted = usable & (indices >= 0)
    slot = (head * n_codes + indices.clamp(min=0)).reshape(-1)
    counts = torch.zeros(n_heads * n_codes, dtype=torch.int64, device=indices.device)
    return counts.scatter_add_(0, slot, counted.reshape(-1).long()).view(n_heads, n_codes)
