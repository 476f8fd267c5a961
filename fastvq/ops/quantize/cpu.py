"""Quantization by the C++ kernels: each block of rows is looked up, gathered and measured while it is in cache."""

from __future__ import annotations

import torch
from torch import Tensor

from fastvq.backends import cpu as cpu_backend
from fastvq.backends import views
from fastvq.backends.views import QuantizedRows, address
from fastvq.ops._contract import count_real
from fastvq.ops.nearest import cpu_isa
from fastvq.ops.quantize.call import QuantizeBackwardCall, QuantizeCall
from fastvq.ops.statistics.cpu import code_statistics

__all__ = ["BACKWARD_OP", "quantize", "quantize_backward"]

BACKWARD_OP = "fastvq.ops.quantize_backward"


def _heads(codebook: Tensor) -> int | None:
    return codebook.shape[0] if codebook.dim() == 3 else None


@cpu_backend.cpu_call
def quantize(
    call: QuantizeCall,
    statistics: tuple[Tensor, Tensor] | None = None,  # sums and counts to fill with those of ``code_statistics``
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x, codebook, mask, metric, _, beta, precision, _, packed = call
    heads = _heads(codebook)
    indices = torch.empty(x.shape[:-1], dtype=torch.int64, device="cpu")
    quantized = QuantizedRows(x, heads)
    x, rows = views.rows_view(x, heads)
    mask = None if mask is None else mask.contiguous()
    codes, metric_code, fast = views.codes_view(codebook), views.metric_code(metric), precision == "fast"
    isa = cpu_isa.lookup_isa(rows, codes, metric_code, fast, packed is not None)
    square, n_rows = cpu_backend._cpu.quantize_forward(
        rows, codes, metric_code, fast,
        0 if mask is None else address(mask), views.rows_of(quantized.rows), address(indices), isa,
        torch.get_num_threads(), cpu_isa.packed_address(packed),
        None if statistics is None else views.statistics_view(*statistics),
    )  # fmt: skip
    mean = square / (n_rows * x.shape[-1]) if n_rows else 0.0
    loss = torch.float64 if x.dtype == torch.float64 else torch.float32
    commitment_loss, codebook_loss = (torch.tensor(v, dtype=loss, device="cpu") for v in (beta * mean, mean))
    return quantized.tensor(), commitment_loss, codebook_loss, indices


@cpu_backend.cpu_call
def quantize_backward(call: QuantizeBackwardCall) -> tuple[Tensor, Tensor]:
    x, codebook, indices, grad_quantized, grad_commitment, grad_codebook_loss, estimator, beta, *_ = call
    grad_x, grad_codebook = x.new_empty(0), codebook.new_empty(0)
    indices = indices.contiguous()
    scale = 2 / max(1, count_real(BACKWARD_OP, indices, codebook.shape[-2]) * x.shape[-1])
    if call.need_x:
        heads = _heads(codebook)
        out = QuantizedRows(x, heads)
        incoming, g = (None, None) if grad_quantized is None else views.rows_view(grad_quantized, heads)
        kept, rows = views.rows_view(x, heads)
        cpu_backend._cpu.quantize_backward(
            rows, views.codes_view(codebook), address(indices), None if estimator == "none" else g,
            0.0 if grad_commitment is None else grad_commitment.item() * beta * scale,
            estimator == "rotation", views.rows_of(out.rows), cpu_backend.isa(), torch.get_num_threads(),
        )  # fmt: skip
        del kept, incoming  # they had to live until here
        grad_x = out.tensor()
    if call.need_codebook:
        grad_codebook = torch.zeros_like(codebook)
        if grad_codebook_loss is not None:
            # The sum of (c_k - x) over the vectors that chose k, from their count and sum.
            sums, counts = code_statistics(x, indices, codebook.shape[-2], _heads(codebook), sums_dtype=torch.float64)
            total = counts[..., None] * codebook.double() - sums
            used = (counts > 0)[..., None]  # a code that is not finite is not used, and zero times it is not zero
            grad_codebook.copy_(torch.where(used, total * (grad_codebook_loss.double() * scale), 0))
    return grad_x, grad_codebook
