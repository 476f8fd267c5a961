"""The reference model as it is built without fastvq: the same layers and weights, peers' parts.

The quantizer is vector-quantize-pytorch's, the masked convolutions are dense ones whose weights are multiplied by the
mask at every call, and the sampler runs the whole network for every position.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastvq.models import PixelCNN, Prior
from fastvq.models.autoencoder import Autoencoder
from fastvq.nn import GatedMaskedConv2d, VectorQuantizer
from fastvq.ops import Quantized

__all__ = ["dense_prior", "peer_autoencoder"]


class PeerQuantizer(nn.Module):
    """vector-quantize-pytorch's VectorQuantize with the settings of a ``VectorQuantizer``, in its interface."""

    def __init__(self, ours: VectorQuantizer) -> None:
        super().__init__()
        from vector_quantize_pytorch import VectorQuantize

        self.peer = VectorQuantize(
            dim=ours.dim, codebook_size=ours.n_codes, decay=ours.decay, commitment_weight=ours.commitment_weight,
            threshold_ema_dead_code=ours.dead_code_threshold or 0, rotation_trick=False,
        )  # fmt: skip

    def forward(
        self,
        x: Tensor,  # [B, D, h, w]
    ) -> Quantized:
        batch, dim, height, width = x.shape
        rows = x.movedim(1, -1).reshape(batch, height * width, dim)
        quantized, indices, loss = self.peer(rows)
        quantized = quantized.view(batch, height, width, dim).movedim(-1, 1)
        return Quantized(quantized, indices.view(batch, height, width), loss.sum(), loss.new_zeros(()))

    def decode(
        self,
        ids: Tensor,  # [B, h, w]
    ) -> Tensor:
        """[B, D, h, w]"""
        return self.peer.get_codes_from_indices(ids).movedim(-1, 1)


class DenseGated(nn.Module):
    """``GatedMaskedConv2d`` as dense convolutions are used for it: every tap is computed, masked ones times zero."""

    def __init__(self, ours: GatedMaskedConv2d) -> None:
        super().__init__()
        self.weight, self.bias = ours.weight, ours.bias
        kh, kw = ours.kernel_size
        mask = torch.ones(kh, kw)
        kind, _, letter = str(ours.mask).rpartition("-")
        if kind == "vertical":
            mask[kh // 2 + (letter == "B") :] = 0
        else:
            mask[:, kw // 2 + (letter == "B") :] = 0
        self.register_buffer("mask", mask, persistent=False)

    def forward(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        kh, kw = self.mask.shape
        both = F.conv2d(x, self.weight * self.mask, self.bias, padding=(kh // 2, kw // 2))
        if condition is not None:
            both = both + (condition if condition.dim() == 4 else condition[:, :, None, None])
        a, b = both.chunk(2, 1)
        return torch.tanh(a) * torch.sigmoid(b)


def peer_autoencoder(model: Autoencoder) -> Autoencoder:
    twin = copy.deepcopy(model)
    twin.quantizers = nn.ModuleList(PeerQuantizer(q) for q in twin.quantizers)
    return twin


def dense_prior(prior: Prior) -> Prior:
    """The same prior, weights and all, on dense convolutions; sample it with ``cached=False``."""
    twin = copy.deepcopy(prior)
    _densify(twin.pixelcnn)
    return twin


def _densify(pixelcnn: PixelCNN) -> None:
    for layer in pixelcnn.layers:
        layer.vertical, layer.horizontal = DenseGated(layer.vertical), DenseGated(layer.horizontal)
