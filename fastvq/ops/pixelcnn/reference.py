"""The sampler's step in plain torch: the same cache of activations, on any device."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["prepare", "step"]


def prepare(
    weights: Sequence[Tensor], kernel_sizes: Sequence[int], batch: int, height: int, width: int
) -> tuple[list[Tensor], Tensor]:
    """The weights as ``step`` takes them, and an empty cache."""
    size = _cache_size(kernel_sizes, batch, width, weights[0].shape[1])
    return list(weights), weights[0].new_zeros(size)


class _LayerWeights(NamedTuple):
    vertical: Tensor  # [2C, C, k, k]
    vertical_bias: Tensor
    link: Tensor  # [2C, C, 1, 1]
    link_bias: Tensor
    horizontal: Tensor  # [2C, C, 1, k]
    horizontal_bias: Tensor
    out: Tensor  # [2C, C, 1, 1], of the last layer [C, C, 1, 1]
    out_bias: Tensor


class _LayerCache(NamedTuple):
    above: (
        Tensor  # [B, C, R + 1, W + 2R] inputs of the vertical convolution: row y at y % (R + 1), zeros left and right
    )
    left: Tensor  # [B, C, R + W] inputs of the horizontal convolution: zeros, then the row's positions
    link: Tensor  # [B, 2C, W] what the vertical stack adds to the horizontal gate


def _cache_size(kernel_sizes: Sequence[int], batch: int, width: int, channels: int) -> int:
    return sum(
        batch * channels * ((k // 2 + 1) * (width + 2 * (k // 2)) + k // 2 + width + 2 * width) for k in kernel_sizes
    )


def _layers(cache: Tensor, kernel_sizes: Sequence[int], batch: int, width: int, channels: int) -> Iterator[_LayerCache]:
    at = 0
    for k in kernel_sizes:
        r = k // 2
        parts = []
        for shape in (
            (batch, channels, r + 1, width + 2 * r),
            (batch, channels, r + width),
            (batch, 2 * channels, width),
        ):
            n = torch.Size(shape).numel()
            parts.append(cache[at : at + n].view(shape))
            at += n
        yield _LayerCache(*parts)


def _gate(y: Tensor) -> Tensor:
    a, b = y.chunk(2, dim=1)
    return a.tanh() * b.sigmoid()


def step(
    ids: Tensor,  # [B, H, W] int64; those before (row, column) are read
    weights: Sequence[Tensor],  # of prepare
    cache: Tensor,  # of prepare; changed
    condition: Tensor | None,  # [layers, B, h, w, 4C]
    kernel_sizes: Sequence[int],
    row: int,
    column: int,
) -> Tensor:  # [B, K]
    """Logits at (row, column); see ``fastvq.ops.pixelcnn_step``."""
    embedding = weights[0]
    batch, height, width = ids.shape
    channels = embedding.shape[1]
    layers = list(_layers(cache, kernel_sizes, batch, width, channels))
    *of_layers, head_1, head_1_bias, head_2, head_2_bias = weights[1:]
    per_layer = [_LayerWeights(*of_layers[at : at + 8]) for at in range(0, len(of_layers), 8)]

    def conditions(layer: int) -> tuple[Tensor | float, Tensor | float]:
        """What is added to the vertical and to the horizontal pre-activations of the row, [B, 2C, W] each."""
        if condition is None:
            return 0.0, 0.0
        h, w = condition.shape[2:4]
        here = condition[layer][:, row // (height // h)].repeat_interleave(width // w, dim=1).transpose(1, 2)
        return here[:, : 2 * channels], here[:, 2 * channels :]

    if column == 0:
        if row == 0:
            cache.zero_()
        elif r := kernel_sizes[0] // 2:
            layers[0].above[:, :, (row - 1) % (r + 1), r : r + width] = F.embedding(ids[:, row - 1], embedding).movedim(
                -1, 1
            )
        for i, (layer, w) in enumerate(zip(layers, per_layer, strict=True)):
            r = kernel_sizes[i] // 2
            rows = r if i == 0 else r + 1  # the first layer does not see the row itself
            pre = w.vertical_bias[:, None].expand(batch, -1, width)
            if rows:
                above = layer.above[:, :, [y % (r + 1) for y in range(row - r, row - r + rows)]]
                pre = F.conv2d(above, w.vertical[:, :, :rows], w.vertical_bias)[:, :, 0]
            of_vertical, of_horizontal = conditions(i)
            v = _gate(pre + of_vertical)
            if i > 0:
                v = v + layer.above[:, :, row % (r + 1), r : r + width]
            if i + 1 < len(layers):
                r_next = kernel_sizes[i + 1] // 2
                layers[i + 1].above[:, :, row % (r_next + 1), r_next : r_next + width] = v
            layer.link.copy_(F.conv1d(v, w.link[:, :, 0], w.link_bias) + of_horizontal)

    if column > 0:
        layers[0].left[:, :, kernel_sizes[0] // 2 + column - 1] = F.embedding(ids[:, row, column - 1], embedding)
    skip = embedding.new_zeros(batch, channels)
    for i, (layer, w) in enumerate(zip(layers, per_layer, strict=True)):
        r = kernel_sizes[i] // 2
        seen = r if i == 0 else r + 1
        window = layer.left[:, :, column : column + seen]
        pre = torch.einsum("bck,ock->bo", window, w.horizontal[:, :, 0, :seen])
        y = F.linear(_gate(pre + w.horizontal_bias + layer.link[:, :, column]), w.out[:, :, 0, 0], w.out_bias)
        skip = skip + y[:, -channels:]
        if i + 1 < len(layers):
            residual = y[:, :channels]
            if i > 0:
                residual = residual + layer.left[:, :, r + column]
            layers[i + 1].left[:, :, kernel_sizes[i + 1] // 2 + column] = residual
    hidden = F.linear(skip.relu(), head_1[:, :, 0, 0], head_1_bias)
    return F.linear(hidden.relu(), head_2[:, :, 0, 0], head_2_bias)
