"""A training step's forward on a GPU: the launches of ``quantize``, then those of ``code_statistics``."""

from __future__ import annotations

from torch import Tensor

from fastvq.ops.quantize.triton_forward import quantize
from fastvq.ops.statistics.triton_statistics import code_statistics

__all__ = ["vq_step"]


def vq_step(
    x: Tensor,  # [..., D] or [H, ..., D]
    codebook: Tensor,  # [K, D] or [H, K, D]
    mask: Tensor | None,  # [...] or [H, ...] bool
    metric: str,
    beta: float,
    precision: str,
    deterministic: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Same arguments and result as the reference's; with ``deterministic=False`` the sums are added by atomics."""
    quantized, commitment_loss, codebook_loss, indices = quantize(x, codebook, mask, metric, beta, precision)
    heads = codebook.shape[0] if codebook.dim() == 3 else None
    sums, counts = code_statistics(x, indices, codebook.shape[-2], heads, deterministic)
    return quantized, commitment_loss, codebook_loss, indices, sums, counts
