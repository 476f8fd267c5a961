"""The nearest code by the CUDA C++ kernels: a tensor-core filter pass, then near-ties scored in float64."""

from __future__ import annotations

import torch
from torch import Tensor

from fastvq import _cuda_native, _golden, _native
from fastvq._golden_cases import configuration
from fastvq._native import address
from fastvq.ops.nearest import reference

__all__ = ["nearest", "refuse"]


def nearest(
    x: Tensor,  # [..., D] or [H, ..., D]
    codebook: Tensor,  # [K, D] or [H, K, D]
    metric: str,
    precision: str,
) -> Tensor:  # [...] or [H, ...] int64
    with _cuda_native.on_device_of(x):
        indices = torch.empty(x.shape[:-1], dtype=torch.int64, device=x.device)
        x, rows = _native.rows_view(x, codebook.shape[0] if codebook.dim() == 3 else None)
        codes = _native.codes_view(codebook)
        room = _cuda_native.workspace(x, _cuda_native._cuda.nearest_workspace(rows, codes))
        _cuda_native._cuda.nearest(
            rows, codes, _native.metric_code(metric), precision == "fast", 0, address(indices), address(room),
            _cuda_native.stream(x),
        )  # fmt: skip
    return indices


def refuse(x: Tensor, codebook: Tensor, metric: str, precision: str) -> str | None:
    """As ``_cuda_native.refuse``; and on a kind of card that has no record the kernels are checked first, see
    ``_golden.mismatch``."""
    return _cuda_native.refuse(x) or _golden.mismatch(
        "cuda", x.device, nearest, reference.nearest, configuration(x, codebook, metric, precision)
    )
