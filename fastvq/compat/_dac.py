"""DAC in transformers: each level projects the residual down, looks it up by angle and projects the code up again."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastvq.compat._lookup import nearest
from fastvq.compat._target import PatchedModule, hooked

__all__ = ["FastDacResidualVectorQuantizer", "FastDacVectorQuantize"]


class FastDacVectorQuantize(PatchedModule):
    """One level: looked up by angle, gathered as stored."""

    def decode_latents(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:  # [B, D, T] -> [B, D, T], [B, T]
        """As the peer's. It normalises both sides and compares distances: that is the angle, without the rounding."""
        if hasattr(self.codebook, "_hf_hook"):
            self._fall_back("accelerate moves its codebook in and out of memory")
            theirs: Any = super()
            return theirs.decode_latents(hidden_states)
        indices = nearest(hidden_states.transpose(1, 2), self.codebook.weight, "cosine")
        return self.codebook(indices).transpose(1, 2), indices


class FastDacResidualVectorQuantizer(PatchedModule):
    """All levels; without gradients, in place.

    The lookup is a small part of this. Most of what the peer does is to carry arrays as wide as the encoder's output
    through memory: a new residual, a masked copy of each level's result and a new sum, at every level. In eval the mask
    is one, and the residual and the sum may stay where they are. The projections are the peer's own, on the residual
    that the peer forms, so every result is the peer's bit by bit.
    """

    def forward(
        self,
        hidden_state: Tensor,  # [B, C, T]
        n_quantizers: int | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """As the peer's: values [B, C, T], indices [B, Q, T], latents [B, Q D, T], commitment and codebook loss [B]."""
        levels: list[Any] = list(self.quantizers)[:n_quantizers]
        if not self._may_write(hidden_state, levels, n_quantizers):
            return super().forward(hidden_state, n_quantizers)
        residual = total = hidden_state  # the first level replaces both; only then is anything written
        indices, latents, commitment, codebook = [], [], hidden_state.new_zeros(()), hidden_state.new_zeros(())
        for i, level in enumerate(levels):
            latent = level.in_proj(residual)
            code, index = level.decode_latents(latent)
            commitment = commitment + F.mse_loss(latent, code)
            codebook = codebook + F.mse_loss(code, latent)
            # The detour is the peer's estimator, whose rounding the residual carries.
            up = level.out_proj(latent + (code - latent))
            if i == 0:
                residual, total = residual - up, up
            else:
                residual.sub_(up)
                total.add_(up)
            indices.append(index)
            latents.append(latent)
        losses = [one.repeat(len(hidden_state)) for one in (commitment, codebook)]
        return total, torch.stack(indices, dim=1), torch.cat(latents, dim=1), losses[0], losses[1]

    def _may_write(self, x: Tensor, levels: list[Any], n_quantizers: Any) -> bool:
        """Whether nobody needs the arrays of one level once the next one is reached."""
        if self.training or not levels or (n_quantizers is not None and n_quantizers < 1):
            return False
        if torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in self.parameters())):
            return False
        if torch.is_autocast_enabled(x.device.type):
            return False
        for level in levels:
            if not isinstance(level, FastDacVectorQuantize) or "forward" in level.__dict__:
                return False
            if any(hooked(part) or hasattr(part, "_hf_hook") for part in level.modules()):
                return False
        return True
