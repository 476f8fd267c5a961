"""The sampler's step by the C++ kernels: weights packed once, a batch of images together."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from fastvq.backends import cpu as cpu_backend
from fastvq.backends.views import address
from fastvq.ops._contract import check_tensor
from fastvq.ops._library import register
from fastvq.ops.pixelcnn.common import PER_LAYER

__all__ = ["prepare", "step"]

PACK = "fastvq.ops.pixelcnn_pack"


@cpu_backend.cpu_call
def prepare(
    weights: Sequence[Tensor], kernel_sizes: Sequence[int], batch: int, height: int, width: int
) -> tuple[list[Tensor], Tensor]:
    """Embedding, all else packed, and the instruction set that it is packed for; an empty cache."""
    isa = cpu_backend.isa()
    embedding, *rest = weights
    n_codes, channels = embedding.shape
    shape = (batch, height, width, channels, n_codes, list(kernel_sizes))
    _, n_cache = cpu_backend._cpu.pixelcnn_sizes(shape, isa)
    # Biases that are only ever added together become one: link and horizontal, and those of all skip paths.
    skip_bias = torch.stack([rest[PER_LAYER * i + 7][-channels:] for i in range(len(kernel_sizes))]).sum(0)
    folded = []
    for i in range(len(kernel_sizes)):
        v, v_bias, link, link_bias, h, h_bias, out, out_bias = rest[PER_LAYER * i : PER_LAYER * (i + 1)]
        if i == 0:
            out_bias = torch.cat([out_bias[:-channels], skip_bias])
        folded += [v, v_bias, link, link_bias + h_bias, h, h_bias, out, out_bias]
    folded += rest[PER_LAYER * len(kernel_sizes) :]
    packed = torch.ops.fastvq.pixelcnn_pack(folded, batch, height, width, kernel_sizes, n_codes, isa)
    table = torch.tensor([isa], dtype=torch.int64, device="cpu")
    return [embedding.contiguous(), packed, table], embedding.new_zeros(n_cache)


def _pack(
    weights: Sequence[Tensor], batch: int, height: int, width: int, kernel_sizes: Sequence[int], n_codes: int, isa: int
) -> Tensor:
    """The weights of all maps one after another, biases folded, as csrc/cpu/masked_conv/pixelcnn.cpp lays them out."""
    channels = weights[0].shape[1]
    _check_isa(isa)
    wanted = _map_shapes(kernel_sizes, channels, n_codes)
    if [tuple(w.shape) for w in weights] != wanted:
        raise ValueError(f"{PACK}: weights must be {wanted}, got {[tuple(w.shape) for w in weights]}")
    for i, w in enumerate(weights):
        check_tensor(PACK, f"weights[{i}]", w, w.shape, torch.float32, torch.device("cpu"))
    weights = [w.contiguous() for w in weights]
    shape = (batch, height, width, channels, n_codes, list(kernel_sizes))
    packed = torch.empty(cpu_backend._cpu.pixelcnn_sizes(shape, isa)[0], dtype=torch.float32, device="cpu")
    cpu_backend._cpu.pixelcnn_pack(shape, [address(w) for w in weights], address(packed), isa)
    return packed


def _map_shapes(kernel_sizes: Sequence[int], c: int, n_codes: int) -> list[tuple[int, ...]]:
    shapes: list[tuple[int, ...]] = []
    for i, k in enumerate(kernel_sizes):
        o = 2 * c if i + 1 < len(kernel_sizes) else c
        shapes += [
            (2 * c, c, k, k),
            (2 * c,),
            (2 * c, c, 1, 1),
            (2 * c,),
            (2 * c, c, 1, k),
            (2 * c,),
            (o, c, 1, 1),
            (o,),
        ]
    return [*shapes, (c, c, 1, 1), (c,), (n_codes, c, 1, 1), (n_codes,)]


def _fake_pack(
    weights: Sequence[Tensor], batch: int, height: int, width: int, kernel_sizes: Sequence[int], n_codes: int, isa: int
) -> Tensor:
    shape = (batch, height, width, weights[0].shape[1], n_codes, list(kernel_sizes))
    return weights[0].new_empty(cpu_backend._cpu.pixelcnn_sizes(shape, isa)[0])


def _check_isa(isa: int) -> None:
    if isa not in cpu_backend.ISA_NUMBERS_HERE:
        raise ValueError(
            f"{PACK}: this machine does not have the instruction set of isa = {isa}; make the state with pixelcnn_start"
        )


register(
    "pixelcnn_pack(Tensor[] weights, int batch, int height, int width, int[] kernel_sizes, int n_codes, int isa) "
    "-> Tensor",
    _pack,
    _fake_pack,
)


@lru_cache(maxsize=64)
def _sizes(
    batch: int, height: int, width: int, channels: int, n_codes: int, kernel_sizes: tuple[int, ...], isa: int
) -> tuple[int, int]:
    """Elements of the packed weights and of the cache."""
    _check_isa(isa)
    n_packed, n_cache = cpu_backend._cpu.pixelcnn_sizes((batch, height, width, channels, n_codes, kernel_sizes), isa)
    return n_packed, n_cache


@cpu_backend.cpu_call
def step(
    ids: Tensor,  # [B, H, W] int64
    weights: Sequence[Tensor],  # of prepare
    cache: Tensor,
    condition: Tensor | None,  # [layers, B, h, w, 4C]
    kernel_sizes: Sequence[int],
    row: int,
    column: int,
) -> Tensor:  # [B, K]
    embedding, packed, table = weights
    isa = int(table)
    n_codes, channels = embedding.shape
    shape = (*ids.shape, channels, n_codes, list(kernel_sizes))
    if (packed.numel(), cache.numel()) != _sizes(*ids.shape, channels, n_codes, tuple(kernel_sizes), isa):
        raise ValueError(
            "fastvq.ops.pixelcnn_step: state was not made for these sizes; make it with pixelcnn_start for "
            f"ids of shape {list(ids.shape)}"
        )
    ids = ids.contiguous()
    logits = torch.empty(ids.shape[0], n_codes, dtype=torch.float32, device="cpu")
    condition_height, condition_width = (1, 1) if condition is None else condition.shape[2:4]
    cpu_backend._cpu.pixelcnn_step(
        shape, address(ids), address(packed), address(embedding), address(cache),
        0 if condition is None else address(condition), condition_height, condition_width, address(logits),
        row, column, isa, torch.get_num_threads(),
    )  # fmt: skip
    return logits
