"""The definition of a training step's forward, in plain torch: quantization, then the statistics of what it chose."""

from __future__ import annotations

from torch import Tensor

from fastvq.ops.quantize import reference as quantization
from fastvq.ops.statistics import reference as sums_by_code

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
    """(quantized, commitment_loss, codebook_loss, indices, sums, counts) of ``fastvq.ops.vq_step``."""
    quantized, commitment, codebook_loss, indices = quantization.quantize(x, codebook, mask, metric, beta, precision)
    heads = codebook.shape[0] if codebook.dim() == 3 else None
    sums, counts = sums_by_code.code_statistics(x, indices, codebook.shape[-2], heads)
    return quantized, commitment, codebook_loss, indices, sums, counts
