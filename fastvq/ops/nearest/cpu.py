"""The nearest code by the C++ kernels: a filter pass, then near-ties scored in float64."""

from __future__ import annotations

import torch
from torch import Tensor

from fastvq import _native
from fastvq._checks import check_codes, check_option
from fastvq._native import address
from fastvq.ops._library import register

__all__ = ["nearest", "pack"]

PACK = "fastvq.ops.pack_codebook"


@_native.cpu_call
def nearest(
    x: Tensor,  # [..., D] or [H, ..., D]
    codebook: Tensor,  # [K, D] or [H, K, D]
    metric: str,
    precision: str,
    layout: Tensor | None = None,  # what pack made of the codebook
) -> Tensor:  # [...] or [H, ...] int64
    indices = torch.empty(x.shape[:-1], dtype=torch.int64, device="cpu")
    x, rows = _native.rows_view(x, codebook.shape[0] if codebook.dim() == 3 else None)
    codes, metric_code, fast = _native.codes_view(codebook), _native.metric_code(metric), precision == "fast"
    isa = _native.lookup_isa(rows, codes, metric_code, fast, layout is not None)
    _native._cpu.nearest(
        rows, codes, metric_code, fast, address(indices), isa, torch.get_num_threads(),
        _native.layout_address(layout),
    )  # fmt: skip
    return indices


@_native.cpu_call
def pack(
    codebook: Tensor,  # [K, D] or [H, K, D]
    metric: str,
) -> Tensor:  # [bytes] uint8
    """The codebook as the kernels that will look vectors up in it read it."""
    check_codes(PACK, codebook)
    check_option(PACK, "metric", metric, _native.METRICS)
    if codebook.device.type != "cpu":
        raise ValueError(f"{PACK}: codebook must be on the CPU, got {codebook.device}; the layout is for CPU kernels")
    view, isa = _native.codes_view(codebook), _native.packing_isa()
    layout = torch.empty(_native._cpu.packed_bytes(view, isa), dtype=torch.uint8, device="cpu")
    _native._cpu.pack_codebook(view, _native.metric_code(metric), isa, torch.get_num_threads(), address(layout))
    return layout


def _fake_pack(codebook: Tensor, metric: str) -> Tensor:
    heads, stride_head = (1, 0) if codebook.dim() == 2 else (codebook.shape[0], codebook.stride(0))
    sizes = (0, 0, heads, *codebook.shape[-2:], stride_head, *codebook.stride()[-2:])  # their number of bytes is exact
    return codebook.new_empty(_native._cpu.packed_bytes(sizes, _native.packing_isa()), dtype=torch.uint8)


register("pack_codebook(Tensor codebook, str metric) -> Tensor", pack, _fake_pack)
