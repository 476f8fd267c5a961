"""The sampler by the CUDA C++ kernel: a position and its logits, or any number of positions and their ids, a launch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastvq.backends import cuda as cuda_backend
from fastvq.backends.views import address
from fastvq.ops.pixelcnn.common import PER_LAYER

__all__ = ["draw", "prepare", "step", "why_unsupported"]


def why_unsupported(weights: Sequence[Tensor], *_: Any) -> str | None:
    for w in weights:
        if (reason := cuda_backend.why_unsupported(w)) is not None:
            return reason
        if w.dtype != torch.float32:
            return f"it computes in float32, a weight is {w.dtype}"
    return None


class _Layout:
    """Packed weights one after another, room in a cache likewise, and where each lies: csrc/cuda/pixelcnn.cu."""

    def __init__(self) -> None:
        self.parts: list[Tensor] = []
        self.n_weights = self.n_cache = 0

    def add(
        self,
        m: Tensor,  # [outputs] or [outputs, segments, C]
    ) -> int:
        m = F.pad(m, (0, 0) * (m.dim() - 1) + (0, -m.shape[0] % 4))
        if m.dim() == 3:
            m = m.unflatten(0, (-1, 4)).permute(0, 2, 3, 1)
        self.parts.append(m.reshape(-1))
        at, self.n_weights = self.n_weights, self.n_weights + m.numel()
        return at

    def room(self, n: int) -> int:
        at, self.n_cache = self.n_cache, self.n_cache + n
        return at


def _in_pairs(m: Tensor) -> Tensor:
    """Outputs a_0, b_0, a_1, .. of a_0, a_1, .., b_0, .."""
    return m.unflatten(0, (2, -1)).transpose(0, 1).flatten(0, 1)


def prepare(
    weights: Sequence[Tensor], kernel_sizes: Sequence[int], batch: int, height: int, width: int, isa: int
) -> tuple[list[Tensor], Tensor]:
    """Embedding, all else packed, and the table of where it lies; an empty cache [B, floats]."""
    embedding, *rest = weights
    n_codes, c = embedding.shape
    layout = _Layout()
    ends = [layout.room(n) for n in (2 * n_codes, n_codes, c, c, c)]
    table = []
    for i, k in enumerate(kernel_sizes):
        v, v_bias, link, link_bias, h, h_bias, out, out_bias = rest[PER_LAYER * i : PER_LAYER * (i + 1)]
        seen = k // 2 if i == 0 else k // 2 + 1
        table.append([
            k,
            layout.add(_in_pairs(v[:, :, :seen].permute(0, 2, 3, 1).flatten(1, 2))), layout.add(_in_pairs(v_bias)),
            layout.add(_in_pairs(link[:, :, 0].transpose(1, 2))), layout.add(_in_pairs(link_bias + h_bias)),
            layout.add(_in_pairs(h[:, :, 0, :seen].transpose(1, 2))),
            layout.add(out[:, :, 0].transpose(1, 2)), layout.add(out_bias),
            *((0, 0) if i == 0 else (layout.room((k // 2 + 1) * width * c), layout.room(width * c))),
            layout.room(width * 2 * c),
        ])  # fmt: skip
    w_1, b_1, w_2, b_2 = rest[PER_LAYER * len(kernel_sizes) :]
    of_head = [layout.add(w_1[:, :, 0].transpose(1, 2)), layout.add(b_1)]
    of_head += [layout.add(w_2[:, :, 0].transpose(1, 2)), layout.add(b_2)]
    table.append([*of_head, layout.room(width * c), *ends, 0])
    cache = embedding.new_zeros(batch, layout.n_cache + layout.n_cache % 2)
    where = torch.tensor(table, dtype=torch.int64, device=embedding.device)
    return [embedding.contiguous(), torch.cat(layout.parts), where], cache


def _positions(
    ids: Tensor, weights: Sequence[Tensor], cache: Tensor, condition: Tensor | None, n_layers: int, first: int,
    count: int, logits: Tensor | None, uniforms: Tensor | None, wanted: Tensor | None, temperature: float, top_k: int,
    top_p: float,
) -> None:  # fmt: skip
    embedding, packed, table = weights
    given = (0, 1, 1) if condition is None else (address(condition), *condition.shape[2:4])
    with cuda_backend.on_device_of(ids):
        arrived = torch.zeros(ids.shape[0], dtype=torch.int32, device=ids.device)
        cuda_backend._cuda.pixelcnn_positions(
            (address(ids), *ids.shape), (address(embedding), *embedding.shape),
            (address(packed), address(table), n_layers), (address(cache), cache.shape[1]), given,
            (first, count), address(arrived), 0 if logits is None else address(logits),
            (0, 0) if uniforms is None or wanted is None else (address(uniforms), address(wanted)),
            temperature, top_k, top_p, cuda_backend.stream(ids),
        )  # fmt: skip


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
    logits = weights[0].new_empty(ids.shape[0], weights[0].shape[0])
    _positions(ids.contiguous(), weights, cache, condition, len(kernel_sizes), row * ids.shape[2] + column, 1, logits,
               None, None, 1.0, 0, 0.0)  # fmt: skip
    return logits


def draw(
    ids: Tensor,  # [B, H, W] int64, contiguous; changed where wanted
    weights: Sequence[Tensor],  # of prepare
    cache: Tensor,  # of prepare; changed
    condition: Tensor | None,  # [layers, B, h, w, 4C]
    kernel_sizes: Sequence[int],
    uniforms: Tensor,  # [B, H, W] float64, contiguous
    wanted: Tensor,  # [B, H, W] bool, contiguous
    first: int,
    count: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
) -> None:
    """``count`` positions from ``first`` on, in one launch, their ids drawn as ``models.sampling.sample_ids`` does."""
    _positions(ids, weights, cache, condition, len(kernel_sizes), first, count, None, uniforms, wanted, temperature,
               top_k or 0, top_p or 0.0)  # fmt: skip
