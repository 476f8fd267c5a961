"""The compiled extension ``fastvq._cpu``: is it there, which instruction set it uses, how tensors are handed to it.

Nothing of torch is compiled in: a tensor crosses as a tuple of integers, its address, dtype, sizes and strides.
"""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from fastvq import _env, _rows

_import_error: str | None = None
try:
    from fastvq import _cpu  # type: ignore[attr-defined]
except ImportError as error:
    _import_error = f"{type(error).__name__}: {error}"

__all__ = [
    "address",
    "codes_view",
    "cpu_call",
    "ema_view",
    "image_view",
    "isa",
    "layout_address",
    "lookup_isa",
    "metric_code",
    "packing_isa",
    "refuse",
    "refuse_device",
    "rows_of",
    "rows_view",
    "statistics_view",
    "unavailable",
]

Adapter = TypeVar("Adapter", bound=Callable[..., Any])

# The numbers of csrc/fastvq.h.
DTYPES = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}
METRICS = {"euclidean": 0, "cosine": 1, "dot": 2}
ISAS = {"generic": 0, "avx2": 1, "avx512": 2, "avx512_vnni": 3, "amx": 4, "emulated": 5}
# Where a lookup runs on tiles unless it is told to: on how many rows and codes it is tried, the share of rows up to
# which it pays that bfloat16 leaves more than one code open, the rows of a head that are too few to try, and the least
# width that tiles are made for (csrc/cpu/lookup/driver.cpp).
TRIED_ROWS, TRIED_CODES, MOST_OPEN, FEW_ROWS, LEAST_DIM = 256, 1024, 0.5, 8192, 32


def cpu_call(adapter: Adapter) -> Adapter:
    """Makes ``adapter``, which calls CPU kernels, the same whatever the caller set the processor to.

    Within the call the floating-point environment is the default one: rounding to nearest, denormals kept. After it the
    caller's is back. A call of Python's main thread that runs longer than 50 ms looks for signals from then on: Ctrl-C
    raises KeyboardInterrupt from inside the call, unless it changes its arguments in place.
    """

    @functools.wraps(adapter)
    def call(*args: Any, **kwargs: Any) -> Any:
        saved = _cpu.enter_call()
        try:
            return adapter(*args, **kwargs)
        finally:
            _cpu.leave_call(saved)

    return call  # type: ignore[return-value]


def _set_main_thread() -> None:
    _cpu.set_main_thread(threading.main_thread().ident)


if _import_error is None:
    _set_main_thread()
    if hasattr(os, "register_at_fork"):  # the main thread of a child is the one that forked
        os.register_at_fork(after_in_child=_set_main_thread)


def unavailable() -> str | None:
    """Why the CPU kernels cannot run at all, or None."""
    if _import_error is not None:
        return f"the extension fastvq._cpu was not built or cannot be loaded ({_import_error}); {_remedy()}"
    return None


def _remedy() -> str:
    """For an extension that is missing; a source folder is found before an installed package by who stands in it."""
    folder = Path(__file__).resolve().parent.parent
    if (folder / "setup.py").is_file() and (folder / "csrc").is_dir():
        return (
            f"this is the source folder {folder}: build it with pip install -e ., or leave the folder so that Python "
            "finds an installed fastvq"
        )
    return "reinstall fastvq"


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


def _tiles_by_choice() -> bool:
    """Whether the best instruction set has matrix tiles, and nobody asked for it."""
    return _ISAS_HERE[-1] == "amx" and _env.read("FASTVQ_CPU_ISA") is None


def packing_isa() -> int:
    """The instruction set that a codebook is laid out for, before any vectors are known."""
    return ISAS[_ISAS_HERE[-2]] if _tiles_by_choice() else isa()


