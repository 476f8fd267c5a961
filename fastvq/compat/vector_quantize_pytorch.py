"""vector-quantize-pytorch: ``VectorQuantize`` (and so ``ResidualVQ``, ``GroupedResidualVQ``) and ``SimVQ``.

The peer's ``Codebook.forward`` makes three N x K matrices: distances, one-hot rows, and their product's operand.
``FastCodebook`` makes none, so it has no distances to return. ``FastVectorQuantize`` knows which calls use them
(cross-entropy, diversity) and asks for the short way only otherwise.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastvq import ops
from fastvq.compat._exports import subclasses_of
from fastvq.compat._lookup import lloyd, nearest, statistics
from fastvq.compat._target import Fast, Target, always, home, needs

__all__ = ["TARGETS", "FastCodebook", "FastSimVQ", "FastVectorQuantize"]

# Travels from VectorQuantize to its Codebook in the place of the sampling temperature, which a deterministic lookup
# does not read: state on the module instead would be shared by threads that serve one model.
WITHOUT_DISTANCES = "fastvq: the distances are not used"


class FastCodebook(Fast):
    """``Codebook`` with the lookup, the statistics and k-means of fastvq; moving averages stay the peer's."""

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
        estimator: str,
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
        if data.shape[1] < self.codebook_size:
            home(self, "Codebook").logger.warning(
                f"k-means init of {self.codebook_size} codes from {data.shape[1]} vectors: some will be sampled twice"
            )
        means, counts = lloyd(
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
            super().update_indices(x, embed_ind, mask, ema_update_weight, accum_ema_update, ema_update)
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
            super().track_cluster_size_and_embed_avg(flatten, embed_onehot, mask, ema_update_weight, accum_ema_update)
            return
        sums, counts = statistics(flatten, embed_onehot, self.codebook_size, mask, n_heads=flatten.shape[0])
        self.all_reduce_fn(counts)
        self.all_reduce_fn(sums)
        if callable(ema_update_weight):
            ema_update_weight = ema_update_weight(sums, counts)
        peer = home(self, "Codebook")
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

    def _metric(self) -> str:
        # Both sides are normalised already, in float32; "cosine" would divide by a norm the peer takes for one.
        return "dot" if self.use_cosine_sim else "euclidean"


class FastVectorQuantize(Fast):
    """``VectorQuantize`` in one pass for common calls; else the peer's forward around ``FastCodebook``; else its own."""

    def forward(
        self,
        x: Tensor,
        indices: Tensor | None = None,
        mask: Tensor | None = None,
        lens: Tensor | None = None,
        topk: int | None = None,
        sample_codebook_temp: Any = None,
        freeze_codebook: bool | None = None,
        return_loss_breakdown: bool = False,
        codebook_transform_fn: Any = None,
        ema_update_weight: Any = None,
        accum_ema_update: bool = False,
        ema_update: bool | None = None,
    ) -> Any:
        """As the peer's."""
        options = {
            "freeze_codebook": freeze_codebook,
            "ema_update_weight": ema_update_weight,
            "accum_ema_update": accum_ema_update,
            "ema_update": ema_update,
        }
        reason = self._needs_distances(indices, topk, codebook_transform_fn)
        if reason is None and mask is None and lens is None and self._is_plain(x):
            return self._fused(x, return_loss_breakdown, **options)
        if reason is None:
            sample_codebook_temp = WITHOUT_DISTANCES
        else:
            self._fall_back(reason)
        return super().forward(
            x,
            indices=indices,
            mask=mask,
            lens=lens,
            topk=topk,
            sample_codebook_temp=sample_codebook_temp,
            return_loss_breakdown=return_loss_breakdown,
            codebook_transform_fn=codebook_transform_fn,
            **options,
        )

    @classmethod
    def limits(cls, module: nn.Module) -> list[str]:
        return [*_always_original(module), *_original_in_training(module)]

    def _needs_distances(self, indices: Any, topk: Any, transform: Any) -> str | None:
        """Why this call needs the distance matrix, or is none that fastvq does; None if it is one."""
        if indices is not None:
            return "the cross entropy of given indices needs all distances"
        if topk is not None:
            return "topk needs more than the nearest code"
        if transform is not None:
            return "codebook_transform_fn gives every vector its own codebook"
        if not isinstance(self._codebook, FastCodebook):
            return "its codebook is not patched"
        reasons = [*_always_original(self), *(_original_in_training(self) if self.training else ())]
        return reasons[0] if reasons else None

    def _is_plain(self, x: Tensor) -> bool:
        """Whether one pass gives all that this call returns."""
        codebook = self._codebook
        if codebook._forward_hooks or codebook._forward_pre_hooks or codebook._backward_hooks:
            return False
        shaped = self._is_map() or x.dim() in (2, 3)
        if not shaped or x.dtype != torch.float32 or torch.is_autocast_enabled(x.device.type):
            return False
        if not self.training:
            return not (codebook.learnable_codebook and torch.is_grad_enabled())
        if self.directional_reparam or self.sync_update_v > 0 or self.in_place_codebook_optimizer is not None:
            return False
        if self.learnable_codebook and not (self.route_gradients_to_input and x.requires_grad):
            return False
        return not self.has_codebook_orthogonal_loss

    def _fused(
        self, x: Tensor, breakdown: bool, freeze_codebook: bool | None, ema_update: bool | None, **options: Any
    ) -> Any:
        frozen = self.freeze_codebook if freeze_codebook is None else freeze_codebook
        estimator = "none"
        if self.training and x.requires_grad and self.route_gradients_to_input:
            estimator = "rotation" if self.rotation_trick else "straight_through"
        rows, space = self._as_rows(x)
        split = self.maybe_split_heads_from_input(self.project_in(rows))
        split = self._codebook.transform_input(split)
        # The peer passes on `ema_update and not topk`, which turns None into None: the codebook's default.
        q = self._codebook.fused(split, estimator, frozen, ema_update=ema_update, **options)
        loss = commitment = self.zero
        if self.training:
            loss = loss.requires_grad_()
            if self.has_commitment_loss:
                commitment = q.commitment_loss
                if self.learnable_codebook and not frozen:
                    # The peer's one term has a gradient on both sides; its value is that of either half.
                    commitment = commitment + (q.codebook_loss - q.codebook_loss.detach())
                loss = loss + commitment * self.commitment_weight
        quantized, indices = q.quantized, q.indices
        if self.heads > 1:
            if self.separate_codebook_per_head:  # [H, B, N, D] and [H, B, N]
                quantized, indices = quantized.movedim(0, -2).flatten(-2), indices.movedim(0, -1)
            else:  # [1, B H, N, D] and [1, B H, N]
                quantized = quantized[0].unflatten(0, (-1, self.heads)).transpose(1, 2).flatten(-2)
                indices = indices[0].unflatten(0, (-1, self.heads)).transpose(1, 2)
        quantized = self._from_rows(self.project_out(quantized), x, space)
        indices = indices.unflatten(1, space) if self._is_map() else indices.squeeze(1) if x.dim() == 2 else indices
        if not breakdown:
            return quantized, indices, loss
        peer = home(self, "VectorQuantize")
        return quantized, indices, loss, peer.LossBreakdown(commitment, self.zero, self.zero, self.zero)

    def _is_map(self) -> bool:
        return self.accept_image_fmap or self.accept_3d_fmap

    def _as_rows(self, x: Tensor) -> tuple[Tensor, torch.Size]:  # [B, N, D] as a view, and the shape of space
        if x.dim() == 2:
            return x[:, None], x.shape[:0]
        if self._is_map() or not self.channel_last:
            return x.flatten(2).transpose(1, 2), x.shape[2:]
        return x, x.shape[1:-1]

    def _from_rows(self, q: Tensor, x: Tensor, space: torch.Size) -> Tensor:
        if x.dim() == 2:
            return q[:, 0]
        if self._is_map() or not self.channel_last:
            return q.transpose(1, 2).unflatten(2, space)
        return q


class FastSimVQ(Fast):
    """``SimVQ``: the frozen codebook goes through its transform once, then everything is one pass."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """As the peer's."""
        codes = self.codebook
        if x.dtype != torch.float32 or codes.dtype != torch.float32:
            self._fall_back(f"it takes float32 alone, got {x.dtype} with codes of {codes.dtype}")
            return super().forward(x)
        x = x.movedim(1, -1) if self.channel_first else x
        q = ops.quantize(x, codes, estimator="rotation" if self.rotation_trick else "straight_through")
        quantized = q.quantized.movedim(-1, 1) if self.channel_first else q.quantized
        loss = q.codebook_loss + q.commitment_loss * self.input_to_quantize_commit_loss_weight
        return quantized, q.indices, loss * self.commitment_weight


def _always_original(module: Any) -> list[str]:
    reasons = []
    sampling = getattr(module._codebook.gumbel_sample, "keywords", {})
    if sampling.get("stochastic") or sampling.get("straight_through"):
        reasons.append("codes are sampled (stochastic_sample_codes or straight_through), not the nearest ones")
    if module._codebook.affine_param:
        reasons.append("affine_param moves the codebook with every batch")
    return reasons


def _original_in_training(module: Any) -> list[str]:
    reasons = []
    if module.has_codebook_diversity_loss:
        reasons.append("the diversity loss is a softmax over all distances")
    if module.has_commitment_loss and module.commitment_use_cross_entropy_loss:
        reasons.append("the cross-entropy commitment loss needs all distances")
    return reasons


def _default_sampling(module: Any) -> str | None:
    sampler = module.gumbel_sample
    keywords = getattr(sampler, "keywords", None)
    if keywords is None or getattr(getattr(sampler, "func", None), "__name__", "") != "gumbel_sample":
        return "it has a sampling function of its own"
    return None


COMMON = {
    "peer": "vector_quantize_pytorch",
    "importable": ("vector_quantize_pytorch",),
    "distribution": "vector-quantize-pytorch",
    "tested": "1.32",
}
TARGETS = (
    Target(
        name="Codebook",
        modules=r"vector_quantize_pytorch\.vector_quantize_pytorch",
        fast=FastCodebook,
        seams=("forward", "init_embed_", "update_indices", "track_cluster_size_and_embed_avg", "update_codebook"),
        unfit=always(
            needs(embed="3", embed_avg="3", cluster_size="2", initted="0", decay="", all_reduce_fn="", sample_fn=""),
            _default_sampling,
        ),
        **COMMON,
    ),
    Target(
        name="VectorQuantize",
        modules=r"vector_quantize_pytorch\.vector_quantize_pytorch",
        fast=FastVectorQuantize,
        seams=("forward", "maybe_split_heads_from_input"),
        unfit=needs(_codebook__embed="3", zero="0", project_in="", project_out="", commitment_weight=""),
        **COMMON,
    ),
    Target(
        name="SimVQ",
        modules=r"vector_quantize_pytorch\.sim_vq",
        fast=FastSimVQ,
        seams=("forward",),
        unfit=needs(frozen_codebook="2", code_transform="", commitment_weight=""),
        **COMMON,
    ),
)

__getattr__ = subclasses_of(
    __name__,
    {
        name: "vector_quantize_pytorch"
        for name in ("VectorQuantize", "ResidualVQ", "GroupedResidualVQ", "SimVQ", "ResidualSimVQ")
    },
)
