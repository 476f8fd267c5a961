"""Quantization and its gradients by the CUDA C++ kernels; a training step's statistics ride along where asked for."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastvq.backends import cuda as cuda_backend
from fastvq.backends import views
from fastvq.backends.golden import calls as golden_calls
from fastvq.backends.golden import gate
from fastvq.backends.views import Output, address
from fastvq.ops.quantize import reference
from fastvq.ops.statistics import CODE_STATISTICS
from fastvq.ops.statistics.call import StatisticsCall
from fastvq.ops.statistics.cuda import code_statistics

__all__ = ["forward", "quantize", "quantize_backward", "why_backward_unsupported"]


def _heads(codebook: Tensor) -> int | None:
    return codebook.shape[0] if codebook.dim() == 3 else None


def why_backward_unsupported(x: Tensor, codebook: Tensor, indices: Tensor, *_: Any) -> str | None:
    statistics = StatisticsCall(x, indices, codebook.shape[-2], _heads(codebook), True, None)
    return CODE_STATISTICS.why_unsupported("cuda", statistics) or gate.check_op(
        "cuda", "quantize_backward", x.device, quantize_backward, reference.quantize_backward,
        golden_calls.quantize_backward,
    )  # fmt: skip


def quantize(
    x: Tensor,  # [..., D] or [H, ..., D]
    codebook: Tensor,  # [K, D] or [H, K, D]
    mask: Tensor | None,  # [...] or [H, ...] bool
    metric: str,
    beta: float,
    precision: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return forward(x, codebook, mask, metric, beta, precision, None, True)


def forward(
    x: Tensor,  # [..., D] or [H, ..., D]
    codebook: Tensor,  # [K, D] or [H, K, D]
    mask: Tensor | None,  # [...] or [H, ...] bool
    metric: str,
    beta: float,
    precision: str,
    statistics: tuple[Tensor, Tensor] | None,  # [K, D] and [K], or [H, K, D] and [H, K], to be written
    deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As ``quantize``; writes ``statistics``, as ``code_statistics`` returns them, where they are asked for."""
    heads = _heads(codebook)
    with cuda_backend.on_device_of(x):
        indices = torch.empty(x.shape[:-1], dtype=torch.int64, device=x.device)
        loss = torch.float64 if x.dtype == torch.float64 else torch.float32
        commitment_loss, codebook_loss = x.new_empty((), dtype=loss), x.new_empty((), dtype=loss)
        out = Output(x, heads)
        x, rows = views.rows_view(x, heads)
        codes = views.codes_view(codebook)
        mask = None if mask is None else mask.contiguous()
        n_bytes = cuda_backend._cuda.quantize_workspace(rows, codes, statistics is not None and deterministic)
        room = cuda_backend.workspace(x, n_bytes)
        sums, counts = (0, 0) if statistics is None else (address(t) for t in statistics)
        cuda_backend._cuda.quantize_forward(
            rows, codes,
            (views.metric_code(metric), precision == "fast", 0 if mask is None else address(mask), beta,
             deterministic),
            views.rows_of(out.rows),
            (address(indices), address(commitment_loss), address(codebook_loss), sums, counts),
            address(room), cuda_backend.stream(x),
        )  # fmt: skip
        return out.tensor(), commitment_loss, codebook_loss, indices


def quantize_backward(
    x: Tensor,  # [..., D] or [H, ..., D]
    codebook: Tensor,  # [K, D] or [H, K, D]
    indices: Tensor,  # [...] or [H, ...], -1 where masked
    grad_quantized: Tensor | None,  # as x
    grad_commitment: Tensor | None,  # []
    grad_codebook_loss: Tensor | None,  # []
    estimator: str,
    beta: float,
    need_x: bool,
    need_codebook: bool,
) -> tuple[Tensor, Tensor]:
    grad_x, grad_codebook = x.new_empty(0), codebook.new_empty(0)
    heads = _heads(codebook)
    with cuda_backend.on_device_of(x):
        indices = indices.contiguous()
        n_real = (indices >= 0).sum()
        codes = views.codes_view(codebook)
        if need_x:
            out = Output(x, heads)
            with_g = grad_quantized is not None and estimator != "none"
            incoming, g = (None, None) if grad_quantized is None else views.rows_view(grad_quantized, heads)
            kept, rows = views.rows_view(x, heads)
            cuda_backend._cuda.quantize_rows_gradient(
                rows, codes, address(indices), g if with_g else None, with_g and estimator == "rotation",
                _loss(grad_commitment, n_real, beta), views.rows_of(out.rows), cuda_backend.stream(x),
            )  # fmt: skip
            del kept, incoming  # they had to live until here
            grad_x = out.tensor()
        if need_codebook and grad_codebook_loss is None:
            grad_codebook = torch.zeros_like(codebook)
        elif need_codebook:
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
