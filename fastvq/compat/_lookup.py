"""What every replacement shares: lookup, statistics, k-means, and the gradient estimator with its losses."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from fastvq import ops
from fastvq._options import Metric

__all__ = ["image_quantize", "kmeans_lloyd", "nearest", "statistics"]


def nearest(
    x: Tensor,  # [..., D], or [H, ..., D]
    codebook: Tensor,  # [K, D], or [H, K, D]
    metric: Metric = "euclidean",
) -> Tensor:  # [...] or [H, ...]
    """Exact indices, whatever autocast says: the op is no matmul, so autocast does not touch its operands."""
    return ops.nearest(x.detach(), codebook.detach(), metric=metric)


def statistics(
    x: Tensor,  # [..., D], or [H, ..., D]
    indices: Tensor,  # [...] or [H, ...]
    n_codes: int,
    mask: Tensor | None = None,  # [...] or [H, ...]
    n_heads: int | None = None,
) -> tuple[Tensor, Tensor]:  # [K, D] and [K], or [H, K, D] and [H, K], both of x's dtype
    """Sums and counts as peers take them from a one-hot product: of x's dtype, ready for an all-reduce."""
    sums, counts = ops.code_statistics(x.detach(), indices, n_codes, mask=mask, n_heads=n_heads)
    return sums.to(x.dtype), counts.to(x.dtype)


def kmeans_lloyd(
    samples: Tensor,  # [N, D], or [H, N, D]
    means: Tensor,  # [K, D] or [H, K, D]
    n_iters: int,
    *,
    metric: Metric = "euclidean",
    reduce: Callable[[Tensor], object] = lambda t: None,
    normalise: Callable[[Tensor], Tensor] = lambda t: t,
) -> tuple[Tensor, Tensor]:  # means and counts [K] or [H, K] of the last iteration
    """k-means from given means, as peers run it before the first step: empty clusters keep their mean.

    ``reduce`` is called on the counts and then on the already divided means, which is the order peers use.
    """
    counts = samples.new_zeros(means.shape[:-1])
    n_heads = means.shape[0] if means.dim() == 3 else None
    for _ in range(n_iters):
        sums, counts = statistics(samples, nearest(samples, means, metric), means.shape[-2], n_heads=n_heads)
        reduce(counts)
        moved = sums / counts.clamp(min=1)[..., None]
        reduce(moved)
        means = torch.where((counts == 0)[..., None], means, normalise(moved))
    return means, counts


def image_quantize(
    z: Tensor,  # [B, ..., D]
    codebook: Tensor,  # [K, D]
    commitment_weight: float,
    codebook_weight: float,
) -> tuple[Tensor, Tensor, Tensor]:  # [B, ..., D] with the straight-through estimator, loss [], indices [B, ...]
    """The learnable VQ-VAE layer; loss = ``commitment_weight |sg(c) - z|^2 + codebook_weight |c - sg(z)|^2``, means."""
    if z.dtype == codebook.dtype == torch.float32:
        # Peers hand over a permuted image; rows copied once are read and written faster than walked with its strides.
        q = ops.quantize(z.contiguous(), codebook)
        return q.quantized, commitment_weight * q.commitment_loss + codebook_weight * q.codebook_loss, q.indices
    # In half precision peers also compute the losses in it; only the lookup is to be better.
    indices = nearest(z, codebook)
    chosen = F.embedding(indices, codebook)
    loss = commitment_weight * torch.mean((chosen.detach() - z) ** 2)
    loss = loss + codebook_weight * torch.mean((chosen - z.detach()) ** 2)
    return z + (chosen - z).detach(), loss, indices
