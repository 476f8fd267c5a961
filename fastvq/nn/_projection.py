"""The steps around the lookup: the layout of the input, projections to the width of the codes, dtypes."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastvq._checks import check_float, check_mask
from fastvq._options import Metric

__all__ = ["Projected"]


class Projected(nn.Module):
    """Mixin of quantizers: from the input, [..., dim] or [B, dim, ...], to vectors of the codes' width, and back."""

    owner: str
    metric: Metric
    dim: int
    channel_first: bool
    _module_dtype: torch.dtype

    def _add_projections(self, dim: int, width: int, channel_first: bool) -> None:
        self.dim, self.channel_first = dim, channel_first
        self.project_in = nn.Linear(dim, width) if width != dim else nn.Identity()
        self.project_out = nn.Linear(width, dim) if width != dim else nn.Identity()

    def _to_codebook_space(
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
            # A masked vector has a zero gradient, but zero times NaN is NaN: its NaN would reach the layer's weights.
            x = torch.where(mask[..., None], x, 0)
        return _project(self.project_in, x)

    def _from_codebook_space(
        self,
        vectors: Tensor,  # [..., width]
        real: Tensor | None,  # [...] bool; the result is zero where False, although a projection has a bias
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
    """Applies the layer in its own dtype, or in autocast's."""
    if isinstance(layer, nn.Linear) and not torch.is_autocast_enabled(vectors.device.type):
        vectors = vectors.to(layer.weight.dtype)
    return layer(vectors)
