"""The arguments of a training step's forward."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

__all__ = ["VQStepCall"]


class VQStepCall(NamedTuple):
    """The first eight are those of ``quantize``, in its order: its gradient is that of this op too."""

    x: Tensor  # [..., D], or [H, ..., D] with heads
    codebook: Tensor  # [K, D], or [H, K, D]
    mask: Tensor | None  # [...] or [H, ...] bool
    metric: str
    estimator: str
    beta: float
    precision: str
    backend: str | None
    deterministic: bool
