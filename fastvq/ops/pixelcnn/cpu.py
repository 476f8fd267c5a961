"""The sampler's step by the C++ kernels: weights packed once, a batch of images together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastvq import _native
from fastvq._native import address
from fastvq.ops.pixelcnn.reference import PER_LAYER

__all__ = ["prepare", "refuse", "step"]


def refuse(weights: Sequence[Tensor], *_: Any) -> str | None:
    for w in weights:
        if w.device.type != "cpu":
            return f"it takes CPU tensors, a weight is on {w.device}"
        if w.dtype != torch.float32:
            return f"it computes in float32, a weight is {w.dtype}"
    return None


@_native.cpu_call
def prepare(
    weights: Sequence[Tensor], kernel_sizes: Sequence[int], batch: int, height: int, width: int, isa: int
) -> tuple[list[Tensor], Tensor]:
    embedding, *rest = weights
    n_codes, channels = embedding.shape
    shape = (batch, height, width, channels, n_codes, list(kernel_sizes))
    n_weights, n_cache = _native._cpu.pixelcnn_sizes(shape, isa)
    # Biases that are only ever added together become one: link and horizontal, and those of all skip paths.
    skip_bias = torch.stack([rest[PER_LAYER * i + 7][-channels:] for i in range(len(kernel_sizes))]).sum(0)
    folded = []
    for i in range(len(kernel_sizes)):
        v, v_bias, link, link_bias, h, h_bias, out, out_bias = rest[PER_LAYER * i : PER_LAYER * (i + 1)]
        if i == 0:
            out_bias = torch.cat([out_bias[:-channels], skip_bias])
        folded += [v, v_bias, link, link_bias + h_bias, h, h_bias, out, out_bias]
    folded += rest[PER_LAYER * len(kernel_sizes) :]
    folded = [w.contiguous() for w in folded]
    packed = torch.empty(n_weights)
    _native._cpu.pixelcnn_pack(shape, [address(w) for w in folded], address(packed), isa)
    return [embedding.contiguous(), packed], torch.empty(n_cache)


@_native.cpu_call
def step(
    ids: Tensor,  # [B, H, W] int64
    weights: Sequence[Tensor],  # embedding [K, C], packed
    cache: Tensor,
    condition: Tensor | None,  # [layers, B, h, w, 4C]
    kernel_sizes: Sequence[int],
    row: int,
    column: int,
    isa: int,
) -> Tensor:  # [B, K]
    embedding, packed = weights
    n_codes, channels = embedding.shape
    shape = (*ids.shape, channels, n_codes, list(kernel_sizes))
    if (packed.numel(), cache.numel()) != tuple(_native._cpu.pixelcnn_sizes(shape, isa)):
        raise ValueError(
            "fastvq.ops.pixelcnn_step: state was not made for these sizes; make it with pixelcnn_start for "
            f"ids of shape {list(ids.shape)}"
        )
    ids = ids.contiguous()
    logits = torch.empty(ids.shape[0], n_codes)
    _native._cpu.pixelcnn_step(
        shape, address(ids), address(packed), address(embedding), address(cache),
        0 if condition is None else address(condition), *((1, 1) if condition is None else condition.shape[2:4]),
        address(logits), row, column, isa, torch.get_num_threads(),
    )  # fmt: skip
    return logits
