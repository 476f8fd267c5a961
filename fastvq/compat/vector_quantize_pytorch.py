"""vector-quantize-pytorch: ``VectorQuantize`` (and so ``ResidualVQ``, ``GroupedResidualVQ``) and ``SimVQ``.

The peer's ``Codebook.forward`` makes three N x K matrices: distances, one-hot rows, and their product's operand.
``FastCodebook`` makes none, so it has no distances to return. ``FastVectorQuantize`` knows which calls use them
(cross-entropy, diversity) and asks for the short way only otherwise.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastvq._options import Estimator
from fastvq.compat._exports import subclasses_of
from fastvq.compat._target import PatchedModule, PatchTarget, all_of, hooked, peer_module, require
from fastvq.compat._vq_codebook import WITHOUT_DISTANCES, FastCodebook, samples_or_moves
from fastvq.compat._vq_residual import FastResidualVQ, FastSimVQ

__all__ = ["TARGETS", "FastVectorQuantize"]


class FastVectorQuantize(PatchedModule):
    """One pass for common calls; else the peer's forward around ``FastCodebook``; else the peer's own."""

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
    def always_original(cls, module: nn.Module) -> str | None:
        codebook: Any = module._codebook
        return samples_or_moves(codebook)

    @classmethod
    def limits(cls, module: nn.Module) -> list[str]:
        return [f"in training: {reason}" for reason in _original_in_training(module)]

    def looks_up(self, x: Tensor) -> bool:
        """Whether calling it on x does no more than to look up one euclidean codebook."""
        codebook = self._codebook
        bare = self.heads == 1 and self.channel_last and not (self.has_projections or self._is_map() or hooked(self))
        euclidean = not self.use_cosine_sim and codebook.vq_bridge is None
        return (
            bare
            and euclidean
            and not (self.training or codebook.training)
            and self._needs_distances(None, None, None) is None
            and self._is_plain(x)
            and bool(codebook.initted)
        )

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
        reasons = _original_in_training(self) if self.training else []
        return samples_or_moves(self._codebook) or (reasons[0] if reasons else None)

    def _is_plain(self, x: Tensor) -> bool:
        """Whether one pass gives all that this call returns."""
        codebook = self._codebook
        if hooked(codebook):
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
        estimator: Estimator = "none"
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
        peer = peer_module(self, "VectorQuantize")
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


COMMON: dict[str, Any] = {
    "peer": "vector_quantize_pytorch",
    "importable": ("vector_quantize_pytorch",),
    "distribution": "vector-quantize-pytorch",
    "tested": "1.32",
}
TARGETS = (
    PatchTarget(
        name="Codebook",
        modules=r"vector_quantize_pytorch\.vector_quantize_pytorch",
        fast=FastCodebook,
        replaced_methods=(
            "forward",
            "init_embed_",
            "update_indices",
            "track_cluster_size_and_embed_avg",
            "update_codebook",
        ),
        attributes=(
            "affine_param",
            "codebook_size",
            "ema_update",
            "gumbel_sample",
            "kmeans_all_reduce_fn",
            "kmeans_iters",
            "learnable_codebook",
            "num_codebooks",
            "transform_input",
            "update_ema",
            "use_cosine_sim",
            "vq_bridge",
        ),
        helpers=("accum_grad_", "ema_inplace"),
        reject=all_of(
            require(embed="3", embed_avg="3", cluster_size="2", initted="0", decay="", all_reduce_fn="", sample_fn=""),
            _default_sampling,
        ),
        **COMMON,
    ),
    PatchTarget(
        name="VectorQuantize",
        modules=r"vector_quantize_pytorch\.vector_quantize_pytorch",
        fast=FastVectorQuantize,
        replaced_methods=("forward", "maybe_split_heads_from_input"),
        attributes=(
            "_codebook.affine_param",
            "_codebook.gumbel_sample",
            "_codebook.initted",
            "_codebook.learnable_codebook",
            "_codebook.transform_input",
            "_codebook.vq_bridge",
            "accept_3d_fmap",
            "accept_image_fmap",
            "channel_last",
            "commitment_use_cross_entropy_loss",
            "directional_reparam",
            "freeze_codebook",
            "has_codebook_diversity_loss",
            "has_codebook_orthogonal_loss",
            "has_commitment_loss",
            "has_projections",
            "heads",
            "in_place_codebook_optimizer",
            "learnable_codebook",
            "rotation_trick",
            "route_gradients_to_input",
            "separate_codebook_per_head",
            "sync_update_v",
            "use_cosine_sim",
        ),
        helpers=("LossBreakdown",),
        reject=require(_codebook__embed="3", zero="0", project_in="", project_out="", commitment_weight=""),
        **COMMON,
    ),
    PatchTarget(
        name="ResidualVQ",
        modules=r"vector_quantize_pytorch\.residual_vq",
        fast=FastResidualVQ,
        replaced_methods=("forward", "get_codes_from_indices"),
        attributes=(
            "accept_image_fmap",
            "beam_size",
            "diveq",
            "eval_beam_size",
            "implicit_neural_codebook",
            "num_quantizers",
            "quantize_dropout",
            "quantize_dropout_multiple_of",
            "shared_codebook",
        ),
        helpers=("frac_gradient", "get_maybe_sync_seed", "round_up_multiple"),
        reject=require(layers="", project_in="", project_out="", quant_grad_frac="", quantize_dropout_cutoff_index=""),
        **COMMON,
    ),
    PatchTarget(
        name="SimVQ",
        modules=r"vector_quantize_pytorch\.sim_vq",
        fast=FastSimVQ,
        replaced_methods=("forward",),
        attributes=("channel_first", "codebook", "input_to_quantize_commit_loss_weight", "rotation_trick"),
        reject=require(frozen_codebook="2", code_transform="", commitment_weight=""),
        **COMMON,
    ),
)

__getattr__ = subclasses_of(
    __name__,
    {
        name: "vector_quantize_pytorch"
        for name in ("VectorQuantize", "ResidualVQ", "GroupedResidualVQ", "SimVQ", "ResidualSimVQ")
    },
    TARGETS,
)
