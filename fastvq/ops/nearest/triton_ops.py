"""The nearest code by Triton kernels: packed operands, a filter on the tensor cores, the definition for the rest.

The launches of one call, none waiting for the host (a CUDA graph can hold them all):

1. ``_codebook_stats``, ``_pack_codes``: the codebook in 16 bits with its bias and error bound, once a
   call (triton_pack.py);
2. ``_pack_rows``: a slab of rows in 16 bits, small enough that the workspace does not grow with N (triton_rows.py);
3. ``_filter``, ``_certify``: every score, the winners that can be proved, lists of the other rows (triton_filter.py);
4. ``_collect_candidates``, ``_rescore_candidates``: the listed rows' candidates, and the best of them in float64;
5. ``_exhaustive``: rows out of the filter's range or with too many candidates, against every code in float64
   (triton_exact.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from fastvq.backends import triton as triton_backend
from fastvq.backends.tiles import pick
from fastvq.ops.nearest.triton_exact import _exhaustive, _rescore_candidates
from fastvq.ops.nearest.triton_filter import MAX_CANDIDATE_GROUPS, _certify, _collect_candidates, _filter
from fastvq.ops.nearest.triton_pack import COLUMNS, FIRST_DATA, _codebook_stats, _pack_codes, gamma
from fastvq.ops.nearest.triton_rows import _pack_rows
from fastvq.ops.nearest.triton_tiles import TILES

__all__ = ["PackedCodes", "nearest", "pack"]

METRICS = {"euclidean": 0, "cosine": 1, "dot": 2}
# A row tile stays on chip up to this width; wider rows are read in pieces of BD, again for every block of codes.
RESIDENT_WIDTH = 256
SPLIT_K = 8  # parts of the codes that work on the listed rows in parallel
PROGRAM_SCORES = 128  # rows x codes of a group that one program of _certify scores
COLLECT_TILE = {"BM": 64, "num_warps": 4}  # few rows are listed: half the tile wastes less
WIDE_COLLECT_TILE = {"BM": 64, "num_warps": 8, "num_stages": 2}  # rows in pieces take more registers
# Some Triton versions let ptxas cap registers for an occupancy this small launch cannot use, and spill one. Set the cap
# by hand.
MAX_REGISTERS = 128
ROWS_A_SLAB = 1 << 18
SLAB_ELEMENTS = 1 << 25  # most 16-bit elements of a slab's packed rows
MAX_FILTER_DIM = 1 << 14  # gamma grows with D, so the filter certifies fewer rows of wider vectors
MIN_FILTERED_SCORES = 1 << 12  # K * D up to which packing costs more than the exhaustive scan


class PackedCodes(NamedTuple):
    """A codebook with its packed operands; the shapes are those of triton_pack.py."""

    codebook: Tensor  # [H, K, D]
    metric: int
    is_bf16: bool  # bfloat16 operands, exact, rather than float16 ones
    centred: bool
    meta: Mapping[str, int]
    mean: Tensor
    info: Tensor
    flags: Tensor
    codes: Tensor
    columns: Tensor
    norms: Tensor
    factors: Tensor

    @property
    def narrow(self) -> bool:
        return self.codebook.shape[-1] <= COLUMNS.value - FIRST_DATA.value

    @property
    def width(self) -> int:  # D'
        return self.codes.shape[-1]


def _ceil(n: int, step: int) -> int:
    return (n + step - 1) // step * step


def _programs(device: torch.device) -> int:
    """Programs of a launch whose amount of work only the device knows: twice as many as are resident."""
    if device.type == "cuda" and torch.cuda.is_available():
        return 2 * torch.cuda.get_device_properties(device).multi_processor_count
    return 1


def _stride_h(t: Tensor) -> int:
    return t.stride(0) if t.shape[0] > 1 else 0  # one head: 0, so that the kernel is not compiled for another constant


def block_bits(n: int) -> int:
    """Bits that hold a block number, of ``n`` blocks."""
    return max(1, (n - 1).bit_length())


def _piece(width: int, dim: int, meta: Mapping[str, int]) -> int:
    """Elements that a packing kernel reads at a time. The interpreter's time grows with the number of steps alone."""
    if dim > RESIDENT_WIDTH:
        return meta["BD"]
    return width if triton_backend.interpreting() else min(width, 64)


