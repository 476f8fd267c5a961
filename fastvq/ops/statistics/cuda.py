"""Code statistics, their moving average and the replacement of dead codes by the CUDA C++ kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from fastvq._checks import check_indices
from fastvq.backends import cuda as cuda_backend
from fastvq.backends import views
from fastvq.backends.views import address
from fastvq.ops.statistics.call import ReplaceCall, UpdateCall
from fastvq.ops.statistics.common import STATISTICS

__all__ = ["code_statistics", "ema_update_", "replace_dead_codes_", "why_too_many", "why_too_many_vectors"]


def why_too_many(n_rows: int, n_codes: int) -> str | None:
    """Why the kernels cannot number rows or codes, of all heads together, or None."""
    most = cuda_backend._cuda.most_statistics_rows
    if n_rows > most or n_codes > most:
        return f"it numbers rows and codes in 32 bits, {n_rows} and {n_codes} are too many"
    return None


def why_too_many_vectors(
    x: Tensor,  # [..., D]
    codebook: Tensor,  # [..., D]
) -> str | None:
    """``why_too_many`` of an op that takes the statistics of x."""
    dim = x.shape[-1]
    return why_too_many(x.numel() // dim, codebook.numel() // dim)


def code_statistics(
    x: Tensor,  # [..., D] or [H, ..., D]
    indices: Tensor,  # [...] or [H, ...] int64
    n_codes: int,
    n_heads: int | None,
    deterministic: bool = True,
    sums_dtype: torch.dtype | None = None,  # float32 or float64; x's own, at least float32, where None
) -> tuple[Tensor, Tensor]:
    check_indices(STATISTICS, "indices", indices, -1, n_codes)
    if sums_dtype is None:
        sums_dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    lead = () if n_heads is None else (n_heads,)
    with cuda_backend.on_device_of(x):
        sums = x.new_empty((*lead, n_codes, x.shape[-1]), dtype=sums_dtype)
        counts = indices.new_empty((*lead, n_codes))
        indices = indices.contiguous()
        x, rows = views.rows_view(x, n_heads)
        n_bytes = cuda_backend._cuda.code_statistics_workspace(rows, n_codes, deterministic)
        workspace = cuda_backend.workspace(x, n_bytes)
        cuda_backend._cuda.code_statistics(
            rows, address(indices), n_codes, deterministic, address(sums), sums_dtype == torch.float64,
            address(counts), address(workspace), cuda_backend.stream(x),
        )  # fmt: skip
    return sums, counts


def ema_update_(call: UpdateCall) -> None:
    codebook, embed_sum, cluster_size, sums, counts, decay, eps, smoothing, debias, _ = call
    with cuda_backend.on_device_of(codebook):
        sums, counts = sums.contiguous(), counts.contiguous()
        buffers = views.ema_view(codebook, embed_sum, cluster_size)
        workspace = cuda_backend.workspace(codebook, cuda_backend._cuda.ema_update_workspace(buffers))
        cuda_backend._cuda.ema_update(
            buffers, address(sums), sums.dtype == torch.float64, address(counts), decay, eps,
            smoothing == "laplace", debias, address(workspace), cuda_backend.stream(codebook),
        )  # fmt: skip


def replace_dead_codes_(call: ReplaceCall) -> Tensor:  # [] int64
    codebook, embed_sum, cluster_size, x, uniforms, threshold, _ = call
    with cuda_backend.on_device_of(codebook):
        if x.dtype == torch.float64 and codebook.dtype == torch.float32:
            x = x.float()  # a row that float32 does not hold is not finite there, and is not taken
        x, rows = views.rows_view(x, codebook.shape[0] if codebook.dim() == 3 else None)
        n_heads, n_rows = rows[2], rows[3] * rows[4]
        if n_rows == 0:
            return torch.zeros((), dtype=torch.int64, device=x.device)
        usable = torch.empty((n_heads, n_rows), dtype=torch.uint8, device=x.device)
        cuda_backend._cuda.usable_rows(rows, address(usable), cuda_backend.stream(x))
        rank = usable.cumsum(-1)
        dead = (cluster_size < threshold).contiguous().view(n_heads, -1)
        slots = dead.cumsum(-1)
        uniforms = uniforms.double().contiguous()
        cuda_backend._cuda.replace_dead_codes(
            views.ema_view(codebook, embed_sum, cluster_size), rows,
            (address(rank), address(dead), address(slots), address(uniforms)), threshold,
            cuda_backend.stream(x),
        )  # fmt: skip
        return torch.where(rank[:, -1] > 0, slots[:, -1], 0).sum()
