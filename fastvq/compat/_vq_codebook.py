"""vector-quantize-pytorch's ``Codebook``, which euclidean and cosine lookups share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastvq import ops
from fastvq._options import Estimator, Metric
from fastvq.compat._lookup import kmeans_lloyd, nearest, statistics
from fastvq.compat._target import PatchedModule, peer_module

__all__ = ["WITHOUT_DISTANCES", "FastCodebook", "samples_or_moves"]

# Travels from VectorQuantize to its Codebook in the place of the sampling temperature, which a deterministic lookup
# does not read: state on the module instead would be shared by threads that serve one model.
WITHOUT_DISTANCES = "fastvq: the distances are not used"


def samples_or_moves(codebook: Any) -> str | None:
    """Why a codebook's choice is never a lookup of nearest codes; None where it is one."""
    sampling = getattr(codebook.gumbel_sample, "keywords", {})
    if sampling.get("stochastic") or sampling.get("straight_through"):
        return "codes are sampled (stochastic_sample_codes or straight_through), not the nearest ones"
    if codebook.affine_param:
        return "affine_param moves the codebook with every batch"
    return None


class FastCodebook(PatchedModule):
    """``Codebook`` with the lookup, the statistics and k-means of fastvq; moving averages stay the peer's."""

    @classmethod
    def always_original(cls, module: nn.Module) -> str | None:
        return samples_or_moves(module)

    def forward(
        self,
        x: Tensor,  # [B, N, D], or [H, B, N, D]
        sample_codebook_temp: Any = None,
        mask: Tensor | None = None,  # [B, N]
        freeze_codebook: bool = False,
        codebook_transform_fn: Any = None,
        ema_update_weight: Any = None,
        accum_ema_update: bool = False,
        ema_update: bool | None = None,
        topk: int | None = None,
        update_usage: bool = True,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """As the peer's; without distances if the caller said that it does not use them."""
        odd = x.dim() >= 4 and x.shape[0] != self.num_codebooks
        if sample_codebook_temp is not WITHOUT_DISTANCES or odd:
            return super().forward(
                x,
                sample_codebook_temp=None if odd else sample_codebook_temp,
                mask=mask,
                freeze_codebook=freeze_codebook,
                codebook_transform_fn=codebook_transform_fn,
                ema_update_weight=ema_update_weight,
                accum_ema_update=accum_ema_update,
                ema_update=ema_update,
                topk=topk,
                update_usage=update_usage,
            )
        x, rows, mask = self._as_heads(x, mask)
        self.init_embed_(rows, mask=mask)
        embed = self._codes(rows)
        indices = nearest(rows, embed, self._metric())
        # One gather for all heads; its backward adds up the rows of a learnable codebook.
        first = torch.arange(embed.shape[0], device=indices.device) * embed.shape[1]
        at = indices + first.view(-1, *[1] * (indices.dim() - 1))
        quantized = nn.functional.embedding(at, embed.flatten(0, 1))
        if self.training and update_usage and not freeze_codebook:
            self._learn(rows, indices, mask, ema_update_weight, accum_ema_update, ema_update)
        return quantized.reshape(x.shape), indices.reshape(x.shape[:-1]), None

    def fused(
        self,
        x: Tensor,  # [B, N, D], or [H, B, N, D] float32
        estimator: Estimator,
        freeze_codebook: bool,
        ema_update_weight: Any,
        accum_ema_update: bool,
        ema_update: bool | None,
    ) -> ops.Quantized:  # of x's shape, with both losses
        """Lookup, estimator and losses in one pass, then the update."""
        _, rows, _ = self._as_heads(x, None)
        self.init_embed_(rows)
        embed = self._codes(rows)
        learns = self.training and not freeze_codebook
        if learns and torch.is_grad_enabled():
            # The update writes to the codebook in place, and the backward needs the codes that were chosen.
            embed = embed.clone()
        q = ops.quantize(rows, embed, metric=self._metric(), estimator=estimator)
        if learns:
            self._learn(rows, q.indices, None, ema_update_weight, accum_ema_update, ema_update)
        return q._replace(quantized=q.quantized.reshape(x.shape), indices=q.indices.reshape(x.shape[:-1]))

    def init_embed_(self, data: Tensor, mask: Tensor | None = None) -> None:
        """The peer's k-means on the first batch, without its N x K distances."""
        if self.initted:
            return
        data = data.detach()
        data = data.flatten(1, -2) if mask is None else data[mask].view(data.shape[0], -1, data.shape[-1])
        # Only some versions of the peer warn of too few vectors: those whose module has a logger.
        logger = getattr(peer_module(self, "Codebook"), "logger", None)
        if logger is not None and data.shape[1] < self.codebook_size:
            logger.warning(
                f"k-means init of {self.codebook_size} codes from {data.shape[1]} vectors: some will be sampled twice"
            )
        means, counts = kmeans_lloyd(
            data,
            self.sample_fn(data, self.codebook_size),
            self.kmeans_iters,
            metric=self._metric(),
            reduce=self.kmeans_all_reduce_fn,
            normalise=self.transform_input if self.use_cosine_sim else lambda t: t,
        )
        self.embed_avg.data.copy_(means * counts[..., None])
        self.cluster_size.data.copy_(counts)
        self.update_ema()
        self.initted.data.fill_(True)

    def update_indices(
        self,
        x: Tensor,
        embed_ind: Tensor,
        mask: Tensor | None = None,
        ema_update_weight: Any = None,
        accum_ema_update: bool = False,
        ema_update: bool | None = None,
    ) -> None:
        """As the peer's, by the same statistics as ``forward``: both must count alike to the last bit."""
        if embed_ind.dim() != (x.dim() - 1) or self.affine_param:
            theirs: Any = super()
            theirs.update_indices(x, embed_ind, mask, ema_update_weight, accum_ema_update, ema_update)
            return
        _, rows, mask = self._as_heads(x, mask)
        indices = embed_ind.reshape(rows.shape[:-1])
        indices = indices.masked_fill(indices == -1, 0)
        self._learn(rows, indices, mask, ema_update_weight, accum_ema_update, ema_update)

    update_ema_indices = update_indices

    def track_cluster_size_and_embed_avg(
        self,
        flatten: Tensor,  # [H, ..., D]
        embed_onehot: Tensor,  # [H, N, K] from the peer's own code, or indices [H, ...] from ours
        mask: Tensor | None = None,  # [H, N]
        ema_update_weight: Any = None,
        accum_ema_update: bool = False,
    ) -> None:
        """The peer's moving averages, from indices where ours give them."""
        if embed_onehot.is_floating_point():
            theirs: Any = super()
            theirs.track_cluster_size_and_embed_avg(flatten, embed_onehot, mask, ema_update_weight, accum_ema_update)
            return
        sums, counts = statistics(flatten, embed_onehot, self.codebook_size, mask, n_heads=flatten.shape[0])
        self.all_reduce_fn(counts)
        self.all_reduce_fn(sums)
        if callable(ema_update_weight):
            ema_update_weight = ema_update_weight(sums, counts)
        peer = peer_module(self, "Codebook")
        for buffer, new in ((self.cluster_size, counts), (self.embed_avg, sums)):
            if accum_ema_update:
                peer.accum_grad_(buffer, new)
            else:
                peer.ema_inplace(buffer, new, self.decay, ema_update_weight)

    def _learn(
        self, rows: Tensor, indices: Tensor, mask: Tensor | None, weight: Any, accumulate: bool, ema: bool | None
    ) -> None:
        self.update_codebook(
            rows.detach(),
            indices,
            mask=mask,
            ema_update_weight=weight,
            accum_ema_update=accumulate,
            ema_update=self.ema_update if ema is None else ema,
        )

    @staticmethod
    def _as_heads(
        x: Tensor,  # [B, N, D], or [H, B, N, D]
        mask: Tensor | None,  # [B, N]
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """x in float32; the same with a dimension of heads in front; and the mask as [H, rows of a head]."""
        x = x.float()
        rows = x if x.dim() >= 4 else x[None]
        if mask is None:
            return x, rows, None
        # The peer's order of rows is batch, head, position; a head of its own codebook has a leading dimension.
        rows = rows.flatten(1, -2)
        heads, n_rows = rows.shape[:2]
        mask = mask[:, None].expand(-1, n_rows // mask.numel(), -1).reshape(1, -1).expand(heads, -1)
        return x, rows, mask

    def _codes(self, rows: Tensor) -> Tensor:  # [H, K, D]
        embed = (self.embed if self.learnable_codebook else self.embed.detach()).to(rows.dtype)
        return embed if self.vq_bridge is None else self.vq_bridge(embed)

    def _metric(self) -> Metric:
        # Both sides are normalised already, in float32; "cosine" would divide by a norm the peer takes for one.
        return "dot" if self.use_cosine_sim else "euclidean"
