"""What the sampler's kernels rely on, checked in the registered op."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from fastvq.ops._contract import check_tensor

__all__ = ["RUN", "check_condition", "check_map", "check_step", "positions_to_draw"]

RUN = "fastvq.ops.pixelcnn.Sampler.run"


def check_condition(
    op: str, condition: Tensor, n_layers: int, shape: tuple[int, ...], channels: int, device: torch.device
) -> None:
    """condition [layers, B, h, w, 4C] with h dividing H and w dividing W of ``shape`` = B, H, W."""
    batch, height, width = shape
    fits = condition.dim() == 5 and tuple(condition.shape[:2]) == (n_layers, batch)
    h, w = condition.shape[2:4] if fits else (0, 0)
    if not fits or condition.shape[4] != 4 * channels or 0 in (h, w) or height % h or width % w:
        raise ValueError(
            f"{op}: condition must be [{n_layers}, {batch}, h, w, {4 * channels}] with h dividing {height} "
            f"and w dividing {width}, got {list(condition.shape)}"
        )
    if condition.device != device:
        raise ValueError(
            f"{op}: condition must be on the weights' device, {device}, got {condition.device}; move one with .to()"
        )


def check_step(
    op: str,
    ids: Tensor,  # [B, H, W] int64
    weights: Sequence[Tensor],  # as ``pixelcnn_start`` packs them: the embedding [K, C] first
    cache: Tensor,
    condition: Tensor | None,
    kernel_sizes: Sequence[int],
    row: int,
    column: int,
    backend: str,
) -> None:
    """The state is one that ``pixelcnn_start`` made for these ids and kernel sizes, and the position is in the map."""
    if ids.dtype != torch.int64 or ids.dim() != 3:
        raise ValueError(f"{op}: ids must be int64 [B, H, W], got {ids.dtype} {list(ids.shape)}")
    batch, height, width = ids.shape
    if not (0 <= row < height and 0 <= column < width) or batch < 1:
        raise ValueError(f"{op}: (row, column) must lie in {list(ids.shape[1:])}, got ({row}, {column})")
    if not kernel_sizes or min(kernel_sizes) < 1 or not all([k % 2 for k in kernel_sizes]):
        raise ValueError(f"{op}: kernel_sizes must be odd, one a layer, got {list(kernel_sizes)}")
    if not weights or weights[0].dim() != 2 or weights[0].numel() == 0:
        raise ValueError(f"{op}: weights must begin with the embedding [K, C]; make them with pixelcnn_start")
    embedding = weights[0]
    device, dtype, channels = embedding.device, embedding.dtype, embedding.shape[1]
    if ids.device != device:
        raise ValueError(f"{op}: ids must be on the weights' device, {device}, got {ids.device}; move one with .to()")
    if condition is not None:
        check_condition(op, condition, len(kernel_sizes), (batch, height, width), channels, device)
    if backend == "reference":  # torch's own functions look at the rest
        return
    if backend != "triton" and dtype != torch.float32:
        raise ValueError(f"{op}: weights must be float32 for backend {backend!r}, got {dtype}")
    floats = [*weights, cache] if condition is None else [*weights, cache, condition]
    if backend != "triton":
        table = floats.pop(len(weights) - 1)
        shape = (1,) if backend == "cpu" else (len(kernel_sizes) + 1, 11)
        if table.dtype != torch.int64 or table.shape != shape or table.device != device:
            check_tensor(op, "the state's table", table, shape, torch.int64, device)
    for t in floats:
        if t.dtype != dtype or t.device != device or not t.is_contiguous():
            raise ValueError(
                f"{op}: the state's tensors must be contiguous, {dtype}, on {device}, got {t.dtype} {list(t.shape)} on "
                f"{t.device}; make the state with pixelcnn_start"
            )
    if backend in ("triton", "cuda"):
        sizes = _sizes_of_triton if backend == "triton" else _sizes_of_cuda
        expected, n_cache = sizes(tuple(kernel_sizes), batch, width, *embedding.shape)
        if tuple(tuple(w.shape) for w in weights) != expected or cache.numel() != n_cache:
            raise ValueError(
                f"{op}: the state was not made for ids {list(ids.shape)} and kernel_sizes {list(kernel_sizes)}; "
                "make it with pixelcnn_start"
            )


def check_map(
    ids: Tensor,  # [B, H, W] int64
    uniforms: Tensor,  # [B, H, W] float64
    mask: Tensor,  # [B, H, W] bool
) -> None:
    wanted = {"ids": torch.int64, "uniforms": torch.float64, "mask": torch.bool}
    for (name, dtype), given in zip(wanted.items(), (ids, uniforms, mask), strict=True):
        if given.shape != ids.shape or given.dtype != dtype or given.device != ids.device or not given.is_contiguous():
            raise ValueError(
                f"{RUN}: {name} must be {dtype} {list(ids.shape)}, contiguous, on {ids.device}, got {given.dtype} "
                f"{list(given.shape)} with strides {list(given.stride())} on {given.device}"
            )


def positions_to_draw(
    mask: Tensor,  # [B, H, W] bool
) -> list[bool]:
    """Of the positions in raster order, up to the last where an image draws: whether any image draws there."""
    drawn: list[bool] = mask.any(0).flatten().tolist()
    while drawn and not drawn[-1]:
        drawn.pop()
    return drawn


@lru_cache(maxsize=64)
def _sizes_of_triton(
    kernel_sizes: tuple[int, ...], batch: int, width: int, n_codes: int, c: int
) -> tuple[tuple[tuple[int, ...], ...], int]:
    """The shapes of the weights that the Triton kernels' ``prepare`` packs, and the elements of its cache."""
    shapes: list[tuple[int, ...]] = [(n_codes, c)]
    n_cache = batch * c * (width + 3)
    for i, k in enumerate(kernel_sizes):
        seen, o = k // 2 + (i > 0), 2 * c if i + 1 < len(kernel_sizes) else c
        shapes += [(seen, k, c, 2 * c), (2 * c,), (c, 2 * c), (2 * c,), (seen, c, 2 * c), (c, o), (o,)]
        n_cache += batch * width * c * (2 if i == 0 else k // 2 + 4)
    shapes += [(c, c), (c,), (c, n_codes), (n_codes,)]
    return tuple(shapes), n_cache


@lru_cache(maxsize=64)
def _sizes_of_cuda(
    kernel_sizes: tuple[int, ...], batch: int, width: int, n_codes: int, c: int
) -> tuple[tuple[tuple[int, ...], ...], int]:
    """As ``_sizes_of_triton``, of the CUDA C++ kernel's: the outputs of a map are padded to a multiple of four."""

    def floats(outputs: int, inputs: int) -> int:
        return (outputs + 3) // 4 * 4 * (inputs + 1)

    n_weights = floats(c, c) + floats(n_codes, c)
    n_cache = 3 * n_codes + 3 * c + width * c
    for i, k in enumerate(kernel_sizes):
        seen, o = k // 2 + (i > 0), 2 * c if i + 1 < len(kernel_sizes) else c
        # Vertical, link and horizontal; the bias of the horizontal map is added to the link's.
        n_weights += floats(2 * c, seen * k * c) + floats(2 * c, c) + floats(2 * c, seen * c - 1) + floats(o, c)
        n_cache += width * 2 * c + (0 if i == 0 else (k // 2 + 2) * width * c)
    return ((n_codes, c), (n_weights,), (len(kernel_sizes) + 1, 11)), batch * (n_cache + n_cache % 2)
