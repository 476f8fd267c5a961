"""Tensors as the integers that kernels take: address, dtype, sizes and strides. No extension links against torch."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = [
    "DTYPES",
    "METRICS",
    "QuantizedRows",
    "Rows",
    "address",
    "codes_view",
    "ema_view",
    "image_view",
    "metric_code",
    "rows",
    "rows_of",
    "rows_view",
    "statistics_view",
]

# The numbers of csrc/fastvq_types.h.
DTYPES = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}
METRICS = {"euclidean": 0, "cosine": 1, "dot": 2}


class Rows(NamedTuple):
    """Row r of head h starts at ``h * stride_head + (r // n_inner) * stride_outer + (r % n_inner) * stride_inner``."""

    tensor: Tensor
    n_heads: int
    n_outer: int
    n_inner: int
    dim: int
    stride_head: int
    stride_outer: int
    stride_inner: int
    stride_d: int

    @property
    def n_rows(self) -> int:
        """Rows of one head."""
        return self.n_outer * self.n_inner

    @property
    def steps(self) -> tuple[int, int, int, int, int]:
        """What finds an element: ``n_inner`` and the four strides."""
        return self.n_inner, self.stride_head, self.stride_outer, self.stride_inner, self.stride_d


def rows(
    x: Tensor,  # [..., D], or [H, ..., D] with heads
    n_heads: int | None,
) -> Rows:
    """``x`` as rows, without a copy wherever two strides can walk them; one that needs three or more is copied.

    Without heads, ``n_heads`` is None and the view has one. The caller keeps ``tensor`` alive.
    """
    first = 0 if n_heads is None else 1
    merged = _merge(x, first)
    if len(merged) > 2:
        x = x.contiguous()
        merged = _merge(x, first)
    (n_outer, stride_outer), (n_inner, stride_inner) = [(1, 0)] * (2 - len(merged)) + merged
    heads, stride_head = (1, 0) if n_heads is None else (x.shape[0], x.stride(0))
    return Rows(x, heads, n_outer, n_inner, x.shape[-1], stride_head, stride_outer, stride_inner, x.stride(-1))


def _merge(x: Tensor, first: int) -> list[tuple[int, int]]:
    """(size, stride) of x's dimensions from ``first`` on but the last, with those that walk memory as one joined."""
    merged: list[tuple[int, int]] = []
    for size, stride in zip(x.shape[first:-1], x.stride()[first:-1], strict=True):
        if size == 1:
            continue
        if merged and merged[-1][1] == stride * size:
            merged[-1] = (merged[-1][0] * size, stride)
        else:
            merged.append((size, stride))
    return merged


class QuantizedRows:
    """A tensor like ``x`` for a kernel to write, through a buffer where two strides cannot walk its rows."""

    def __init__(self, x: Tensor, n_heads: int | None) -> None:
        self._tensor = torch.empty_like(x)
        self.rows = rows(self._tensor, n_heads)

    def tensor(self) -> Tensor:
        return self._tensor if self.rows.tensor is self._tensor else self._tensor.copy_(self.rows.tensor)


def address(t: Tensor) -> int:
    """Where the elements of ``t`` lie in memory, for a kernel.

    Raises:
        TypeError: a tensor that has elements but no memory: on the meta device, of torch.compile's tracing, or of a
            subclass that wraps other tensors.
    """
    at = t.data_ptr()
    if at == 0 and t.numel():
        raise TypeError(
            f"fastvq: a kernel needs a tensor with memory of its own, got {type(t).__name__} {list(t.shape)} on "
            f"{t.device}, which has none; pass the tensor that it stands for (of a DTensor: .to_local())"
        )
    return at


def metric_code(metric: str) -> int:
    return METRICS[metric]


def rows_view(
    x: Tensor,  # [..., D], or [H, ..., D] with heads
    n_heads: int | None,
) -> tuple[Tensor, tuple[int, ...]]:
    """``x`` as the ``Rows`` of csrc/fastvq_types.h, without a copy wherever two strides can walk the rows.

    Returns the tensor that the view points into, which the caller keeps alive, and the view's integers. Without heads,
    ``n_heads`` is None and the view has one. Rows that need three strides or more are copied.
    """
    view = rows(x, n_heads)
    return view.tensor, rows_of(view)


def rows_of(view: Rows) -> tuple[int, ...]:
    """The integers of csrc/fastvq_types.h's ``Rows``."""
    return (address(view.tensor), DTYPES[view.tensor.dtype], *view[1:])


def codes_view(
    codebook: Tensor,  # [K, D] or [H, K, D]
) -> tuple[int, ...]:
    """``codebook`` as the ``Codes`` of csrc/fastvq_types.h. The caller keeps the tensor alive."""
    heads, stride_head = (1, 0) if codebook.dim() == 2 else (codebook.shape[0], codebook.stride(0))
    return (
        address(codebook), DTYPES[codebook.dtype], heads, codebook.shape[-2], codebook.shape[-1],
        stride_head, codebook.stride(-2), codebook.stride(-1),
    )  # fmt: skip


def statistics_view(
    sums: Tensor,  # [K, D] or [H, K, D] float32 or float64, contiguous
    counts: Tensor,  # [K] or [H, K] int64, contiguous
) -> tuple[int, int, int]:
    """Where statistics go, as the ``StatisticsOut`` of csrc/fastvq_cpu.h. The caller keeps the tensors alive."""
    return address(sums), sums.dtype == torch.float64, address(counts)


def ema_view(
    codebook: Tensor,  # [K, D] or [H, K, D]
    embed_sum: Tensor,  # [K, D] or [H, K, D]
    cluster_size: Tensor,  # [K] or [H, K]
) -> tuple[int, ...]:
    """What ``ema_update_`` writes as the ``EmaBuffers`` of csrc/fastvq_types.h. The caller keeps the tensors alive."""
    if codebook.dim() == 2:
        codebook, embed_sum, cluster_size = codebook[None], embed_sum[None], cluster_size[None]
    return (
        DTYPES[codebook.dtype], *codebook.shape,
        address(codebook), address(embed_sum), address(cluster_size),
        *codebook.stride(), *embed_sum.stride(), *cluster_size.stride(),
    )  # fmt: skip


def image_view(
    x: Tensor,  # [B, C, H, W]
) -> tuple[int, int, list[int], list[int]]:
    """``x`` as the ``Image`` of csrc/fastvq_types.h, any strides. The caller keeps the tensor alive."""
    return address(x), DTYPES[x.dtype], list(x.shape), list(x.stride())
