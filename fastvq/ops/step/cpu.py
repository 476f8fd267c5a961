"""A training step's forward by the C++ kernels: on one thread a block of rows gives its statistics while in cache."""

from __future__ import annotations

import torch
from torch import Tensor

from fastvq.ops.quantize.cpu import quantize

__all__ = ["vq_step"]


def vq_step(
    x: Tensor,  # [..., D] or [H, ..., D]
    codebook: Tensor,  # [K, D] or [H, K, D]
    mask: Tensor | None,  # [...] or [H, ...] bool
    metric: str,
    beta: float,
    precision: str,
    deterministic: bool = True,  # this one always is
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    sums = torch.empty(codebook.shape, dtype=torch.float64 if x.dtype == torch.float64 else torch.float32, device="cpu")
    counts = torch.empty(codebook.shape[:-1], dtype=torch.int64, device="cpu")
    return *quantize(x, codebook, mask, metric, beta, precision, statistics=(sums, counts)), sums, counts
