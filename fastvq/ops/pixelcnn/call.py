"""The arguments of the sampler's ops."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

__all__ = ["StartCall", "StepCall"]


class StartCall(NamedTuple):
    weights: list[Tensor]  # in the order of ``pixelcnn_start``
    kernel_sizes: list[int]
    batch: int
    height: int
    width: int
    backend: str | None


class StepCall(NamedTuple):
    ids: Tensor  # [B, H, W] int64
    weights: list[Tensor]  # as the backend packed them
    cache: Tensor
    condition: Tensor | None  # [layers, B, h, w, 4C]
    kernel_sizes: list[int]
    row: int
    column: int
    backend: str  # the one that packed the weights
