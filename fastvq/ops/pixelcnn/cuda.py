"""The sampler by the CUDA C++ kernel: a position and its logits, or any number of positions and their ids, a launch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fastvq.backends import cuda as cuda_backend
from fastvq.backends.views import address
from fastvq.ops.pixelcnn.choice import Choice, Progress
from fastvq.ops.pixelcnn.common import PER_LAYER
from fastvq.ops.pixelcnn.contract import RUN, check_map, positions_to_draw
from fastvq.ops.pixelcnn.state import PixelCNNState, check_ids

__all__ = ["Sampler", "prepare", "step"]


class _Layout:
    """Packed weights one after another, places in a cache likewise, and where each lies: csrc/cuda/pixelcnn.cu."""

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

    def reserve(self, n: int) -> int:
        at, self.n_cache = self.n_cache, self.n_cache + n
        return at


def _in_pairs(m: Tensor) -> Tensor:
    """Outputs a_0, b_0, a_1, .. of a_0, a_1, .., b_0, .."""
    return m.unflatten(0, (2, -1)).transpose(0, 1).flatten(0, 1)


def prepare(
    weights: Sequence[Tensor], kernel_sizes: Sequence[int], batch: int, height: int, width: int
) -> tuple[list[Tensor], Tensor]:
    """Embedding, all else packed, and the table of where it lies; an empty cache [B, floats]."""
    embedding, *rest = weights
    n_codes, c = embedding.shape
    layout = _Layout()
    ends = [layout.reserve(n) for n in (2 * n_codes, n_codes, c, c, c)]
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
            *((0, 0) if i == 0 else (layout.reserve((k // 2 + 1) * width * c), layout.reserve(width * c))),
            layout.reserve(width * 2 * c),
        ])  # fmt: skip
    w_1, b_1, w_2, b_2 = rest[PER_LAYER * len(kernel_sizes) :]
    of_head = [layout.add(w_1[:, :, 0].transpose(1, 2)), layout.add(b_1)]
    of_head += [layout.add(w_2[:, :, 0].transpose(1, 2)), layout.add(b_2)]
    table.append([*of_head, layout.reserve(width * c), *ends, 0])
    cache = embedding.new_zeros(batch, layout.n_cache + layout.n_cache % 2)
    where = torch.tensor(table, dtype=torch.int64, device=embedding.device)
    return [embedding.contiguous(), torch.cat(layout.parts), where], cache


def _positions(
    ids: Tensor, weights: Sequence[Tensor], cache: Tensor, condition: Tensor | None, n_layers: int, first: int,
    count: int, logits: Tensor | None, uniforms: Tensor | None, mask: Tensor | None, choice: Choice,
) -> None:  # fmt: skip
    """``count`` positions from ``first`` on: their logits, or their ids, drawn where ``mask`` is True."""
    embedding, packed, table = weights
    given = (0, 1, 1) if condition is None else (address(condition), *condition.shape[2:4])
    with cuda_backend.on_device_of(ids):
        arrived = torch.zeros(ids.shape[0], dtype=torch.int32, device=ids.device)
        cuda_backend._cuda.pixelcnn_positions(
            (address(ids), *ids.shape), (address(embedding), *embedding.shape),
            (address(packed), address(table), n_layers), (address(cache), cache.shape[1]), given,
            (first, count), address(arrived), 0 if logits is None else address(logits),
            (0, 0) if uniforms is None or mask is None else (address(uniforms), address(mask)),
            choice.temperature, choice.top_k or 0, choice.top_p or 0.0, cuda_backend.stream(ids),
        )  # fmt: skip


def step(
    ids: Tensor,  # [B, H, W] int64
    weights: Sequence[Tensor],  # of prepare
    cache: Tensor,  # of prepare; changed
    condition: Tensor | None,  # [layers, B, h, w, 4C]
    kernel_sizes: Sequence[int],
    row: int,
    column: int,
) -> Tensor:  # [B, K]
    logits = weights[0].new_empty(ids.shape[0], weights[0].shape[0])
    _positions(ids.contiguous(), weights, cache, condition, len(kernel_sizes), row * ids.shape[2] + column, 1, logits,
               None, None, Choice())  # fmt: skip
    return logits


class Sampler:
    """See ``sampler.Sampler``. Any number of positions are one launch, whose blocks choose the ids themselves."""

    def __init__(self, state: PixelCNNState) -> None:
        self.state = state

    def run(
        self,
        ids: Tensor,
        uniforms: Tensor,
        mask: Tensor,
        choice: Choice,
        progress: Progress | None = None,
    ) -> None:
        s = self.state
        check_ids(RUN, s, ids)
        check_map(ids, uniforms, mask)
        total = len(positions_to_draw(mask))
        per_launch = ids.shape[2] if progress is not None else max(total, 1)
        for first in range(0, total, per_launch):
            count = min(per_launch, total - first)
            _positions(ids, s.weights, s.cache, s.condition, len(s.kernel_sizes), first, count, None, uniforms, mask,
                       choice)  # fmt: skip
            if progress is not None:
                ids[0, 0, 0].item()  # waits for the launch
                progress(first + count, total)
