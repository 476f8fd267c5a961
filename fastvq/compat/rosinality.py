"""rosinality's vq-vae-2-pytorch: ``Quantize``, in whole, since it is a file that people copy."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, distributed

from fastvq import ops
from fastvq.compat._lookup import nearest, statistics
from fastvq.compat._target import PatchedModule, PatchTarget, require

__all__ = ["TARGETS", "FastQuantize", "Quantize"]


class FastQuantize(PatchedModule):
    """The codebook lies as [D, K]; a transposed view serves the kernels."""

    debias = False

    def forward(self, input: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # [..., D] -> [..., D], [], [...]
        """As the peer's: straight-through in eval too, the difference unweighted, codes from before the update."""
        codes = self.embed.T
        if input.dtype == codes.dtype == torch.float32:
            q = ops.quantize(input, codes.clone() if self.training else codes)
            quantized, difference, indices = q.quantized, q.commitment_loss, q.indices
        else:
            indices = nearest(input, codes)
            quantized = self.embed_code(indices)
            difference = (quantized.detach() - input).pow(2).mean()
            quantized = input + (quantized - input).detach()
        if self.training:
            self._learn(input, indices)
        return quantized, difference, indices

    @torch.no_grad()
    def _learn(self, x: Tensor, indices: Tensor) -> None:
        sums, counts = statistics(x, indices, self.n_embed)
        if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
            distributed.all_reduce(counts)
            distributed.all_reduce(sums)
        sizes, average = self.cluster_size.data, self.embed_avg.data
        if self.debias:
            average.mul_((sizes > 0).to(average.dtype))
        sizes.mul_(self.decay).add_(counts, alpha=1 - self.decay)
        average.mul_(self.decay).add_(sums.T, alpha=1 - self.decay)
        total = sizes.sum()
        smoothed = (sizes + self.eps) / (total + self.n_embed * self.eps) * total
        codes = average / smoothed
        self.embed.data.copy_(torch.where(sizes > 0, codes, self.embed) if self.debias else codes)


class Quantize(FastQuantize):
    """``Quantize(dim, n_embed, decay=0.99, eps=1e-5)`` with the peer's constructor, state and forward.

    Sizes start at zero and sums at the codes, as the peer's do, which divides the codes that the first batch does not
    use by almost nothing. ``debias=True`` keeps such a code as it is until a vector chooses it, and from then on is
    the weighted mean of its vectors alone.
    """

    def __init__(self, dim: int, n_embed: int, decay: float = 0.99, eps: float = 1e-5, *, debias: bool = False) -> None:
        super().__init__()
        self.dim, self.n_embed, self.decay, self.eps, self.debias = dim, n_embed, decay, eps, debias
        embed = torch.randn(dim, n_embed)
        self.register_buffer("embed", embed)
        self.register_buffer("cluster_size", torch.zeros(n_embed))
        self.register_buffer("embed_avg", embed.clone())

    def embed_code(self, embed_id: Tensor) -> Tensor:
        """Codes of indices."""
        return F.embedding(embed_id, self.embed.T)


TARGETS = (
    PatchTarget(
        peer="rosinality",
        name="Quantize",
        # The peer's file is vqvae.py at the top of a repository; copies keep its name.
        modules=r"(.*\.)?(vqvae|vq_vae|vqvae2|vq_vae_2)",
        fast=FastQuantize,
        replaced_methods=("forward", "embed_code"),
        reject=require(embed="2", embed_avg="2", cluster_size="1", n_embed="", decay="", eps=""),
    ),
)
