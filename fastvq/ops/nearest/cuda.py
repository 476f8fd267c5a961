"""The nearest code by the CUDA C++ kernels: a tensor-core filter pass, then near-ties scored in float64."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from fastvq import _cuda_native, _native
from fastvq.ops.nearest import reference

__all__ = ["nearest", "refuse"]

# What the check of a device found: None, or why it is not trusted.
_checked: dict[torch.device, str | None] = {}


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
            rows, codes, _native.metric_code(metric), precision == "fast", 0, indices.data_ptr(), room.data_ptr(),
            _cuda_native.stream(x),
        )  # fmt: skip
    return indices


def refuse(x: Tensor, *_: Any) -> str | None:
    """As ``_cuda_native.refuse``; and these kernels have run on no GPU, so each device's first call checks it."""
    reason = _cuda_native.refuse(x)
    if reason is None and x.device not in _checked:
        if x.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return None  # a check waits for the device, which a capture forbids
        _checked[x.device] = _distrust(x.device)
        if _checked[x.device] is not None:
            warnings.warn(f"fastvq: backend 'cuda' is not used: {_checked[x.device]}", RuntimeWarning, stacklevel=2)
    return reason or _checked.get(x.device)


def _distrust(device: torch.device) -> str | None:
    """Looks up data that a wrong bound, a wrong tie or a wrong sum shows in; None where all is as defined."""
    generator = torch.Generator().manual_seed(0)
    for dim in (8, 64, 100):
        codes = torch.randn(150, dim, generator=generator)
        grid = torch.randint(-8, 9, (150, dim), generator=generator).float()
        pair = torch.randint(150, (2, 150), generator=generator)
        for x, codebook in (
            (torch.randn(150, dim, generator=generator), codes),
            ((codes[pair[0]] + codes[pair[1]]) / 2, codes),
            ((grid[pair[0]] + grid[pair[1]]) / 2, grid.repeat(2, 1)),
            (codes + 1e4, codes + 1e4),
        ):
            x, codebook = x.to(device), codebook.to(device)
            for metric in ("euclidean", "cosine", "dot"):
                wrong = nearest(x, codebook, metric, "exact") != reference.nearest(x, codebook, metric, "exact")
                if wrong.any():
                    return f"on {device} it gave {int(wrong.sum())} of {len(x)} wrong indices (D = {dim}, {metric})"
    return None
