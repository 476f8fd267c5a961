"""The nearest code by the C++ kernels: a float32 filter pass, then near-ties scored in float64."""

from __future__ import annotations

import torch
from torch import Tensor

from fastvq import _native

__all__ = ["nearest"]


def nearest(
    x: Tensor,  # [..., D] or [H, ..., D]
    codebook: Tensor,  # [K, D] or [H, K, D]
    metric: str,
    precision: str,
) -> Tensor:  # [...] or [H, ...] int64
    indices = torch.empty(x.shape[:-1], dtype=torch.int64)
    x, rows = _native.rows_view(x, codebook.shape[0] if codebook.dim() == 3 else None)
    _native._cpu.nearest(
        rows, _native.codes_view(codebook), _native.metric_code(metric), precision == "fast",
        indices.data_ptr(), _native.isa(), torch.get_num_threads(),
    )  # fmt: skip
    return indices