def pack(codebook: Tensor, metric: int, is_bf16: bool, centred: bool, meta: Mapping[str, int]) -> PackedCodes:
    """Packs ``codebook`` [H, K, D] on its device."""
    n_heads, n_codes, dim = codebook.shape
    device, operand = codebook.device, torch.bfloat16 if is_bf16 else torch.float16
    narrow = dim <= COLUMNS.value - FIRST_DATA.value
    width = 16 if narrow else max(16, 1 << (dim - 1).bit_length()) if dim <= RESIDENT_WIDTH else _ceil(dim, meta["BD"])
    padded = _ceil(n_codes, meta["BN"])
    mean = torch.empty(n_heads, dim, dtype=torch.float32, device=device)
    info = torch.empty(n_heads, 2, dtype=torch.float32, device=device)
    flags = torch.empty(n_heads, 3, dtype=torch.int32, device=device)
    codes = torch.empty(n_heads, 0 if narrow else padded, width, dtype=operand, device=device)
    columns = torch.empty(n_heads, padded, COLUMNS.value, dtype=operand, device=device)
    norms, factors = torch.empty(2, n_heads, padded, dtype=torch.float32, device=device)
    strides = (_stride_h(codebook), *codebook.stride()[1:])
    _codebook_stats[(n_heads,)](
        codebook, *strides, n_codes, dim, mean, info, flags, METRIC=metric, CENTRE=centred, BD=8, num_warps=8,
        maxnreg=MAX_REGISTERS,
    )  # fmt: skip
    bk = meta["BN"] if triton_backend.interpreting() else 32
    _pack_codes[(padded // bk, n_heads)](
        codebook, *strides, n_codes, dim, mean, info, flags, codes, columns, norms, factors, padded,
        gamma(width + COLUMNS.value), METRIC=metric, IS_BF16=is_bf16, NARROW=narrow, DP=width, BK=bk,
        BD=_piece(width, dim, meta),
    )  # fmt: skip
    return PackedCodes(codebook, metric, is_bf16, centred, meta, mean, info, flags, codes, columns, norms, factors)


class PackedRows(NamedTuple):
    """A slab of rows as the filter takes them; the shapes are those of triton_rows.py."""

    rows: Tensor
    columns: Tensor
    norms: Tensor
    scales: Tensor


def pack_rows(x: Tensor, packed: PackedCodes) -> PackedRows:
    """Rounds ``x`` [H, n, D] for the filter against ``packed``."""
    n_heads, n, dim = x.shape
    width, narrow = packed.width, packed.narrow
    rows = x.new_empty(n_heads, 0 if narrow else n, width, dtype=packed.codes.dtype)
    columns = x.new_empty(n_heads, n, COLUMNS.value, dtype=packed.codes.dtype)
    norms, scales = x.new_empty(2, n_heads, n, dtype=torch.float32)
    shift = packed.centred and packed.metric == 0
    br = 256 if triton_backend.interpreting() else 16 if x.dtype == torch.float64 else 32  # wider ones spill
    _pack_rows[((n + br - 1) // br, n_heads)](
        x, _stride_h(x), *x.stride()[1:], n, dim, packed.mean, packed.info, packed.flags,
        rows, columns, norms, scales, n,
        METRIC=packed.metric, SHIFT=shift, SHIFTED_X=shift or x.dtype == torch.float64, IS_BF16=packed.is_bf16,
        NARROW=narrow,
        DP=width, BR=br, BD=_piece(width, dim, packed.meta),
    )  # fmt: skip
    return PackedRows(rows, columns, norms, scales)


def scan(x: Tensor, codebook: Tensor, metric: int, indices: Tensor) -> None:
    """Every row of ``x`` [H, n, D] against every code by the definition."""
    n_heads, n, dim = x.shape
    bm, bn = (256, 1024) if triton_backend.interpreting() else (16, 64)
    _exhaustive[((n + bm - 1) // bm, n_heads)](
        x, _stride_h(x), *x.stride()[1:], n, dim, codebook, _stride_h(codebook), *codebook.stride()[1:],
        codebook.shape[1], indices, _stride_h(indices), 0, indices, indices,
        METRIC=metric, LISTED=False, BM=bm, BN=bn, enable_fp_fusion=False,
    )  # fmt: skip


def lookup_slab(x: Tensor, packed: PackedCodes, fast: bool, indices: Tensor) -> Tensor:
    """Writes the indices [H, n] of a slab ``x`` [H, n, D]; returns [H, 2] int32: rows listed, rows scanned."""
    n_heads, n, dim = x.shape
    codebook, meta, metric = packed.codebook, packed.meta, packed.metric
    tile = {name: meta[name] for name in ("BM", "BN", "BD", "GROUP")}
    if dim <= RESIDENT_WIDTH:
        tile["BD"] = packed.width
    warps = {"num_warps": meta["num_warps"], "num_stages": meta["num_stages"]}
    common = {
        "INTERPRETED": triton_backend.interpreting(), "NARROW": packed.narrow, "RESIDENT": dim <= RESIDENT_WIDTH,
        "DP": packed.width, **tile, **warps,
    }  # fmt: skip
    n_blocks = packed.columns.shape[1] // meta["BN"]
    bits = block_bits(n_blocks)
    bm, chunk = 256, 64
    if not triton_backend.interpreting():  # a sector of a code at a time, in few registers
        bm, chunk = PROGRAM_SCORES // meta["GROUP"], max(8, 32 // codebook.element_size())
    sum_error = (dim / chunk + chunk + 14) * 2.0**-24 * (1 + 2.0**-6)
    rows = pack_rows(x, packed)
    counters = torch.zeros(n_heads, 2, dtype=torch.int32, device=x.device)
    groups, listed, pending, counts = torch.empty(4, n_heads, n, dtype=torch.int32, device=x.device)
    runners_up, thresholds = torch.empty(2, n_heads, n, dtype=torch.float32, device=x.device)
    x_strides, c_strides = (_stride_h(x), *x.stride()[1:]), (_stride_h(codebook), *codebook.stride()[1:])
    _filter[((n + meta["BM"] - 1) // meta["BM"], n_heads)](
        packed.codes, packed.columns, n_blocks, rows.rows, rows.columns, n, n, groups, runners_up, 2.0 ** (bits - 22),
        BITS=bits, **common,
    )  # fmt: skip
    lanes = meta["BN"] // meta["GROUP"]
    _certify[((n + bm - 1) // bm, n_heads)](
        x, *x_strides, n, dim, codebook, *c_strides, indices, _stride_h(indices),
        packed.mean, packed.info, packed.norms, packed.factors, packed.columns.shape[1], rows.norms, rows.scales, n,
        groups, runners_up, counters, listed, thresholds, pending, counts, sum_error,
        METRIC=metric, SHIFT_X=packed.centred and metric == 0, SHIFT_C=packed.centred, FAST=fast,
        GROUP=meta["GROUP"], LANES=lanes, BM=bm, CHUNK=chunk,
    )  # fmt: skip
    programs = (_programs(x.device), n_heads)
    if not fast:
        candidates = torch.empty(n_heads, n, MAX_CANDIDATE_GROUPS.value, dtype=torch.int32, device=x.device)
        _collect_candidates[programs](
            packed.codes, packed.columns, n_blocks, rows.rows, rows.columns, n, min(n_blocks, SPLIT_K),
            counters, listed, thresholds, candidates, counts,
            **common | (COLLECT_TILE if dim <= RESIDENT_WIDTH else WIDE_COLLECT_TILE),
        )  # fmt: skip
        _rescore_candidates[programs](
            x, *x_strides, dim, codebook, *c_strides, codebook.shape[1], indices, _stride_h(indices), n,
            counters, listed, candidates, counts, pending,
            METRIC=metric, GROUP=meta["GROUP"], LANES=lanes,
            BM=256 if triton_backend.interpreting() else 8, enable_fp_fusion=False,
        )  # fmt: skip
    bm, bn = (256, 1024) if triton_backend.interpreting() else (16, 64)
    _exhaustive[programs](
        x, *x_strides, n, dim, codebook, *c_strides, codebook.shape[1], indices, _stride_h(indices), n,
        counters, pending, METRIC=metric, LISTED=True, BM=bm, BN=bn, enable_fp_fusion=False,
    )  # fmt: skip
    return counters


def nearest(
    x: Tensor,  # [..., D] or [H, ..., D]
    codebook: Tensor,  # [K, D] or [H, K, D]
    metric: str,
    precision: str,
) -> Tensor:  # [...] or [H, ...] int64
    """Same arguments and result as ``fastvq.ops.nearest``, on CUDA tensors; no value is read on the host."""
    n_heads = codebook.shape[0] if codebook.dim() == 3 else 1
    codes = codebook.view(n_heads, *codebook.shape[-2:])
    rows = x.reshape(n_heads, -1, x.shape[-1])
    n, dim, code, fast = rows.shape[1], x.shape[-1], METRICS[metric], precision == "fast"
    indices = torch.empty(n_heads, n, dtype=torch.int64, device=x.device)
    shape = x.shape[:-1]
    if n == 0:
        return indices.view(shape)
    if codes.shape[1] * dim <= MIN_FILTERED_SCORES or dim > MAX_FILTER_DIM:
        scan(rows, codes, code, indices)
        return indices.view(shape)
    # 16-bit inputs of one dtype are exact operands already; subtracting a mean would make them inexact.
    is_bf16 = x.dtype == codebook.dtype == torch.bfloat16
    exact = is_bf16 or x.dtype == codebook.dtype == torch.float16
    centred = code != 1 and not exact

    def launch(meta: Mapping[str, int]) -> None:  # for tuning: a slab at most
        n_rows = min(n, ROWS_A_SLAB)
        lookup_slab(rows[:, :n_rows], pack(codes, code, is_bf16, centred, meta), fast, indices[:, :n_rows])

    operand = torch.bfloat16 if is_bf16 else torch.float16
    packed = pack(codes, code, is_bf16, centred, pick("nearest", TILES, x.device, dim, operand, launch))
    slab = max(packed.meta["BM"], min(ROWS_A_SLAB, SLAB_ELEMENTS // packed.width) // n_heads)
    for part, out in zip(rows.split(slab, dim=1), indices.split(slab, dim=1), strict=True):
        lookup_slab(part, packed, fast, out)
    return indices.view(shape)
