"""Residual quantizers of audio codecs, whose levels go through one kernel together.

The peers' loop writes every level's residual to memory and reads it again for the next level's lookup.
``residual_quantize`` makes the same float32 subtractions in the same order while a block of residuals is in cache, so
every level's index is that of the residual as the peer forms it, and the sums are the peer's bit by bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fastvq import ops
from fastvq.compat._target import PatchedModule, hooked

__all__ = ["FastResidual", "all_levels"]


def all_levels(
    x: Tensor,  # [..., D]
    codebooks: Sequence[Tensor],  # Q of [K, D]
) -> tuple[Tensor, Tensor] | None:  # [..., D], [..., Q]
    """The sum of codes and the indices, without gradients; None where the levels have to go one by one.

    One by one is the faster way on a GPU, and the only one for codebooks of different sizes. In half precision peers
    round every residual to it.
    """
    plain = x.device.type == "cpu" and x.dtype == torch.float32 and len(codebooks) > 0
    if not plain or any(c.dtype != x.dtype or c.shape != codebooks[0].shape for c in codebooks):
        return None
    q = ops.residual_quantize(x.detach(), [c.detach() for c in codebooks], estimator="none")
    return q.quantized, q.indices


class FastResidual(PatchedModule):
    """What encodec's, audiocraft's, moshi's and transformers' residual quantizers share."""

    stack: ClassVar[str] = "layers"  # where the peer keeps its levels,
    holder: ClassVar[str] = "_codebook"  # a level its codebook,
    codes: ClassVar[str] = "embed"  # and a codebook its codes [K, D]

    def _at_once(
        self,
        x: Tensor,  # [B, D, T]
        n_levels: int,
        *,
        forward: bool = False,
    ) -> tuple[Tensor, Tensor] | None:  # [B, D, T], [Q, B, T]
        """All levels; None if some level is more than a patched codebook between two permutations.

        ``forward``: the peer would call the levels, which then may learn, or be heard by hooks.
        """
        levels = list(getattr(self, self.stack))[:n_levels]
        if x.dim() != 3 or not all(self._is_plain(level) for level in levels):
            return None
        codebooks = [getattr(level, self.holder) for level in levels]
        if forward and (self.training or not all(self._only_looks_up(part) for part in (*levels, *codebooks))):
            return None
        # Contiguous rows: copying them once takes less than reading them down the columns.
        done = all_levels(x.transpose(1, 2).contiguous(), [getattr(codebook, self.codes) for codebook in codebooks])
        if done is None:
            return None
        quantized, indices = done
        return quantized.transpose(1, 2), torch.stack(indices.unbind(-1))

    def _is_plain(self, level: Any) -> bool:
        codebook = getattr(level, self.holder, None)
        if not isinstance(codebook, PatchedModule) or getattr(level, "channels_last", False):
            return False
        # A level that is not the peer's own class, or whose methods are replaced, may do anything.
        if (
            not type(level).__name__.endswith("VectorQuantization")
            or type(level).__module__ != type(codebook).__module__
        ):
            return False
        if level.__dict__.keys() & {"encode", "decode", "forward"}:
            return False
        projections = (getattr(level, name, None) for name in ("project_in", "project_out"))
        return all(p is None or isinstance(p, nn.Identity) for p in projections)

    @staticmethod
    def _only_looks_up(part: Any) -> bool:
        """Of a level or a codebook; encodec's codebooks learn in eval too, until they are initialised."""
        return not (part.training or hooked(part)) and bool(getattr(part, "inited", True))
