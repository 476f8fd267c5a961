"""Code statistics and their moving average by the C++ kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from fastvq._checks import raise_bad_index
from fastvq.backends import cpu as cpu_backend
from fastvq.backends import views
from fastvq.backends.views import address
from fastvq.ops.statistics import common
from fastvq.ops.statistics.call import ReplaceCall, UpdateCall

__all__ = ["code_statistics", "ema_update_", "replace_dead_codes_"]


@cpu_backend.cpu_call
def code_statistics(
    x: Tensor,  # [..., D] or [H, ..., D]
    indices: Tensor,  # [...] or [H, ...] int64
    n_codes: int,
    n_heads: int | None,
    deterministic: bool = True,  # this one always is
    sums_dtype: torch.dtype | None = None,  # float32 or float64; x's own, at least float32, where None
) -> tuple[Tensor, Tensor]:
    if sums_dtype is None:
        sums_dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    lead = () if n_heads is None else (n_heads,)
    sums = torch.empty(*lead, n_codes, x.shape[-1], dtype=sums_dtype, device="cpu")
    counts = torch.empty(*lead, n_codes, dtype=torch.int64, device="cpu")
    indices = indices.contiguous()
    x, rows = views.rows_view(x, n_heads)
    bad = cpu_backend._cpu.code_statistics(
        rows, address(indices), n_codes, views.statistics_view(sums, counts), cpu_backend.isa(),
        torch.get_num_threads(),
    )  # fmt: skip
    if bad >= 0:
        raise_bad_index(common.STATISTICS, "indices", indices, -1, n_codes, bad)
    return sums, counts


@cpu_backend.cpu_call
def ema_update_(call: UpdateCall) -> None:
    codebook, embed_sum, cluster_size, sums, counts, decay, eps, smoothing, debias, _ = call
    sums, counts = sums.contiguous(), counts.contiguous()
    buffers = views.ema_view(codebook, embed_sum, cluster_size)
    cpu_backend._cpu.ema_update(
        buffers, address(sums), sums.dtype == torch.float64, address(counts),
        decay, eps, smoothing == "laplace", debias, torch.get_num_threads() if codebook.numel() > 1 << 17 else 1,
    )  # fmt: skip


@cpu_backend.cpu_call
def replace_dead_codes_(call: ReplaceCall) -> Tensor:  # [] int64
    codebook, embed_sum, cluster_size, x, uniforms, threshold, _ = call
    # On the CPU the comparison costs no wait, and nearly always no code is dead.
    if not (cluster_size < threshold).any():
        return torch.zeros((), dtype=torch.int64, device="cpu")
    return common.replace_dead_codes_(codebook, embed_sum, cluster_size, x, uniforms, threshold)
