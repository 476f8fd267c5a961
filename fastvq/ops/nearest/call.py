"""The arguments of a lookup."""

from __future__ import annotations

from typing import NamedTuple, Protocol

from torch import Tensor

__all__ = ["LookupCall", "NearestCall"]


class NearestCall(NamedTuple):
    x: Tensor  # [..., D], or [H, ..., D] with heads
    codebook: Tensor  # [K, D], or [H, K, D]
    metric: str
    precision: str
    check_finite: bool
    backend: str | None
    layout: Tensor | None = None  # the codebook as pack_codebook packed it, for the CPU kernels


class LookupCall(Protocol):
    """A call of an op that looks ``x`` up in ``codebook``."""

    @property
    def x(self) -> Tensor: ...

    @property
    def codebook(self) -> Tensor: ...

    @property
    def metric(self) -> str: ...

    @property
    def precision(self) -> str: ...