def lookup_isa(rows: tuple[int, ...], codes: tuple[int, ...], metric: int, fast: bool, packed: bool = False) -> int:
    """The instruction set to look ``rows`` up with; the views are those of ``rows_view`` and ``codes_view``.

    packed: that of the layout which is there already.

    Tiles are the fastest where vectors spread in all directions. Where they share most of their length with their
    neighbours, as patches of photographs do, bfloat16 leaves most rows with several codes, and 16-bit integers are
    faster. So a few rows of the first head, evenly spread, are tried against a few of its codes. Exact indices are the
    same either way; ``fast`` ones are not, and must not depend on what else is in the call, so nothing is tried.
    """
    data, dtype, _, n_outer, n_inner, dim, _, stride_outer, stride_inner, stride_d = rows
    if not _tiles_by_choice():
        return isa()
    if packed or fast or dim < LEAST_DIM or n_outer * n_inner < FEW_ROWS:
        return packing_isa()
    inner = min(n_inner, max(16, TRIED_ROWS // n_outer))
    outer = min(n_outer, TRIED_ROWS // inner)
    tried = (
        data, dtype, 1, outer, inner, dim, 0, n_outer // outer * stride_outer,
        n_inner // inner * stride_inner, stride_d,
    )  # fmt: skip
    step = max(1, codes[3] // TRIED_CODES)
    few_codes = (*codes[:2], 1, codes[3] // step, codes[4], 0, step * codes[6], codes[7])
    indices = torch.empty(outer * inner, dtype=torch.int64, device="cpu")
    threads = torch.get_num_threads()
    open_rows = sum(_cpu.nearest(tried, few_codes, metric, False, address(indices), ISAS["amx"], threads, 0))
    return isa() if open_rows <= MOST_OPEN * outer * inner else packing_isa()


def refuse_device(device: torch.device) -> str | None:
    return None if device.type == "cpu" else "it takes CPU tensors"


def refuse(x: Tensor, *_: Any) -> str | None:
    """Why the CPU kernels cannot serve a call on ``x``, or None: the predicate of most ops."""
    if x.device.type != "cpu":
        return f"it takes CPU tensors, x is on {x.device}"
    return None


def address(t: Tensor) -> int:
    """Where the elements of ``t`` lie in memory, for a kernel.

    Raises:
        TypeError: a tensor that has elements but no memory: on the meta device, of torch.compile's tracing, or of a
            subclass that wraps other tensors.
    """
    at = t.data_ptr()
    if at == 0 and t.numel():
        raise TypeError(
            f"fastvq: a kernel needs a tensor with memory of its own, got {type(t).__name__} {list(t.shape)} on "
            f"{t.device}, which has none; pass the tensor that it stands for (of a DTensor: .to_local())"
        )
    return at


def layout_address(layout: Tensor | None) -> int:
    """Where a packed codebook lies, 0 for none; ValueError where ``torch.ops.fastvq.pack_codebook`` did not make it."""
    if layout is None:
        return 0
    at = address(layout)
    whole = layout.dtype == torch.uint8 and layout.is_contiguous() and layout.is_cpu and layout.numel() >= 64
    if not whole or at % 64 or _cpu.said_bytes(at) != layout.numel():
        raise ValueError(
            f"fastvq: layout must be what torch.ops.fastvq.pack_codebook made of the codebook, got {layout.dtype} "
            f"{list(layout.shape)}; pack the codebook again"
        )
    return at


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
    return (address(view.tensor), DTYPES[view.tensor.dtype], *view[1:])


def codes_view(
    codebook: Tensor,  # [K, D] or [H, K, D]
) -> tuple[int, ...]:
    """``codebook`` as the ``Codes`` of csrc/fastvq.h. The caller keeps the tensor alive."""
    heads, stride_head = (1, 0) if codebook.dim() == 2 else (codebook.shape[0], codebook.stride(0))
    return (
        address(codebook), DTYPES[codebook.dtype], heads, codebook.shape[-2], codebook.shape[-1],
        stride_head, codebook.stride(-2), codebook.stride(-1),
    )  # fmt: skip


def statistics_view(
    sums: Tensor,  # [K, D] or [H, K, D] float32 or float64, contiguous
    counts: Tensor,  # [K] or [H, K] int64, contiguous
) -> tuple[int, int, int]:
    """Where statistics go, as the ``StatisticsOut`` of csrc/fastvq.h. The caller keeps the tensors alive."""
    return address(sums), sums.dtype == torch.float64, address(counts)


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
        address(codebook), address(embed_sum), address(cluster_size),
        *codebook.stride(), *embed_sum.stride(), *cluster_size.stride(),
    )  # fmt: skip


def image_view(
    x: Tensor,  # [B, C, H, W]
) -> tuple[int, int, list[int], list[int]]:
    """``x`` as the ``Image`` of csrc/masked_conv.h, any strides. The caller keeps the tensor alive."""
    return address(x), DTYPES[x.dtype], list(x.shape), list(x.stride())


_ISAS_HERE = available_isas()
ISA_NUMBERS_HERE = frozenset(ISAS[name] for name in _ISAS_HERE)
