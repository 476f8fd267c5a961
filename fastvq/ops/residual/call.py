"""The arguments of residual quantization and of its gradient."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

__all__ = ["ResidualBackwardCall", "ResidualCall"]


class ResidualCall(NamedTuple):
    x: Tensor  # [..., D]
    codebooks: Tensor  # [Q, K, D]
    mask: Tensor | None  # [...] bool
    metric: str
    estimator: str
    beta: float
    statistics: bool
    precision: str
    backend: str | None


class ResidualBackwardCall(NamedTuple):
    x: Tensor  # [..., D]
    codebooks: Tensor  # [Q, K, D]
    indices: Tensor  # [..., Q] int64, -1 where masked
    grad_quantized: Tensor | None  # as x
    grad_commitment: Tensor | None  # [Q]
    grad_codebook: Tensor | None  # [Q], of the codebook losses
    estimator: str
    beta: float
    need_x: bool
    need_codebooks: bool
    backend: str | None
