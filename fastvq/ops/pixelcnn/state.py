"""The state of the sampler between its positions."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastvq._checks import check_same_device
from fastvq.ops._library import serialisable

__all__ = ["PixelCNNState", "check_ids"]


@serialisable("ops.PixelCNNState")
class PixelCNNState(NamedTuple):
    """What ``pixelcnn_start`` makes and ``pixelcnn_step`` goes on with.

    Attributes:
        weights: in the backend's own layout.
        cache: activations that later positions read; the same size from the first position to the last.
        condition: [layers, B, h, w, 4C], or None.
        kernel_sizes: of every layer.
        shape: B, H, W of the id maps.
        backend: the one that packed the weights.
    """

    weights: list[Tensor]
    cache: Tensor
    condition: Tensor | None
    kernel_sizes: tuple[int, ...]
    shape: tuple[int, int, int]
    backend: str


def check_ids(op: str, state: PixelCNNState, ids: Tensor) -> None:
    if not isinstance(state, PixelCNNState):
        raise TypeError(f"{op}: state must be what pixelcnn_start returned, got {type(state).__name__}")
    if not isinstance(ids, Tensor):
        raise TypeError(f"{op}: ids must be int64 {list(state.shape)}, got {type(ids).__name__}")
    if ids.dtype != torch.int64 or tuple(ids.shape) != state.shape:
        raise ValueError(
            f"{op}: ids must be int64 {list(state.shape)}, as the state was made for, got {ids.dtype} {list(ids.shape)}"
        )
    if state.weights[0].device != ids.device:
        check_same_device(op, "the state's weights", state.weights[0], "ids", ids)
