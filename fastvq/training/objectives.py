"""The objectives of an autoencoder and of a prior, as ``train`` takes them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastvq.data import Batch
from fastvq.models.autoencoder import Autoencoder

__all__ = ["autoencoder_objective", "prior_objective"]

Result = tuple[Tensor, dict[str, Tensor]]


def autoencoder_objective(net: Callable[..., Any], batch: Batch) -> Result:
    """Reconstruction and commitment loss. The log gets both, and each level's perplexity and share of used codes."""
    out = net(batch.images)
    with torch.no_grad():
        error = F.mse_loss(out.reconstruction.float(), batch.images)
    numbers = {
        "psnr": 10 * torch.log10(4 / error),  # normalised pixels span 2
        "reconstruction_loss": out.reconstruction_loss,
        "commitment_loss": out.commitment_loss,
    }
    for level, (perplexity, used) in enumerate(zip(out.perplexity, out.used, strict=True)):
        numbers |= {f"perplexity_{level}": perplexity, f"used_{level}": used}
    return out.loss, numbers


def prior_objective(
    model: Autoencoder, level: int, *, with_labels: bool
) -> Callable[[Callable[..., Any], Batch], Result]:
    """Negative log-likelihood of a level's ids. The frozen ``model`` encodes each batch after augmentation, so
    augmented pictures count as further pictures."""

    def objective(net: Callable[..., Any], batch: Batch) -> Result:
        maps = model.encode_maps(batch.images)
        labels = batch.labels if with_labels else None
        logits = net(maps[level], labels, maps[:level])
        loss = F.cross_entropy(logits.float(), maps[level])
        right = (logits.argmax(1) == maps[level]).float().mean()
        return loss, {
            "bits_per_id": loss / torch.log(torch.tensor(2.0, dtype=torch.float32, device="cpu")),
            "right": right,
        }

    return objective
