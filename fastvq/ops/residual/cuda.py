"""Residual quantization by the CUDA C++ kernels: residuals stay in shared memory through all levels.

One launch does it (csrc/cuda/residual.cu) where x and the codebooks are float32 or narrower and a block of 32
residuals fits into shared memory: D to 768 on cards that give a block 227 KiB, to 384 where it is 163. Elsewhere a
lookup is launched for each level, and torch subtracts its codes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastvq.backends import cuda as cuda_backend
from fastvq.backends import views
from fastvq.backends.views import QuantizedRows, address
from fastvq.ops.nearest.cuda import nearest
from fastvq.ops.quantize.call import QuantizeBackwardCall
from fastvq.ops.quantize.common import gather
from fastvq.ops.quantize.cuda import quantize_backward
from fastvq.ops.residual.call import ResidualBackwardCall, ResidualCall
from fastvq.ops.residual.common import elements, residual_dtype, residuals, rows_with_codes
from fastvq.ops.statistics.cuda import code_statistics

__all__ = ["residual_quantize", "residual_quantize_backward"]


def residual_quantize(call: ResidualCall) -> tuple[Tensor, ...]:
    x, codebooks, mask, metric, _, beta, statistics, precision, _ = call
    n_levels, n_codes, dim = codebooks.shape
    levels = codebooks.to(residual_dtype(x, codebooks))
    view, rows = views.rows_view(x, None)
    codes = views.codes_view(levels)
    with cuda_backend.on_device_of(x):
        if cuda_backend._cuda.residual_fits(rows, codes):
            out = QuantizedRows(x, None)
            indices = torch.empty(*x.shape[:-1], n_levels, dtype=torch.int64, device=x.device)
            parts = cuda_backend._cuda.residual_parts(rows, codes)
            squares = torch.empty(n_levels, parts, dtype=torch.float64, device=x.device)
            real = None if mask is None else mask.contiguous()
            workspace = cuda_backend.workspace(x, cuda_backend._cuda.residual_workspace(codes))
            cuda_backend._cuda.residual_quantize(
                rows, codes, views.metric_code(metric), precision == "fast", 0 if real is None else address(real),
                views.rows_of(out.rows), address(indices), address(squares), address(workspace),
                cuda_backend.stream(x),
            )  # fmt: skip
            quantized, square = out.tensor(), squares.sum(1)
        else:
            quantized, indices, square = _level_by_level(x, levels, mask, metric, precision)
        sums = levels.new_empty((n_levels, n_codes, dim) if statistics else (0,))
        counts = indices.new_empty((n_levels, n_codes) if statistics else (0,))
        if statistics:
            for q, residual in enumerate(residuals(x, levels, indices)):
                sums[q], counts[q] = code_statistics(residual, indices[..., q], n_codes, None)
    del view  # it had to live until here
    mean = square / elements(indices[..., 0].numel() if mask is None else mask, dim)
    loss = torch.float64 if x.dtype == torch.float64 else torch.float32
    return quantized, (beta * mean).to(loss), mean.to(loss), indices, sums, counts


def _level_by_level(
    x: Tensor,  # [..., D]
    levels: Tensor,  # [Q, K, D] float32 or float64
    mask: Tensor | None,  # [...] bool
    metric: str,
    precision: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """(quantized, indices, [Q] sums of squares) with a launch a level."""
    residual = x.to(levels.dtype)
    total, indices, squares = torch.zeros_like(residual), [], []
    for codes in levels:
        found = nearest(residual, codes, metric, precision)
        chosen = gather(codes, found)
        gap = residual.double() - chosen.double()
        gap = torch.where(residual.isinf(), torch.nan, gap)  # infinity stands for no distance at all, as NaN does
        if mask is not None:
            found = torch.where(mask, found, -1)
            chosen, gap = (torch.where(mask[..., None], t, 0) for t in (chosen, gap))
        indices.append(found)
        squares.append(gap.square().sum())
        total, residual = total + chosen, residual - chosen
    return torch.empty_like(x).copy_(total), torch.stack(indices, dim=-1), torch.stack(squares)


def residual_quantize_backward(call: ResidualBackwardCall) -> tuple[Tensor, Tensor]:
    x, codebooks, indices, grad_quantized, grad_commitment, grad_codebook, estimator, beta, *_ = call
    levels = codebooks.to(residual_dtype(x, codebooks))
    real, indices = rows_with_codes(indices, codebooks.shape[1])
    indices = indices.contiguous()
    scale = 2 / elements(real, x.shape[-1])
    grad_x, grad_codebooks = x.new_empty(0), codebooks.new_empty(0)
    with cuda_backend.on_device_of(x):
        if call.need_x:
            weights = None if grad_commitment is None else (grad_commitment * (beta * scale)).to(levels.dtype)
            g = None if estimator == "none" else grad_quantized
            grad_x = _pull(x, levels, indices, weights, g, estimator == "rotation", real)
        if call.need_codebooks:
            grad_codebooks = torch.zeros_like(codebooks)
        if call.need_codebooks and grad_codebook is not None:
            # The sum of (c_k - r) over the residuals that chose k, from their count and sum.
            for q, residual in enumerate(residuals(x, levels, indices)):
                sums, counts = code_statistics(
                    residual, indices[..., q], levels.shape[1], None, sums_dtype=torch.float64
                )
                pull = torch.where(counts[:, None] > 0, counts[:, None] * levels[q].double() - sums, 0)
                grad_codebooks[q] = pull * (grad_codebook[q].double() * scale)
    return grad_x, grad_codebooks


def _pull(
    x: Tensor,  # [..., D]
    levels: Tensor,  # [Q, K, D] float32 or float64
    indices: Tensor,  # [..., Q], -1 where masked
    weights: Tensor | None,  # [Q], as levels
    g: Tensor | None,  # as x
    rotation: bool,
    real: Tensor,  # [...] bool
) -> Tensor:  # as x
    """The estimator's gradient and the weighted residuals."""
    turned = g if rotation else None
    out = QuantizedRows(x if turned is None else x.to(levels.dtype), None)
    total = None if turned is None else levels.new_empty(x.shape)
    view, rows = views.rows_view(x, None)
    incoming, straight = (None, None) if rotation or g is None else views.rows_view(g, None)
    cuda_backend._cuda.residual_backward(
        rows, views.codes_view(levels), address(indices), 0 if weights is None else address(weights), straight,
        views.rows_of(out.rows), 0 if total is None else address(total), cuda_backend.stream(x),
    )  # fmt: skip
    del view, incoming  # they had to live until here
    if turned is None or total is None:
        return out.tensor()
    own_code = torch.where(real, torch.arange(real.numel(), device=x.device).view(real.shape), -1)
    codes, turned = total.view(-1, x.shape[-1]), turned.to(levels.dtype)
    rotation_alone = (None, None, "rotation", 1.0, True, False, None)
    turned, _ = quantize_backward(QuantizeBackwardCall(x.to(levels.dtype), codes, own_code, turned, *rotation_alone))
    return torch.empty_like(x).copy_(torch.where(real[..., None], out.tensor() + turned, 0))
