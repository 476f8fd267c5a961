"""vector-quantize-pytorch's ``ResidualVQ`` and ``SimVQ``."""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import Tensor, nn

from fastvq import ops
from fastvq.compat._residual import all_levels
from fastvq.compat._target import PatchedModule, peer_module
from fastvq.compat._vq_codebook import samples_or_moves

__all__ = ["FastResidualVQ", "FastSimVQ"]


class FastResidualVQ(PatchedModule):
    """``ResidualVQ``: in eval all levels in one pass; in training without the peer's copy of all residuals, which only
    two of its options read. (There a level passes on what its estimator made of its codes, and changes them.)
    """

    @classmethod
    def always_original(cls, module: nn.Module) -> str | None:
        rvq: Any = module
        if rvq.implicit_neural_codebook:
            return "implicit_neural_codebook gives every vector its own codebook"
        if (rvq.beam_size or 1) > 1 and (rvq.eval_beam_size or 1) > 1:
            return "beam search needs more than the nearest code of a level"
        reasons = [samples_or_moves(layer._codebook) for layer in rvq.layers if hasattr(layer, "_codebook")]
        return reasons[0] if reasons and all(reasons) else None

    @classmethod
    def limits(cls, module: nn.Module) -> list[str]:
        rvq: Any = module
        beams = {"in training": rvq.beam_size, "in eval": rvq.eval_beam_size}
        return [
            f"{when}: beam search needs more than the nearest code of a level"
            for when, size in beams.items()
            if (size or 1) > 1
        ]

    def forward(
        self,
        x: Tensor,  # [B, N, D], or [B, D, H, W]
        mask: Tensor | None = None,
        indices: Any = None,
        return_all_codes: bool = False,
        sample_codebook_temp: Any = None,
        freeze_codebook: bool = False,
        beam_size: int | None = None,
        rand_quantize_dropout_fixed_seed: int | None = None,
    ) -> Any:
        """As the peer's."""
        beams = beam_size or (self.beam_size if self.training else self.eval_beam_size) or 1
        special = self.shared_codebook or self.implicit_neural_codebook or self.diveq or self.accept_image_fmap
        if special or beams > 1 or mask is not None or indices is not None:
            # Still made of patched layers.
            return super().forward(
                x,
                mask=mask,
                indices=indices,
                return_all_codes=return_all_codes,
                sample_codebook_temp=sample_codebook_temp,
                freeze_codebook=freeze_codebook,
                beam_size=beam_size,
                rand_quantize_dropout_fixed_seed=rand_quantize_dropout_fixed_seed,
            )
        residual = self.project_in(x)
        if not self.training and all(
            isinstance(layer, PatchedModule) and layer.looks_up(residual) for layer in self.layers
        ):
            done = all_levels(residual, [layer._codebook.embed[0] for layer in self.layers])
            if done is not None:
                return self._finish(*done, torch.zeros(len(self.layers), device=x.device), return_all_codes)
        peer = peer_module(self, "ResidualVQ")
        quantized, levels, losses = torch.zeros_like(residual), [], []
        n_levels = self._n_levels(x, rand_quantize_dropout_fixed_seed)
        for layer in self.layers[:n_levels]:
            chosen, level, loss = layer(
                residual, sample_codebook_temp=sample_codebook_temp, freeze_codebook=freeze_codebook
            )
            residual = residual - peer.frac_gradient(chosen, self.quant_grad_frac)
            quantized = quantized + chosen
            levels.append(level)
            losses.append(loss)
        dropped = len(self.layers) - n_levels
        levels += [torch.full_like(levels[0], -1)] * dropped
        losses += [torch.zeros_like(losses[0])] * dropped
        return self._finish(quantized, torch.stack(levels, dim=-1), torch.stack(losses, dim=-1), return_all_codes)

    def _finish(self, quantized: Tensor, indices: Tensor, losses: Tensor, return_all_codes: bool) -> Any:
        result = (self.project_out(quantized), indices, losses)
        return (*result, self.get_codes_from_indices(indices)) if return_all_codes else result

    def _n_levels(self, x: Tensor, seed: int | None) -> int:
        """All levels; or, with quantize dropout, as many as the peer's generator draws from the same seed."""
        if not (self.training and self.quantize_dropout):
            return len(self.layers)
        peer = peer_module(self, "ResidualVQ")
        if seed is None:
            seed = peer.get_maybe_sync_seed(x.device)
        n_levels = random.Random(seed).randrange(self.quantize_dropout_cutoff_index, self.num_quantizers) + 1
        if self.quantize_dropout_multiple_of != 1:
            n_levels = peer.round_up_multiple(n_levels, self.quantize_dropout_multiple_of)
        return min(n_levels, len(self.layers))


class FastSimVQ(PatchedModule):
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
