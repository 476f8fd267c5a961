"""Helpers that several backends of quantization share."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["DEGENERATE", "gather"]

# |x^ + c^| of opposite unit vectors is rounding noise, about 1e-7 in float32. Below this the rotation is undefined.
DEGENERATE = 1e-6


def gather(
    codebook: Tensor,  # [K, D] or [H, K, D]
    indices: Tensor,  # [...] or [H, ...]
) -> Tensor:  # [..., D] or [H, ..., D]
    """The code of every index; -1, which stands for no vector, gives code 0, and an index beyond the codes the last."""
    indices = indices.clamp(min=0, max=codebook.shape[-2] - 1)
    if codebook.dim() == 2:
        return codebook[indices]
    return torch.stack([c[i] for c, i in zip(codebook, indices, strict=True)])
