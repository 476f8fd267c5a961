"""The sampler's step by the Triton kernels: two launches a layer and position, two a layer and row."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from fastvq.backends import triton as triton_backend
from fastvq.backends.tiles import Tile, pick
from fastvq.ops.pixelcnn import triton_kernels as kernels
from fastvq.ops.pixelcnn.common import PER_LAYER

__all__ = ["horizontal", "prepare", "step", "vertical"]

ANY = 2**31  # width of a row that serves every number of channels


def _tile(m: int, c: int, o: int, warps: int = 4) -> dict[str, int]:
    return {"BLOCK_M": m, "BLOCK_C": c, "BLOCK_O": o, "num_warps": warps, "num_stages": 3}


def _tiles(*rows: tuple[int, dict[str, int]]) -> list[Tile]:
    dtypes = (torch.float16, torch.bfloat16, torch.float32)
    return [Tile(80, width, dtype, tile) for dtype in dtypes for width, tile in rows]


# By the channels, the last of a width for FASTVQ_AUTOTUNE alone. All: not measured on a GPU. A position has few vectors
# and reads all weights: narrow blocks spread them over the card.
POSITION = _tiles((64, _tile(16, 32, 16)), (ANY, _tile(16, 64, 16)), (ANY, _tile(16, 64, 32)))
ROW = _tiles((64, _tile(32, 32, 32)), (ANY, _tile(32, 32, 32)), (ANY, _tile(64, 16, 32, 8)))
PACKED = 7  # tensors of a layer: vertical and bias, link and bias, horizontal, out and bias


class _Layer(NamedTuple):
    above: Tensor  # [B, R + 1, W, C] inputs of the vertical convolution, a ring of rows
    left: Tensor  # [B, W, C] inputs of the horizontal convolution
    link: Tensor  # [B, W, 2C] what the vertical stack adds to the horizontal gate


class _Cache(NamedTuple):
    layers: list[_Layer]
    last: Tensor  # [B, 1, W, C] the vertical stack's end
    gated: Tensor  # [B, C]
    skip: Tensor  # [B, C]
    hidden: Tensor  # [B, C]


def _shapes(kernel_sizes: Sequence[int], batch: int, width: int, channels: int) -> list[tuple[int, ...]]:
    shapes: list[tuple[int, ...]] = []
    for i, k in enumerate(kernel_sizes):
        # The first layer reads rows of the embedding, and keeps none.
        rings, columns = (0, 0) if i == 0 else (k // 2 + 1, width)
        shapes += [(batch, rings, width, channels), (batch, columns, channels), (batch, width, 2 * channels)]
    return [*shapes, (batch, 1, width, channels), *[(batch, channels)] * 3]


def _cache(cache: Tensor, kernel_sizes: Sequence[int], batch: int, width: int, channels: int) -> _Cache:
    shapes = _shapes(kernel_sizes, batch, width, channels)
    parts = cache.split([torch.Size(s).numel() for s in shapes])
    views = [part.view(s) for part, s in zip(parts, shapes, strict=True)]
    layers = [_Layer(*views[3 * i : 3 * i + 3]) for i in range(len(kernel_sizes))]
    return _Cache(layers, *views[-4:])


def prepare(
    weights: Sequence[Tensor], kernel_sizes: Sequence[int], batch: int, height: int, width: int
) -> tuple[list[Tensor], Tensor]:
    embedding, *rest = weights
    packed = [embedding]
    for i, k in enumerate(kernel_sizes):
        v, v_bias, link, link_bias, h, h_bias, out, out_bias = rest[PER_LAYER * i : PER_LAYER * (i + 1)]
        r = k // 2
        # The first layer does not see the row itself, respectively the position.
        rows, columns = (r, r) if i == 0 else (r + 1, r + 1)
        packed += [v[:, :, :rows].permute(2, 3, 1, 0), v_bias, link[:, :, 0, 0].T, link_bias + h_bias]
        packed += [h[:, :, 0, :columns].permute(2, 1, 0), out[:, :, 0, 0].T, out_bias]
    w_1, b_1, w_2, b_2 = rest[PER_LAYER * len(kernel_sizes) :]
    packed += [w_1[:, :, 0, 0].T, b_1, w_2[:, :, 0, 0].T, b_2]
    size = sum(torch.Size(s).numel() for s in _shapes(kernel_sizes, batch, width, embedding.shape[1]))
    return [w.contiguous() for w in packed], embedding.new_zeros(size)


class _Call:
    """What every launch of a step is given."""

    def __init__(self, ids: Tensor, weights: Sequence[Tensor], condition: Tensor | None, position: Tensor) -> None:
        self.ids, self.weights, self.condition, self.position = ids, weights, condition, position
        self.batch, self.height, self.width = ids.shape
        self.n_codes, self.channels = weights[0].shape
        tall, wide = (1, 1) if condition is None else condition.shape[2:4]
        self.condition_map = (tall, wide, self.height // tall, self.width // wide)
        self.constants = {"INTERPRETED": triton_backend.interpreting(), "enable_fp_fusion": False}

    def layer(self, i: int) -> Sequence[Tensor]:
        return self.weights[1 + PACKED * i : 1 + PACKED * (i + 1)]

    def tile(self, name: str, table: list[Tile], launch: Callable[[Mapping[str, int]], None]) -> Mapping[str, int]:
        weight = self.weights[0]
        return pick(f"pixelcnn_step, {name}", table, weight.device, self.channels, weight.dtype, launch)

    def gate(
        self, i: int, kernel_size: int, source: Tensor, weight: Tensor, bias: Tensor | None, link: Tensor | None,
        out: Tensor, row: bool,
    ) -> None:  # fmt: skip
        n = self.batch * self.width if row else self.batch
        given = self.condition[i] if row and self.condition is not None else None

        def launch(tile: Mapping[str, int]) -> None:
            kernels.gate_step[triton.cdiv(n, tile["BLOCK_M"]), triton.cdiv(self.channels, tile["BLOCK_O"])](
                self.weights[0] if i == 0 else source, self.ids, weight, bias, link, given, out, self.position, n,
                self.height, self.width, self.channels, self.n_codes, weight.shape[:-2].numel(), *self.condition_map,
                RINGS=source.shape[1] if row else 1, OUT_RINGS=out.shape[1] if row else 1, KW=kernel_size,
                REACH=kernel_size // 2, ROW=row, FIRST=i == 0, **self.constants, **tile,
            )  # fmt: skip

        launch(self.tile("gate of a row" if row else "gate", ROW if row else POSITION, launch))

    def linear(
        self, kind: str, source: Tensor, weight: Tensor, bias: Tensor, out: Tensor, *, condition: Tensor | None = None,
        before: Tensor | None = None, skip: Tensor | None = None, first: bool = False,
    ) -> None:  # fmt: skip
        n = self.batch * self.width if kind == "link" else self.batch
        n_out = weight.shape[1]

        def launch(tile: Mapping[str, int], skip: Tensor | None) -> None:
            kernels.linear_step[triton.cdiv(n, tile["BLOCK_M"]), triton.cdiv(n_out, tile["BLOCK_O"])](
                source, weight, bias, condition, before, out, skip, self.position, n, self.width, self.channels, n_out,
                *self.condition_map, RINGS=source.shape[1] if kind == "link" else 1, KIND=kind, FIRST=first,
                **self.constants, **tile,
            )  # fmt: skip

        def tune(tile: Mapping[str, int]) -> None:
            launch(tile, None if skip is None else skip.clone())  # it is added to, which must happen once

        launch(self.tile(kind, ROW if kind == "link" else POSITION, tune), skip)


def vertical(
    ids: Tensor,  # [B, H, W] int64, contiguous; rows before the position's are read
    weights: Sequence[Tensor],  # of prepare
    cache: Tensor,  # of prepare; changed
    condition: Tensor | None,  # [layers, B, h, w, 4C]
    kernel_sizes: Sequence[int],
    position: Tensor,  # [1] int64: row * W + column
) -> None:
    """The vertical stack for the row of a position."""
    call = _Call(ids, weights, condition, position)
    kept = _cache(cache, kernel_sizes, call.batch, call.width, call.channels)
    ends = [*(layer.above for layer in kept.layers[1:]), kept.last]
    for i, (layer, end) in enumerate(zip(kept.layers, ends, strict=True)):
        v, v_bias, link, link_bias, *_ = call.layer(i)
        call.gate(i, kernel_sizes[i], layer.above, v, v_bias, None, end, row=True)
        given = None if condition is None else condition[i]
        call.linear("link", end, link, link_bias, layer.link, condition=given)


def horizontal(
    ids: Tensor,  # [B, H, W] int64, contiguous; those before the position are read
    weights: Sequence[Tensor],
    cache: Tensor,
    condition: Tensor | None,
    kernel_sizes: Sequence[int],
    position: Tensor,  # [1] int64
) -> Tensor:  # [B, K]
    """The horizontal stack at a position whose row's vertical stack is done, and the logits."""
    call = _Call(ids, weights, condition, position)
    kept = _cache(cache, kernel_sizes, call.batch, call.width, call.channels)
    logits = weights[0].new_empty(call.batch, call.n_codes)
    for i, layer in enumerate(kept.layers):
        *_, h, out, out_bias = call.layer(i)
        call.gate(i, kernel_sizes[i], layer.left, h, None, layer.link, kept.gated, row=False)
        # The last layer has no residual: nothing is written to ``onward`` there.
        onward = kept.layers[i + 1].left if i + 1 < len(kept.layers) else layer.left
        call.linear("out", kept.gated, out, out_bias, onward, before=layer.left, skip=kept.skip, first=i == 0)
    w_1, b_1, w_2, b_2 = weights[-4:]
    call.linear("head", kept.skip, w_1, b_1, kept.hidden)
    call.linear("head", kept.hidden, w_2, b_2, logits)
    return logits


def step(
    ids: Tensor,  # [B, H, W] int64
    weights: Sequence[Tensor],
    cache: Tensor,
    condition: Tensor | None,
    kernel_sizes: Sequence[int],
    row: int,
    column: int,
) -> Tensor:  # [B, K]
    ids = ids.contiguous()
    position = torch.full((1,), row * ids.shape[2] + column, dtype=torch.int64, device=ids.device)
    if column == 0:
        vertical(ids, weights, cache, condition, kernel_sizes, position)
    return horizontal(ids, weights, cache, condition, kernel_sizes, position)
