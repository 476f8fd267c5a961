"""What lies around the lookup: the layout of the input, projections to the codes' width, dtypes."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastvq._checks import check_float, check_mask

__all__ = ["Projected"]


class Projected(nn.Module):
    """Mixin of quantizers: [..., dim] or [B, dim, ...] in, vectors of the codes' width out, and back."""

    owner: str
    metric: str
    dim: int
    channel_first: bool
    _module_dtype: torch.dtype

    def _add_projections(self, dim: int, width: int, channel_first: bool) -> None:
        self.dim, self.channel_first = dim, channel_first
        self.project_in = nn.Linear(dim, width) if width != dim else nn.Identity()
        self.project_out = nn.Linear(width, dim) if width != dim else nn.Identity()

    def _inward(
        self,
        x: Tensor,  # [..., dim], or [B, dim, ...] with channel_first
        mask: Tensor | None = None,  # [...] or [B, ...] bool
    ) -> Tensor:  # [..., width]
        check_float(self.owner, "x", x)
        axis = 1 if self.channel_first else -1
        if x.dim() < (2 if self.channel_first else 1) or x.shape[axis] != self.dim:
            layout = "[B, dim, ...]" if self.channel_first else "[..., dim]"
            raise ValueError(
                f"{self.owner}: x must be {layout} with dim = {self.dim}, got {list(x.shape)}; "
                f"channel_first is {self.channel_first}"
            )
        x = x.movedim(1, -1) if self.channel_first else x
        check_mask(self.owner, x, mask)
        if mask is not None and (self.metric == "cosine" or not isinstance(self.project_in, nn.Identity)):
            # A masked vector that holds NaN has a gradient of zero, and zero times NaN would reach the layer's weights.
            x = torch.where(mask[..., None], x, 0)
        return _project(self.project_in, x)

    def _outward(
        self,
        vectors: Tensor,  # [..., width]
        real: Tensor | None,  # [...] bool; where False the result is zero, as projections have a bias
        dtype: torch.dtype,
    ) -> Tensor:
        if isinstance(self.project_out, nn.Identity):
            vectors = vectors.to(dtype)
        else:
            vectors = _project(self.project_out, vectors)
            if not torch.is_autocast_enabled(vectors.device.type):
                vectors = vectors.to(dtype)
            if real is not None:
                vectors = torch.where(real[..., None], vectors, 0)
        return vectors.movedim(-1, 1) if self.channel_first else vectors


def _project(layer: nn.Module, vectors: Tensor) -> Tensor:
    """The layer in its own dtype, or in that of autocast."""
    if isinstance(layer, nn.Linear) and not torch.is_autocast_enabled(vectors.device.type):
        vectors = vectors.to(layer.weight.dtype)
    return layer(vectors)
