"""The definition of residual quantization with its losses and gradients, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from fastvq.ops.quantize import reference as one_level
from fastvq.ops.statistics import reference as sums_by_code

__all__ = ["residual_quantize", "residual_quantize_backward"]


def _residual_dtype(x: Tensor, codebooks: Tensor) -> torch.dtype:
    """float64 where one of them is float64, else float32."""
    return torch.promote_types(torch.promote_types(x.dtype, codebooks.dtype), torch.float32)


def residual_quantize(
    x: Tensor,  # [..., D]
    codebooks: Tensor,  # [Q, K, D]
    mask: Tensor | None,  # [...] bool
    metric: str,
    beta: float,
    statistics: bool,
    precision: str,
) -> tuple[Tensor, ...]:
    """(quantized, commitment_losses, codebook_losses, indices, sums, counts) of ``fastvq.ops.residual_quantize``."""
    dtype = _residual_dtype(x, codebooks)
    residual, codes = x.to(dtype), codebooks.to(dtype)
    quantized, levels = torch.zeros_like(residual), []
    for level in codes:
        q, commitment, codebook_loss, indices = one_level.quantize(residual, level, mask, metric, beta, precision)
        found = sums_by_code.code_statistics(residual, indices, level.shape[0], None) if statistics else None
        levels.append((indices, commitment, codebook_loss, found))
        quantized = quantized + q
        residual = residual - q
    n_levels, n_codes, dim = codebooks.shape
    sums = residual.new_empty((n_levels, n_codes, dim) if statistics else (0,))
    counts = residual.new_empty((n_levels, n_codes) if statistics else (0,), dtype=torch.int64)
    for i, (*_, found) in enumerate(levels):
        if found is not None:
            sums[i], counts[i] = found
    loss = torch.float64 if x.dtype == torch.float64 else torch.float32
    return (
        torch.empty_like(x).copy_(quantized),
        torch.stack([c for _, c, *_ in levels]).to(loss),
        torch.stack([c for _, _, c, _ in levels]).to(loss),
        torch.stack([i for i, *_ in levels], dim=-1),
        sums,
        counts,
    )


def residual_quantize_backward(
    x: Tensor,  # [..., D]
    codebooks: Tensor,  # [Q, K, D]
    indices: Tensor,  # [..., Q], -1 where masked
    grad_quantized: Tensor | None,  # as x
    grad_commitment: Tensor | None,  # [Q]
    grad_codebook: Tensor | None,  # [Q]
    estimator: str,
    beta: float,
    need_x: bool,
    need_codebooks: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients to x and to the codebooks; an empty tensor for one that is not needed.

    x: the estimator's gradient for x and the sum of its codes, plus beta * 2 (r_q - c_q) / (n D) for each level, r_q
    being x less constants. Codebook q: 2 (c_q - r_q) / (n D) summed over the vectors that chose the code.
    """
    dtype = _residual_dtype(x, codebooks)
    residual = x.to(dtype)
    # A row has codes on every level, or it counts as masked.
    real = ((indices >= 0) & (indices < codebooks.shape[1])).all(dim=-1)
    indices = indices.masked_fill(~real[..., None], -1)
    scale = 2 / max(1, int(real.sum()) * x.shape[-1])
    grad_x = torch.zeros_like(residual)
    grad_codebooks = torch.zeros_like(codebooks, dtype=torch.float64)
    total = torch.zeros_like(residual)
    for q, codes in enumerate(codebooks.to(dtype)):
        chosen = one_level.codes_of(codes, indices[..., q])
        if need_codebooks and grad_codebook is not None:
            sums, counts = sums_by_code.code_statistics(residual.double(), indices[..., q], codes.shape[0], None)
            pull = torch.where(counts[:, None] > 0, counts[:, None] * codes.double() - sums, 0)
            grad_codebooks[q] = pull * grad_codebook[q].double() * scale
        total = total + chosen
        residual = residual - chosen
        if need_x and grad_commitment is not None:
            grad_x.addcmul_(residual, (grad_commitment[q] * (beta * scale)).to(dtype))
    if need_x and grad_quantized is not None and estimator != "none":
        g = grad_quantized.to(dtype)
        if estimator == "rotation":  # in float64: squares of small float32 vectors lie below the type's range
            g = one_level.rotate_back(g.double(), x.double(), total.double()).to(dtype)
        grad_x = grad_x + g
    return (
        torch.empty_like(x).copy_(torch.where(real[..., None], grad_x, 0)) if need_x else x.new_empty(0),
        torch.empty_like(codebooks).copy_(grad_codebooks) if need_codebooks else codebooks.new_empty(0),
    )
