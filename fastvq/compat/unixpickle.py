"""unixpickle's vq-vae-2: ``VQ``, in whole, since the package is not on the index."""

from __future__ import annotations

import random

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvq.compat._lookup import nearest
from fastvq.compat._target import PatchedModule, PatchTarget, require

__all__ = ["TARGETS", "VQ", "FastVQ"]


class FastVQ(PatchedModule):
    """A learnable dictionary; the losses are the caller's, from the two tensors that come out."""

    def forward(self, inputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # [N, C] or [N, C, H, W]
        """As the peer's: codes with a gradient to the dictionary, codes with one to the inputs, indices."""
        channels_last = inputs.movedim(1, -1)
        indices = nearest(channels_last, self.dictionary)
        embedded = F.embedding(indices, self.dictionary).movedim(-1, 1).contiguous()
        passed = embedded.detach() + (inputs - inputs.detach())
        if self.training:
            self._count(indices)
            self._revive(channels_last)
        return embedded, passed, indices

    @torch.no_grad()
    def _count(self, indices: Tensor) -> None:
        """A used code gains ``dead_rate``, an unused one loses 1; kept within [0, dead_rate]."""
        change = torch.full_like(self.usage_count, -1)
        change[indices.flatten()] = self.dead_rate
        self.usage_count.data.add_(change).clamp_(0, self.dead_rate)

    @torch.no_grad()
    def _revive(self, channels_last: Tensor) -> None:
        """Dead codes become vectors of the batch, drawn by ``random`` as in the peer."""
        dead = (self.usage_count == 0).nonzero().flatten().tolist()
        if not dead:
            return
        vectors = channels_last.reshape(-1, channels_last.shape[-1])
        rows = [random.choice(range(len(vectors))) for _ in dead]
        self.dictionary.data[dead] = vectors[rows].to(self.dictionary.dtype)


class VQ(FastVQ):
    """``VQ(num_channels, num_latents, dead_rate=100)`` with the peer's constructor, state and forward."""

    def __init__(self, num_channels: int, num_latents: int, dead_rate: int = 100) -> None:
        super().__init__()
        self.num_channels, self.num_latents, self.dead_rate = num_channels, num_latents, dead_rate
        self.dictionary = nn.Parameter(torch.randn(num_latents, num_channels))
        self.usage_count = nn.Parameter(torch.full((num_latents,), dead_rate), requires_grad=False)


TARGETS = (
    PatchTarget(
        peer="unixpickle",
        name="VQ",
        modules=r"(.*\.)?vq_vae_2\.vq",
        fast=FastVQ,
        replaced_methods=("forward",),
        reject=require(dictionary="2", usage_count="1", dead_rate=""),
        importable=("vq_vae_2.vq",),
    ),
)
