"""Residual quantization by the C++ kernels of one level: lookup, gather and loss in one pass, then the statistics."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fastvq.ops.ema import cpu as ema
from fastvq.ops.quantize import cpu as one_level
from fastvq.ops.residual import reference

__all__ = ["refuse", "residual_quantize"]


def refuse(x: Tensor, *_: Any) -> str | None:
    if x.device.type != "cpu":
        return f"it takes CPU tensors, x is on {x.device}"
    return None


def residual_quantize(
    x: Tensor,  # [..., D]
    codebooks: Tensor,  # [Q, K, D]
    mask: Tensor | None,  # [...] bool
    metric: str,
    beta: float,
    statistics: bool,
    precision: str,
) -> tuple[Tensor, ...]:
    return reference.loop(
        one_level.quantize, ema.code_statistics, x, codebooks, mask, metric, beta, statistics, precision
    )
