"""A training step's forward by the CUDA C++ kernels.

The kernels that settle a row's code also write the code and measure its distance, and either add the row to the sums at
once (``deterministic=False``) or note which sum it belongs to, so that the statistics need not look at indices and
finiteness again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastvq.backends.golden import calls as golden_calls
from fastvq.backends.golden import gate
from fastvq.ops.nearest import NEAREST
from fastvq.ops.nearest.call import NearestCall
from fastvq.ops.quantize.cuda import forward
from fastvq.ops.statistics import CODE_STATISTICS
from fastvq.ops.statistics.call import StatisticsCall
from fastvq.ops.step import reference

__all__ = ["vq_step", "why_unsupported"]


def why_unsupported(
    x: Tensor, codebook: Tensor, mask: Tensor | None, metric: str, beta: float, precision: str, *_: Any
) -> str | None:
    if (
        reason := NEAREST.why_unsupported("cuda", NearestCall(x, codebook, metric, precision, False, None))
    ) is not None:
        return reason
    heads = codebook.shape[0] if codebook.dim() == 3 else None
    return CODE_STATISTICS.why_unsupported(
        "cuda", StatisticsCall(x, x[..., 0], codebook.shape[-2], heads, True, None)
    ) or gate.check_op("cuda", "vq_step", x.device, vq_step, reference.vq_step, golden_calls.step)


def vq_step(
    x: Tensor,  # [..., D] or [H, ..., D]
    codebook: Tensor,  # [K, D] or [H, K, D]
    mask: Tensor | None,  # [...] or [H, ...] bool
    metric: str,
    beta: float,
    precision: str,
    deterministic: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Same arguments and result as the reference's; with ``deterministic=False`` the sums are added by atomics."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    sums = torch.empty(codebook.shape, dtype=wide, device=x.device)
    counts = torch.empty(codebook.shape[:-1], dtype=torch.int64, device=x.device)
    outputs = forward(x, codebook, mask, metric, beta, precision, (sums, counts), deterministic)
    return *outputs, sums, counts
