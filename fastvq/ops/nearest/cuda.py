"""The nearest code by the CUDA C++ kernels: a tensor-core filter pass, then near-ties scored in float64."""

from __future__ import annotations

import torch
from torch import Tensor

from fastvq.backends import cuda as cuda_backend
from fastvq.backends import views
from fastvq.backends.views import address

__all__ = ["nearest"]


def nearest(
    x: Tensor,  # [..., D] or [H, ..., D]
    codebook: Tensor,  # [K, D] or [H, K, D]
    metric: str,
    precision: str,
) -> Tensor:  # [...] or [H, ...] int64
    with cuda_backend.on_device_of(x):
        indices = torch.empty(x.shape[:-1], dtype=torch.int64, device=x.device)
        x, rows = views.rows_view(x, codebook.shape[0] if codebook.dim() == 3 else None)
        codes = views.codes_view(codebook)
        workspace = cuda_backend.workspace(x, cuda_backend._cuda.nearest_workspace(rows, codes))
        cuda_backend._cuda.nearest(
            rows, codes, views.metric_code(metric), precision == "fast", 0, address(indices), address(workspace),
            cuda_backend.stream(x),
        )  # fmt: skip
    return indices
