"""Which instruction set serves a lookup on the CPU, and the layout of a codebook that is packed for one."""

from __future__ import annotations

import torch
from torch import Tensor

from fastvq import _env
from fastvq.backends import cpu as cpu_backend
from fastvq.backends.views import address

__all__ = ["lookup_isa", "packed_address", "packing_isa"]

# Where no instruction set is named, a trial decides whether a lookup runs on tiles (csrc/cpu/lookup/driver.cpp).
TRIED_ROWS = 256
TRIED_CODES = 1024
MOST_OPEN = 0.5  # tiles are used if bfloat16 leaves at most this share of the rows with more than one code
FEW_ROWS = 8192  # a head with fewer rows is not worth a trial
LEAST_DIM = 32  # tiles are made for rows of at least this width


def _tiles_by_choice() -> bool:
    """Whether the best instruction set has matrix tiles, and nobody asked for it."""
    return cpu_backend.ISAS_HERE[-1] == "amx" and _env.read("FASTVQ_CPU_ISA") is None


def packing_isa() -> int:
    """The instruction set that a codebook is laid out for, before any vectors are known."""
    return cpu_backend.ISAS[cpu_backend.ISAS_HERE[-2]] if _tiles_by_choice() else cpu_backend.isa()


def lookup_isa(rows: tuple[int, ...], codes: tuple[int, ...], metric: int, fast: bool, packed: bool = False) -> int:
    """The instruction set to look ``rows`` up with; the views are those of ``rows_view`` and ``codes_view``.

    packed: the codebook is packed already, for ``packing_isa()``.

    Tiles are the fastest where vectors spread in all directions. Where they share most of their length with their
    neighbours, as patches of photographs do, bfloat16 leaves most rows with several codes, and 16-bit integers are
    faster. So a few rows of the first head, evenly spread, are tried against a few of its codes. Exact indices are the
    same either way; ``fast`` ones are not, and must not depend on what else is in the call, so nothing is tried.
    """
    data, dtype, _, n_outer, n_inner, dim, _, stride_outer, stride_inner, stride_d = rows
    if not _tiles_by_choice():
        return cpu_backend.isa()
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
    open_rows = sum(
        cpu_backend._cpu.nearest(tried, few_codes, metric, False, address(indices), cpu_backend.ISAS["amx"], threads, 0)
    )
    return cpu_backend.isa() if open_rows <= MOST_OPEN * outer * inner else packing_isa()


def packed_address(packed: Tensor | None) -> int:
    """Where a packed codebook lies, 0 for none; ValueError where ``torch.ops.fastvq.pack_codebook`` did not make it."""
    if packed is None:
        return 0
    at = address(packed)
    whole = packed.dtype == torch.uint8 and packed.is_contiguous() and packed.is_cpu and packed.numel() >= 64
    if not whole or at % 64 or cpu_backend._cpu.recorded_bytes(at) != packed.numel():
        raise ValueError(
            f"fastvq: layout must be what torch.ops.fastvq.pack_codebook made of the codebook, got {packed.dtype} "
            f"{list(packed.shape)}; pack the codebook again"
        )
    return at
