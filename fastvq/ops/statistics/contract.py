"""Checks of the learning ops: what public functions are given, and what kernels rely on in the registered ops."""

from __future__ import annotations

import torch
from torch import Tensor

from fastvq._checks import FLOATS, LARGEST, check_dense, check_float, check_option, check_same_device
from fastvq.backends import views
from fastvq.ops._contract import check_overlap, check_tensor
from fastvq.ops.statistics.call import ReplaceCall, StatisticsCall, UpdateCall

__all__ = [
    "REPLACE",
    "SMOOTHINGS",
    "STATISTICS",
    "UPDATE",
    "check_buffers",
    "check_candidates",
    "check_replace",
    "check_statistics",
    "check_statistics_call",
    "check_update",
    "fake_statistics",
]

STATISTICS, UPDATE, REPLACE = (
    f"fastvq.ops.{name}" for name in ("code_statistics", "ema_update_", "replace_dead_codes_")
)
SMOOTHINGS = ("laplace", "none")
_LEARNED = (torch.float32, torch.float64)


def check_statistics(x: Tensor, indices: Tensor, n_codes: int, n_heads: int | None) -> None:
    check_float(STATISTICS, "x", x)
    if not isinstance(indices, Tensor) or indices.dtype != torch.int64:
        got = indices.dtype if isinstance(indices, Tensor) else type(indices).__name__
        raise TypeError(f"{STATISTICS}: indices must be an int64 tensor, got {got}; convert it with .long()")
    check_dense(STATISTICS, "indices", indices)
    check_same_device(STATISTICS, "x", x, "indices", indices)
    if x.dim() < 1 or x.shape[-1] == 0:
        raise ValueError(f"{STATISTICS}: x must be [..., D] with D >= 1, got {list(x.shape)}")
    if indices.shape != x.shape[:-1]:
        raise ValueError(
            f"{STATISTICS}: indices must be {list(x.shape[:-1])}, one a vector of x {list(x.shape)}, "
            f"got {list(indices.shape)}; pass what nearest returned for this x"
        )
    if n_codes < 1:
        raise ValueError(f"{STATISTICS}: n_codes must be at least 1, got {n_codes}; pass the codebook's K")
    if n_codes > LARGEST // 8 // (x.shape[-1] * max(1, n_heads or 1)):  # bytes of the sums
        raise ValueError(
            f"{STATISTICS}: n_codes must leave sums [K, D] below 2^63 bytes, got {n_codes} for D = {x.shape[-1]}"
        )
    if n_heads is not None and (x.dim() < 2 or x.shape[0] != n_heads or n_heads < 1):
        raise ValueError(
            f"{STATISTICS}: with n_heads = {n_heads}, x must be [H, ..., D] with H = n_heads >= 1, "
            f"got {list(x.shape)}; put the heads first"
        )


def check_candidates(codebook: Tensor, x: Tensor) -> None:
    check_float(REPLACE, "x", x)
    check_same_device(REPLACE, "codebook", codebook, "x", x)
    lead = codebook.shape[:-2]
    if x.dim() < 1 + len(lead) or x.shape[: len(lead)] != lead or x.shape[-1] != codebook.shape[-1]:
        expected = ", ".join(map(str, (*lead, "...", codebook.shape[-1])))
        raise ValueError(
            f"{REPLACE}: x must be [{expected}] to match the codebook {list(codebook.shape)}, got {list(x.shape)}; "
            "put heads first, or project x first"
        )


