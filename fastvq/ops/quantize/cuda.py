"""Quantization and its gradients by the CUDA C++ kernels; a training step's statistics ride along where asked for."""

from __future__ import annotations

import torch
from torch import Tensor

from fastvq.backends import cuda as cuda_backend
from fastvq.backends import views
from fastvq.backends.views import QuantizedRows, address
from fastvq.ops.quantize.call import QuantizeBackwardCall, QuantizeCall
from fastvq.ops.statistics.cuda import code_statistics

__all__ = ["forward", "quantize", "quantize_backward"]


def _heads(codebook: Tensor) -> int | None:
    return codebook.shape[0] if codebook.dim() == 3 else None


def quantize(call: QuantizeCall) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return forward(call, None, True)


def forward(
    call: QuantizeCall,
    statistics: tuple[Tensor, Tensor] | None,  # [K, D] and [K], or [H, K, D] and [H, K], to be written
    deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As ``quantize``; writes ``statistics``, as ``code_statistics`` returns them, where they are asked for."""
    x, codebook, mask, metric, _, beta, precision, *_ = call
    heads = _heads(codebook)
    with cuda_backend.on_device_of(x):
        indices = torch.empty(x.shape[:-1], dtype=torch.int64, device=x.device)
        loss = torch.float64 if x.dtype == torch.float64 else torch.float32
        commitment_loss, codebook_loss = x.new_empty((), dtype=loss), x.new_empty((), dtype=loss)
        out = QuantizedRows(x, heads)
        x, rows = views.rows_view(x, heads)
        codes = views.codes_view(codebook)
        mask = None if mask is None else mask.contiguous()
        n_bytes = cuda_backend._cuda.quantize_workspace(rows, codes, statistics is not None and deterministic)
        workspace = cuda_backend.workspace(x, n_bytes)
        sums, counts = (0, 0) if statistics is None else (address(t) for t in statistics)
        cuda_backend._cuda.quantize_forward(
            rows, codes,
            (views.metric_code(metric), precision == "fast", 0 if mask is None else address(mask), beta,
             deterministic),
            views.rows_of(out.rows),
            (address(indices), address(commitment_loss), address(codebook_loss), sums, counts),
            address(workspace), cuda_backend.stream(x),
        )  # fmt: skip
        return out.tensor(), commitment_loss, codebook_loss, indices


def quantize_backward(call: QuantizeBackwardCall) -> tuple[Tensor, Tensor]:
    x, codebook, indices, grad_quantized, grad_commitment, grad_codebook_loss, estimator, beta, *_ = call
    grad_x, grad_codebook = x.new_empty(0), codebook.new_empty(0)
    heads = _heads(codebook)
    with cuda_backend.on_device_of(x):
        indices = indices.contiguous()
        n_real = (indices >= 0).sum()
        codes = views.codes_view(codebook)
        if call.need_x:
            out = QuantizedRows(x, heads)
            with_g = grad_quantized is not None and estimator != "none"
            incoming, g = (None, None) if grad_quantized is None else views.rows_view(grad_quantized, heads)
            kept, rows = views.rows_view(x, heads)
            cuda_backend._cuda.quantize_rows_gradient(
                rows, codes, address(indices), g if with_g else None, with_g and estimator == "rotation",
                _loss(grad_commitment, n_real, beta), views.rows_of(out.rows), cuda_backend.stream(x),
            )  # fmt: skip
            del kept, incoming  # they had to live until here
            grad_x = out.tensor()
        if call.need_codebook and grad_codebook_loss is None:
            grad_codebook = torch.zeros_like(codebook)
        elif call.need_codebook:
            # The sum of (c_k - x) over the vectors that chose k, from their count and sum.
            sums, counts = code_statistics(x, indices, codebook.shape[-2], heads, sums_dtype=torch.float64)
            grad_codebook = torch.empty_like(codebook)
            cuda_backend._cuda.quantize_codes_gradient(
                codes, address(sums), address(counts), _loss(grad_codebook_loss, n_real, 1.0),
                views.codes_view(grad_codebook), cuda_backend.stream(x),
            )  # fmt: skip
    return grad_x, grad_codebook


def _loss(weight: Tensor | None, n_real: Tensor, factor: float) -> tuple[int, int, int, float]:
    """``LossWeight`` of csrc/fastvq_cuda.h."""
    if weight is None:
        return 0, 0, address(n_real), factor
    return address(weight), views.DTYPES[weight.dtype], address(n_real), factor
