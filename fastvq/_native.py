"""The compiled extension ``fastvq._cpu``: is it there, which instruction set it uses, how tensors are handed to it.

Nothing of torch is compiled in: a tensor crosses as a tuple of integers, its address, dtype, sizes and strides.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastvq import _env, _rows

_import_error: str | None = None
try:
    from fastvq import _cpu  # type: ignore[attr-defined]
except ImportError as error:
    _import_error = f"{type(error).__name__}: {error}"

__all__ = [
    "codes_view",
    "ema_view",
    "image_view",
    "isa",
    "metric_code",
    "refuse",
    "rows_of",
    "rows_view",
    "unavailable",
]

# The numbers of csrc/fastvq.h.
DTYPES = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}
METRICS = {"euclidean": 0, "cosine": 1, "dot": 2}
ISAS = {"generic": 0, "avx2": 1, "avx512": 2, "avx512_vnni": 3, "amx": 4, "emulated": 5}


def unavailable() -> str | None:
    """Why the CPU kernels cannot run at all, or None."""
    if _import_error is not None:
        return f"the extension fastvq._cpu was not built or cannot be loaded ({_import_error}); reinstall fastvq"
    return None


def available_isas() -> list[str]:
    """Instruction sets that this build holds and this machine runs, weakest first; emulated tiles never come last."""
    return [] if _import_error is not None else _cpu.available_isas()


def amx_unavailable() -> str | None:
    """Why lookups do not run on matrix tiles here, or None."""
    return unavailable() or _cpu.amx_unavailable() or None


def isa() -> int:
    """The instruction set to use: the best one, or the one that FASTVQ_CPU_ISA names.

    Raises:
        ValueError: the machine does not have the one that is named.
    """
    available = _ISAS_HERE
    forced = _env.read("FASTVQ_CPU_ISA")
    if forced is None:
        return ISAS[available[-1]]
    if forced not in available:
        reason = f" ({amx_unavailable()})" if forced == "amx" else ""
        raise ValueError(
            f"FASTVQ_CPU_ISA={forced}: this machine or build does not have that instruction set{reason}; "
            f"it has {', '.join(available)}; set one of those or unset it"
        )
    return ISAS[forced]


def refuse(x: Tensor, *_: Any) -> str | None:
    """Why the CPU kernels cannot serve a call on ``x``, or None: the predicate of most ops."""
    if x.device.type != "cpu":
        return f"it takes CPU tensors, x is on {x.device}"
    return None


def metric_code(metric: str) -> int:
    return METRICS[metric]


def rows_view(
    x: Tensor,  # [..., D], or [H, ..., D] with heads
    n_heads: int | None,
) -> tuple[Tensor, tuple[int, ...]]:
    """``x`` as the ``Rows`` of csrc/fastvq.h, without a copy wherever two strides can walk the rows.

    Returns the tensor that the view points into, which the caller keeps alive, and the view's integers. Without heads,
    ``n_heads`` is None and the view has one. Rows that need three strides or more are copied.
    """
    view = _rows.rows(x, n_heads)
    return view.tensor, rows_of(view)


def rows_of(view: _rows.Rows) -> tuple[int, ...]:
    """The integers of csrc/fastvq.h's ``Rows``."""
    return (view.tensor.data_ptr(), DTYPES[view.tensor.dtype], *view[1:])


def codes_view(
    codebook: Tensor,  # [K, D] or [H, K, D]
) -> tuple[int, ...]:
    """``codebook`` as the ``Codes`` of csrc/fastvq.h. The caller keeps the tensor alive."""
    heads, stride_head = (1, 0) if codebook.dim() == 2 else (codebook.shape[0], codebook.stride(0))
    return (
        codebook.data_ptr(), DTYPES[codebook.dtype], heads, codebook.shape[-2], codebook.shape[-1],
        stride_head, codebook.stride(-2), codebook.stride(-1),
    )  # fmt: skip


def ema_view(
    codebook: Tensor,  # [K, D] or [H, K, D]
    embed_sum: Tensor,  # [K, D] or [H, K, D]
    cluster_size: Tensor,  # [K] or [H, K]
) -> tuple[int, ...]:
    """What ``ema_update_`` writes as the ``EmaBuffers`` of csrc/fastvq.h. The caller keeps the tensors alive."""
    if codebook.dim() == 2:
        codebook, embed_sum, cluster_size = codebook[None], embed_sum[None], cluster_size[None]
    return (
        DTYPES[codebook.dtype], *codebook.shape,
        codebook.data_ptr(), embed_sum.data_ptr(), cluster_size.data_ptr(),
        *codebook.stride(), *embed_sum.stride(), *cluster_size.stride(),
    )  # fmt: skip


def image_view(
    x: Tensor,  # [B, C, H, W]
) -> tuple[int, int, list[int], list[int]]:
    """``x`` as the ``Image`` of csrc/masked_conv.h, any strides. The caller keeps the tensor alive."""
    return x.data_ptr(), DTYPES[x.dtype], list(x.shape), list(x.stride())


_ISAS_HERE = available_isas()
