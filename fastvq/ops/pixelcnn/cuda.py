"""The sampler's step by the CUDA C++ kernel: a position in one launch, an image a block."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastvq import _cuda_native
from fastvq.ops.pixelcnn.reference import PER_LAYER

__all__ = ["prepare", "refuse", "step"]


def refuse(weights: Sequence[Tensor], *_: Any) -> str | None:
    for w in weights:
        if (reason := _cuda_native.refuse(w)) is not None:
            return reason
        if w.dtype != torch.float32:
            return f"it computes in float32, a weight is {w.dtype}"
    if not _cuda_native._cuda.pixelcnn_fits(weights[0].shape[1]):
        return f"{weights[0].shape[1]} channels are more than a block's shared memory holds"
    return None


def prepare(
    weights: Sequence[Tensor], kernel_sizes: Sequence[int], batch: int, height: int, width: int, isa: int
) -> tuple[list[Tensor], Tensor]:
    """Embedding, all else in the order of csrc/cuda/pixelcnn.cu, and the kernel sizes; an empty cache [B, floats]."""
    embedding, *rest = weights
    parts: list[Tensor] = []

    def add(*matrices: Tensor) -> None:  # [..., outputs]
        parts.extend(F.pad(m, (0, -m.shape[-1] % 4)).reshape(-1) for m in matrices)

    for i, k in enumerate(kernel_sizes):
        v, v_bias, link, link_bias, h, h_bias, out, out_bias = rest[PER_LAYER * i : PER_LAYER * (i + 1)]
        seen = k // 2 if i == 0 else k // 2 + 1
        add(v[:, :, :seen].permute(2, 3, 1, 0), v_bias, link[:, :, 0, 0].T, link_bias + h_bias)
        add(h[:, :, 0, :seen].permute(2, 1, 0), out[:, :, 0, 0].T, out_bias)
    w_1, b_1, w_2, b_2 = rest[PER_LAYER * len(kernel_sizes) :]
    add(w_1[:, :, 0, 0].T, b_1, w_2[:, :, 0, 0].T, b_2)
    positions = sum(k // 2 + 1 + 1 + 2 for k in kernel_sizes) + 1
    sizes = torch.tensor(kernel_sizes, dtype=torch.int64, device=embedding.device)
    cache = embedding.new_empty(batch, positions * width * embedding.shape[1])
    return [embedding.contiguous(), torch.cat(parts), sizes], cache


def step(
    ids: Tensor,  # [B, H, W] int64
    weights: Sequence[Tensor],  # of prepare
    cache: Tensor,  # of prepare; changed
    condition: Tensor | None,  # [layers, B, h, w, 4C]
    kernel_sizes: Sequence[int],
    row: int,
    column: int,
    isa: int,
) -> Tensor:  # [B, K]
    embedding, packed, sizes = weights
    given = (0, 1, 1) if condition is None else (condition.data_ptr(), *condition.shape[2:4])
    with _cuda_native.on_device_of(ids):
        ids = ids.contiguous()
        logits = embedding.new_empty(ids.shape[0], embedding.shape[0])
        _cuda_native._cuda.pixelcnn_step(
            (ids.data_ptr(), *ids.shape), (embedding.data_ptr(), *embedding.shape),
            (packed.data_ptr(), sizes.data_ptr(), len(kernel_sizes)), (cache.data_ptr(), cache.shape[1]), given,
            logits.data_ptr(), row, column, _cuda_native.stream(ids),
        )  # fmt: skip
    return logits
