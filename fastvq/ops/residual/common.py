"""Helpers that several backends of residual quantization share."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fastvq.ops.quantize.common import gather

__all__ = ["elements", "residual_dtype", "residuals", "rows_with_codes"]


def residual_dtype(x: Tensor, codebooks: Tensor) -> torch.dtype:
    return torch.float64 if torch.float64 in (x.dtype, codebooks.dtype) else torch.float32


def residuals(
    x: Tensor,  # [..., D]
    levels: Tensor,  # [Q, K, D] of residual_dtype
    indices: Tensor,  # [..., Q]
) -> Iterator[Tensor]:  # [..., D]
    """The input of each level, formed again from the indices. Rows that are masked hold arbitrary values."""
    residual = x.to(levels.dtype)
    for codes, chosen in zip(levels, indices.unbind(-1), strict=True):
        yield residual
        residual = residual - gather(codes, chosen)


def rows_with_codes(
    indices: Tensor,  # [..., Q]
    n_codes: int,
) -> tuple[Tensor, Tensor]:
    """Which rows have a code on every level [...], and the indices with -1 on all levels of the other rows.

    A masked row has none. Neither has a row of which an index was changed since the forward to one that is no code: on
    a GPU, where an error would have to wait for the device, the backward leaves such a row out.
    """
    real = (indices.clamp(0, n_codes - 1) == indices).all(dim=-1)
    return real, torch.where(real[..., None], indices, -1)


def elements(real: Tensor | int, dim: int) -> Tensor | float:
    """How many elements a mean is over, at least 1. On the device, where a mask has to be counted."""
    return real.sum().clamp(min=1).double() * dim if isinstance(real, Tensor) else max(1, real) * dim