def check_buffers(op: str, codebook: Tensor, embed_sum: Tensor, cluster_size: Tensor) -> None:
    for name, value in (("codebook", codebook), ("embed_sum", embed_sum), ("cluster_size", cluster_size)):
        check_float(op, name, value)
        check_same_device(op, "codebook", codebook, name, value)
        if not torch.compiler.is_compiling() and value.is_neg():
            raise ValueError(
                f"{op}: {name} is written in place and must not be a negative view (the imaginary part of a conjugate "
                "is one); pass .resolve_neg() of it, which is a copy"
            )
        if value.dtype not in (torch.float32, torch.float64) or value.dtype != codebook.dtype:
            raise TypeError(
                f"{op}: codebook, embed_sum and cluster_size must be all float32 or all float64, got {name} in "
                f"{value.dtype}; keep them in float32 (narrower types lose small updates)"
            )
    if codebook.dim() not in (2, 3) or 0 in codebook.shape:
        raise ValueError(f"{op}: codebook must be [K, D] or [H, K, D], none of them 0, got {list(codebook.shape)}")
    for name, value, shape in (
        ("embed_sum", embed_sum, codebook.shape),
        ("cluster_size", cluster_size, codebook.shape[:-1]),
    ):
        if value.shape != shape:
            raise ValueError(
                f"{op}: {name} must be {list(shape)} to match codebook {list(codebook.shape)}, got {list(value.shape)}"
            )


def check_statistics_call(call: StatisticsCall) -> None:
    x, indices, n_codes, n_heads, *_ = call
    shape = x.shape
    if not (
        n_codes >= 1
        and shape
        and shape[-1] >= 1
        and (n_heads is None or (len(shape) > 1 and shape[0] == n_heads >= 1))
        and x.dtype in FLOATS
        and indices.dtype == torch.int64
        and indices.shape == shape[:-1]
        and indices.device == x.device
    ):
        check_statistics(x, indices, n_codes, n_heads)


def fake_statistics(call: StatisticsCall) -> tuple[Tensor, Tensor]:
    lead = () if call.n_heads is None else (call.n_heads,)
    dtype = torch.float64 if call.x.dtype == torch.float64 else torch.float32
    sums = call.x.new_empty(*lead, call.n_codes, call.x.shape[-1], dtype=dtype)
    return sums, call.indices.new_empty(*lead, call.n_codes)


def check_learned(op: str, codebook: Tensor, embed_sum: Tensor, cluster_size: Tensor) -> None:
    """``check_buffers`` in fewer steps, for a call whose types are those of the schema."""
    if codebook.dtype not in _LEARNED or codebook.dim() not in (2, 3) or 0 in codebook.shape:
        check_buffers(op, codebook, embed_sum, cluster_size)
    check_tensor(op, "embed_sum", embed_sum, codebook.shape, codebook.dtype, codebook.device)
    check_tensor(op, "cluster_size", cluster_size, codebook.shape[:-1], codebook.dtype, codebook.device)


def check_update(call: UpdateCall) -> None:
    codebook, embed_sum, cluster_size, sums, counts, *_ = call
    check_learned(UPDATE, codebook, embed_sum, cluster_size)
    check_tensor(UPDATE, "sums", sums, codebook.shape, None, codebook.device)
    check_tensor(UPDATE, "counts", counts, cluster_size.shape, torch.int64, codebook.device)
    if sums.dtype not in _LEARNED:
        raise TypeError(
            f"{UPDATE}: sums must be float32 or float64, got {sums.dtype}; pass what code_statistics returned"
        )
    check_option(UPDATE, "smoothing", call.smoothing, SMOOTHINGS)
    written = {"codebook": codebook, "embed_sum": embed_sum, "cluster_size": cluster_size}
    check_overlap(UPDATE, written, {"sums": sums, "counts": counts})


def check_replace(call: ReplaceCall) -> None:
    codebook, embed_sum, cluster_size, x, uniforms, *_ = call
    check_learned(REPLACE, codebook, embed_sum, cluster_size)
    check_candidates(codebook, x)
    check_tensor(REPLACE, "uniforms", uniforms, cluster_size.shape, None, codebook.device)
    for t in call[:5]:
        views.address(t)  # raises where there is none: torch's functions, which serve a part of the call, do not look
    written = {"codebook": codebook, "embed_sum": embed_sum, "cluster_size": cluster_size}
    check_overlap(REPLACE, written, {"x": x})
