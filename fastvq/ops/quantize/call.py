"""The arguments of quantization and of its gradient."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

__all__ = ["QuantizeBackwardCall", "QuantizeCall"]


class QuantizeCall(NamedTuple):
    x: Tensor  # [..., D], or [H, ..., D] with heads
    codebook: Tensor  # [K, D], or [H, K, D]
    mask: Tensor | None  # [...] or [H, ...] bool
    metric: str
    estimator: str
    beta: float
    precision: str
    backend: str | None
    layout: Tensor | None = None  # the codebook as pack_codebook packed it, for the CPU kernels


class QuantizeBackwardCall(NamedTuple):
    x: Tensor  # [..., D] or [H, ..., D]
    codebook: Tensor  # [K, D] or [H, K, D]
    indices: Tensor  # [...] or [H, ...] int64, -1 where masked
    grad_quantized: Tensor | None  # as x
    grad_commitment: Tensor | None  # []
    grad_codebook_loss: Tensor | None  # []
    estimator: str
    beta: float
    need_x: bool
    need_codebook: bool
    backend: str | None
