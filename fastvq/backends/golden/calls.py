"""Calls whose results are exact in any order of addition: what ``Op`` runs on a card without a record.

Numbers are small integers, sums of them and of their squares, and every divisor is a power of two or is met in the same
float64 operation by the reference: whatever the order, the result has one bit pattern.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

__all__ = ["ema_update", "masked_conv", "quantize_backward", "statistics", "step"]

FLOAT32: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}  # whatever torch's defaults are
DTYPES = (torch.float32, torch.bfloat16, torch.float64, torch.float16)


def _integers(g: torch.Generator, *shape: int) -> Tensor:
    return torch.randint(-7, 8, shape, generator=g, device="cpu").float()


def statistics() -> Iterator[tuple[Any, ...]]:
    """x, indices, n_codes, n_heads, deterministic, backend: few and many codes, each width of a tile, and atomics."""
    g = torch.Generator("cpu").manual_seed(0)
    for dtype, (n_codes, dim) in zip(DTYPES, ((50, 40), (3000, 20), (3000, 40), (3000, 140)), strict=True):
        x, indices = _integers(g, 300, dim).to(dtype), torch.randint(-1, n_codes, (300,), generator=g, device="cpu")
        x[7, 3] = torch.nan
        indices[100:200] = 2
        yield x, indices, n_codes, None, True, None
    yield x, indices, n_codes, None, False, None


def step() -> Iterator[tuple[Any, ...]]:
    """The arguments of ``vq_step``: vectors that the filter settles, and vectors that the scan must."""
    g = torch.Generator("cpu").manual_seed(1)
    for dtype, dim, deterministic in zip(DTYPES, (40, 8, 20, 300), (True, False, True, True), strict=True):
        x, codebook = _integers(g, 150, dim).to(dtype), _integers(g, 200, dim)
        mask = torch.arange(150, device="cpu") % 5 != 3
        yield x, torch.cat([codebook, codebook]), mask, "euclidean", "none", 0.25, "exact", None, deterministic


def quantize_backward() -> Iterator[tuple[Any, ...]]:
    """The arguments of ``quantize_backward``: 64 vectors of 32 elements that are not masked."""
    g = torch.Generator("cpu").manual_seed(2)
    x, codebook, incoming = (_integers(g, n, 32) for n in (70, 9, 70))
    indices = torch.randint(9, (70,), generator=g, device="cpu")
    indices[64:] = -1
    losses = tuple(torch.full((), value, **FLOAT32) for value in (3.0, 5.0))
    yield x, codebook, indices, incoming, *losses, "straight_through", 0.25, True, True, None
    # A vector and its code on one axis: every number of the rotation is a power of two.
    unit = torch.eye(32, **FLOAT32)
    axis = unit[indices.clamp(min=0)]
    yield 2 * axis, 4 * unit[:9], indices, incoming, *losses, "rotation", 0.25, True, True, None


def ema_update() -> Iterator[tuple[Any, ...]]:
    """codebook, embed_sum, cluster_size, sums, counts, decay, eps, smoothing, debias, backend."""
    g = torch.Generator("cpu").manual_seed(3)
    for smoothing, debias in (("laplace", False), ("none", True)):
        size, counts = torch.randint(0, 9, (2, 300), generator=g, device="cpu")
        buffers = _integers(g, 300, 40), _integers(g, 300, 40), size.float()
        yield *buffers, _integers(g, 300, 40), counts, 0.5, 2.0**-10, smoothing, debias, None


def masked_conv() -> Iterator[tuple[Any, ...]]:
    """x, weight, bias, gradient of the output."""
    g = torch.Generator("cpu").manual_seed(4)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        # In the 16-bit types a result is rounded once, from a sum that is exact.
        shapes = ((2, 20, 9, 11), (42, 20, 3, 3), (42,), (2, 42, 9, 11))
        yield tuple(_integers(g, *shape).to(dtype) for shape in shapes)
