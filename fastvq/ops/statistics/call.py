"""The arguments of the ops that learn a codebook."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

__all__ = ["ReplaceCall", "StatisticsCall", "UpdateCall"]


class StatisticsCall(NamedTuple):
    x: Tensor  # [..., D], or [H, ..., D] with heads
    indices: Tensor  # [...] or [H, ...] int64
    n_codes: int
    n_heads: int | None
    deterministic: bool
    backend: str | None


class UpdateCall(NamedTuple):
    codebook: Tensor  # [K, D] or [H, K, D]
    embed_sum: Tensor  # [K, D] or [H, K, D]
    cluster_size: Tensor  # [K] or [H, K]
    sums: Tensor  # [K, D] or [H, K, D]
    counts: Tensor  # [K] or [H, K] int64
    decay: float
    eps: float
    smoothing: str
    debias: bool
    backend: str | None


class ReplaceCall(NamedTuple):
    codebook: Tensor  # [K, D] or [H, K, D]
    embed_sum: Tensor  # [K, D] or [H, K, D]
    cluster_size: Tensor  # [K] or [H, K]
    x: Tensor  # [..., D] or [H, ..., D]
    uniforms: Tensor  # [K] or [H, K]
    threshold: float
    backend: str | None
