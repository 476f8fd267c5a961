"""A tensor [..., D] as rows that two strides walk: how kernels of every kind read vectors where they lie."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Output", "Rows", "rows"]


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


class Output:
    """A tensor like ``x`` for a kernel to write, through a buffer where two strides cannot walk its rows."""

    def __init__(self, x: Tensor, n_heads: int | None) -> None:
        self._tensor = torch.empty_like(x)
        self.rows = rows(self._tensor, n_heads)

    def tensor(self) -> Tensor:
        return self._tensor if self.rows.tensor is self._tensor else self._tensor.copy_(self.rows.tensor)
