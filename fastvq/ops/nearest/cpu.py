"""The nearest code by the C++ kernels: a filter pass, then near-ties scored in float64."""

from __future__ import annotations

import torch
from torch import Tensor

from fastvq._checks import check_codes, check_option
from fastvq.backends import cpu as cpu_backend
from fastvq.backends import views
from fastvq.backends.views import address
from fastvq.ops._library import register
from fastvq.ops.nearest import cpu_isa
from fastvq.ops.nearest.call import NearestCall

__all__ = ["nearest", "pack"]

PACK = "fastvq.ops.pack_codebook"


@cpu_backend.cpu_call
def nearest(call: NearestCall) -> Tensor:  # [...] or [H, ...] int64
    x, codebook, metric, precision, _, _, packed = call
    indices = torch.empty(x.shape[:-1], dtype=torch.int64, device="cpu")
    x, rows = views.rows_view(x, codebook.shape[0] if codebook.dim() == 3 else None)
    codes, metric_code, fast = views.codes_view(codebook), views.metric_code(metric), precision == "fast"
    isa = cpu_isa.lookup_isa(rows, codes, metric_code, fast, packed is not None)
    cpu_backend._cpu.nearest(
        rows, codes, metric_code, fast, address(indices), isa, torch.get_num_threads(),
        cpu_isa.packed_address(packed),
    )  # fmt: skip
    return indices


@cpu_backend.cpu_call
def pack(
    codebook: Tensor,  # [K, D] or [H, K, D]
    metric: str,
) -> Tensor:  # [bytes] uint8
    """The codebook as the kernels that will look vectors up in it read it."""
    check_codes(PACK, codebook)
    check_option(PACK, "metric", metric, views.METRICS)
    if codebook.device.type != "cpu":
        raise ValueError(f"{PACK}: codebook must be on the CPU, got {codebook.device}; the layout is for CPU kernels")
    view, isa = views.codes_view(codebook), cpu_isa.packing_isa()
    packed = torch.empty(cpu_backend._cpu.packed_bytes(view, isa), dtype=torch.uint8, device="cpu")
    cpu_backend._cpu.pack_codebook(view, views.metric_code(metric), isa, torch.get_num_threads(), address(packed))
    return packed


def _fake_pack(codebook: Tensor, metric: str) -> Tensor:
    heads, stride_head = (1, 0) if codebook.dim() == 2 else (codebook.shape[0], codebook.stride(0))
    sizes = (0, 0, heads, *codebook.shape[-2:], stride_head, *codebook.stride()[-2:])  # their number of bytes is exact
    return codebook.new_empty(cpu_backend._cpu.packed_bytes(sizes, cpu_isa.packing_isa()), dtype=torch.uint8)


register("pack_codebook(Tensor codebook, str metric) -> Tensor", pack, _fake_pack)
