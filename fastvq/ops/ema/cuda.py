"""Code statistics, their moving average and the replacement of dead codes by the CUDA C++ kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastvq import _cuda_native, _golden, _golden_calls, _native
from fastvq._checks import check_indices
from fastvq._native import address
from fastvq.ops.ema import reference

__all__ = ["code_statistics", "ema_update_", "refuse_statistics", "refuse_update", "replace_dead_codes_"]


def refuse_statistics(x: Tensor, indices: Tensor, n_codes: int, n_heads: int | None, *_: Any) -> str | None:
    if (reason := _cuda_native.refuse(x)) is not None:
        return reason
    most = _cuda_native._cuda.most_statistics_rows
    if indices.numel() > most or n_codes * (n_heads or 1) > most:
        return f"it numbers rows and codes in 32 bits, {indices.numel()} and {n_codes * (n_heads or 1)} are too many"
    return _golden.differs(
        "cuda", "code_statistics", x.device, code_statistics, reference.code_statistics, _golden_calls.statistics
    )


def refuse_update(codebook: Tensor, *_: Any) -> str | None:
    return _cuda_native.refuse(codebook) or _golden.differs(
        "cuda", "ema_update_", codebook.device, _updated(ema_update_), _updated(reference.ema_update_),
        _golden_calls.ema_update,
    )  # fmt: skip


def _updated(update: Callable[..., None]) -> Callable[..., tuple[Tensor, ...]]:
    """What ``update`` makes of copies of the buffers."""

    def run(*arguments: Any) -> tuple[Tensor, ...]:
        buffers = tuple(t.clone() for t in arguments[:3])
        update(*buffers, *arguments[3:])
        return buffers

    return run


def code_statistics(
    x: Tensor,  # [..., D] or [H, ..., D]
    indices: Tensor,  # [...] or [H, ...] int64
    n_codes: int,
    n_heads: int | None,
    deterministic: bool = True,
    sums_dtype: torch.dtype | None = None,  # float32 or float64; x's own, at least float32, where None
) -> tuple[Tensor, Tensor]:
    check_indices(reference.STATISTICS, "indices", indices, -1, n_codes)
    if sums_dtype is None:
        sums_dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    lead = () if n_heads is None else (n_heads,)
    with _cuda_native.on_device_of(x):
        sums = x.new_empty((*lead, n_codes, x.shape[-1]), dtype=sums_dtype)
        counts = indices.new_empty((*lead, n_codes))
        indices = indices.contiguous()
        x, rows = _native.rows_view(x, n_heads)
        n_bytes = _cuda_native._cuda.code_statistics_workspace(rows, n_codes, deterministic)
        room = _cuda_native.workspace(x, n_bytes)
        _cuda_native._cuda.code_statistics(
            rows, address(indices), n_codes, deterministic, address(sums), sums_dtype == torch.float64,
            address(counts), address(room), _cuda_native.stream(x),
        )  # fmt: skip
    return sums, counts


def ema_update_(
    codebook: Tensor,  # [K, D] or [H, K, D]
    embed_sum: Tensor,  # [K, D] or [H, K, D]
    cluster_size: Tensor,  # [K] or [H, K]
    sums: Tensor,  # [K, D] or [H, K, D]
    counts: Tensor,  # [K] or [H, K] int64
    decay: float,
    eps: float,
    smoothing: str,
    debias: bool,
) -> None:
    with _cuda_native.on_device_of(codebook):
        sums, counts = sums.contiguous(), counts.contiguous()
        buffers = _native.ema_view(codebook, embed_sum, cluster_size)
        room = _cuda_native.workspace(codebook, _cuda_native._cuda.ema_update_workspace(buffers))
        _cuda_native._cuda.ema_update(
            buffers, address(sums), sums.dtype == torch.float64, address(counts), decay, eps,
            smoothing == "laplace", debias, address(room), _cuda_native.stream(codebook),
        )  # fmt: skip


def replace_dead_codes_(
    codebook: Tensor,  # [K, D] or [H, K, D]
    embed_sum: Tensor,  # [K, D] or [H, K, D]
    cluster_size: Tensor,  # [K] or [H, K]
    x: Tensor,  # [..., D] or [H, ..., D]
    uniforms: Tensor,  # [K] or [H, K]
    threshold: float,
) -> Tensor:  # [] int64
    with _cuda_native.on_device_of(codebook):
        if x.dtype == torch.float64 and codebook.dtype == torch.float32:
            x = x.float()  # a row that float32 does not hold is not finite there, and is not taken
        x, rows = _native.rows_view(x, codebook.shape[0] if codebook.dim() == 3 else None)
        n_heads, n_rows = rows[2], rows[3] * rows[4]
        if n_rows == 0:
            return torch.zeros((), dtype=torch.int64, device=x.device)
        usable = torch.empty((n_heads, n_rows), dtype=torch.uint8, device=x.device)
        _cuda_native._cuda.usable_rows(rows, address(usable), _cuda_native.stream(x))
        rank = usable.cumsum(-1)
        dead = (cluster_size < threshold).contiguous().view(n_heads, -1)
        slots = dead.cumsum(-1)
        uniforms = uniforms.double().contiguous()
        _cuda_native._cuda.replace_dead_codes(
            _native.ema_view(codebook, embed_sum, cluster_size), rows,
            (address(rank), address(dead), address(slots), address(uniforms)), threshold,
            _cuda_native.stream(x),
        )  # fmt: skip
        return torch.where(rank[:, -1] > 0, slots[:, -1], 0).sum()
