"""Residual quantization by the C++ kernels: a block of residuals stays in cache through all levels."""

from __future__ import annotations

import torch
from torch import Tensor

from fastvq.backends import cpu as cpu_backend
from fastvq.backends import views
from fastvq.backends.views import QuantizedRows, address
from fastvq.ops._contract import count_real
from fastvq.ops.nearest import cpu_isa
from fastvq.ops.quantize.common import gather
from fastvq.ops.residual.call import ResidualBackwardCall, ResidualCall
from fastvq.ops.residual.common import residual_dtype

__all__ = ["BACKWARD_OP", "residual_quantize", "residual_quantize_backward"]

BACKWARD_OP = "fastvq.ops.residual_quantize_backward"


@cpu_backend.cpu_call
def residual_quantize(call: ResidualCall) -> tuple[Tensor, ...]:
    x, codebooks, mask, metric, _, beta, statistics, precision, _ = call
    n_levels, n_codes, dim = codebooks.shape
    threads = torch.get_num_threads()
    quantized = QuantizedRows(x, None)
    indices = torch.empty(*x.shape[:-1], n_levels, dtype=torch.int64, device="cpu")
    squares = torch.empty(n_levels, dtype=torch.float64, device="cpu")
    finite_levels = torch.zeros(x.shape[:-1] if statistics else (0,), dtype=torch.int32, device="cpu")
    x, rows = views.rows_view(x, None)
    levels = views.codes_view(codebooks)
    mask = None if mask is None else mask.contiguous()
    metric_code, fast = views.metric_code(metric), precision == "fast"
    n_rows = cpu_backend._cpu.residual_quantize(
        rows, levels, metric_code, fast, 0 if mask is None else address(mask),
        views.rows_of(quantized.rows), address(indices), address(squares), address(finite_levels),
        cpu_isa.lookup_isa(rows, levels, metric_code, fast), threads,
    )  # fmt: skip
    dtype = residual_dtype(x, codebooks)
    sums = torch.empty((n_levels, n_codes, dim) if statistics else (0,), dtype=dtype, device="cpu")
    counts = torch.empty((n_levels, n_codes) if statistics else (0,), dtype=torch.int64, device="cpu")
    if statistics:
        codebooks = codebooks.to(dtype)
        cpu_backend._cpu.residual_statistics(
            rows, views.codes_view(codebooks), address(indices), address(finite_levels), address(sums),
            dtype == torch.float64, address(counts), threads,
        )  # fmt: skip
    mean = squares / max(1, n_rows * dim)
    loss = torch.float64 if x.dtype == torch.float64 else torch.float32
    return quantized.tensor(), (beta * mean).to(loss), mean.to(loss), indices, sums, counts


@cpu_backend.cpu_call
def residual_quantize_backward(call: ResidualBackwardCall) -> tuple[Tensor, Tensor]:
    x, codebooks, indices, grad_quantized, grad_commitment, grad_codebook, estimator, beta, *_ = call
    n_levels, dim = codebooks.shape[0], codebooks.shape[-1]
    indices = indices.contiguous()
    kept, rows = views.rows_view(x, None)
    wide = codebooks.to(residual_dtype(x, codebooks))
    levels, threads = views.codes_view(wide), torch.get_num_threads()
    scale = 2 / max(1, count_real(BACKWARD_OP, indices, codebooks.shape[1], n_levels) * dim)
    grad_x, grad_codebooks = x.new_empty(0), codebooks.new_empty(0)
    if call.need_x:
        out = QuantizedRows(x, None)
        scales = torch.zeros(n_levels, dtype=torch.float64, device="cpu")
        if grad_commitment is not None:
            scales.copy_(grad_commitment).mul_(beta * scale)
        incoming, g = None, None
        if grad_quantized is not None and estimator != "none":
            if estimator == "rotation" and x.numel() > 0:
                grad_quantized = _turn(x, codebooks, indices, grad_quantized)
            incoming, g = views.rows_view(grad_quantized, None)
        cpu_backend._cpu.residual_backward(
            rows, levels, address(indices), g, address(scales), views.rows_of(out.rows), threads
        )
        del incoming  # it had to live until here
        grad_x = out.tensor()
    if call.need_codebooks:
        grad_codebooks = torch.zeros_like(codebooks)
        if grad_codebook is not None:
            # The sum of (c_k - r) over the residuals that chose k, from their count and sum.
            sums = torch.empty(codebooks.shape, dtype=torch.float64, device="cpu")
            counts = indices.new_empty(codebooks.shape[:2])
            finite = torch.where(kept.isfinite().all(-1), n_levels, 0).to(torch.int32)
            cpu_backend._cpu.residual_statistics(
                rows, levels, address(indices), address(finite), address(sums), True, address(counts), threads
            )  # fmt: skip
            used = (counts > 0)[..., None]  # a code that is not finite is not used, and zero times it is not zero
            pull = (counts[..., None] * codebooks.double() - sums) * (grad_codebook.double() * scale)[:, None, None]
            grad_codebooks.copy_(torch.where(used, pull, 0))
    return grad_x, grad_codebooks


def _turn(
    x: Tensor,  # [..., D]
    codebooks: Tensor,  # [Q, K, D]
    indices: Tensor,  # [..., Q]
    g: Tensor,  # [..., D]
) -> Tensor:  # [..., D]
    """The rotation estimator's gradient for x and its sum of codes: by the kernel of one level, with one code a row."""
    if x.numel() == 0:
        return torch.empty_like(x)  # the kernel needs at least one code
    total = torch.zeros(x.shape, dtype=residual_dtype(x, codebooks), device="cpu")
    for level, i in zip(codebooks, indices.unbind(-1), strict=True):
        total += gather(level, i)
    total = total.view(-1, x.shape[-1])
    own = torch.where(indices[..., 0].reshape(-1) >= 0, torch.arange(total.shape[0], device="cpu"), -1)
    out = QuantizedRows(x, None)
    kept, rows = views.rows_view(x, None)
    incoming, gradient = views.rows_view(g, None)
    cpu_backend._cpu.quantize_backward(
        rows, views.codes_view(total), address(own), gradient, 0.0, True, views.rows_of(out.rows), cpu_backend.isa(),
        torch.get_num_threads(),
    )  # fmt: skip
    del kept, incoming  # they had to live until here
    return out.tensor()
