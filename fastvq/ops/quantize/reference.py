"""The definition of quantization with its losses and gradients, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from fastvq.ops.nearest import reference

__all__ = ["codes_of", "quantize", "quantize_backward", "rotate_back"]

# |x^ + c^| of opposite unit vectors is rounding noise, about 1e-7 in float32. Below this r is noise too.
DEGENERATE = 1e-6


def codes_of(
    codebook: Tensor,  # [K, D] or [H, K, D]
    indices: Tensor,  # [...] or [H, ...]
) -> Tensor:  # [..., D] or [H, ..., D]
    """The code of every index; code 0 for an index that is no code."""
    heads = codebook if codebook.dim() == 3 else codebook[None]
    n_codes, dim = codebook.shape[-2:]
    is_code = (indices >= 0) & (indices < n_codes)
    flat = torch.where(is_code, indices, 0).reshape(heads.shape[0], indices.numel() // heads.shape[0], 1)
    return heads.gather(1, flat.expand(-1, -1, dim)).reshape(*indices.shape, dim)


def quantize(
    x: Tensor,  # [..., D] or [H, ..., D]
    codebook: Tensor,  # [K, D] or [H, K, D]
    mask: Tensor | None,  # [...] or [H, ...] bool
    metric: str,
    beta: float,
    precision: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(quantized, commitment_loss, codebook_loss, indices) of ``fastvq.ops.quantize``, sums in float64."""
    indices = reference.nearest(x, codebook, metric, precision)
    real = torch.ones_like(indices, dtype=torch.bool) if mask is None else mask
    codes = codes_of(codebook, indices)
    quantized = torch.empty_like(x).copy_(torch.where(real[..., None], codes, 0))
    difference = torch.where(real[..., None], x.double() - codes.double(), 0)
    difference = torch.where(real[..., None] & x.isinf(), torch.nan, difference)  # no distance at all, as of NaN
    elements = max(1, int(real.sum()) * x.shape[-1])
    mean = (difference * difference).sum() / elements
    loss_dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    indices = torch.where(real, indices, -1)
    return quantized, (beta * mean).to(loss_dtype), mean.to(loss_dtype), indices


def rotate_back(
    g: Tensor,  # [N, D], gradient at the code
    x: Tensor,  # [N, D]
    c: Tensor,  # [N, D], the code of each vector
) -> Tensor:  # [N, D], gradient at x
    """lambda R^T g for the rescaled rotation lambda R taking x to c in their plane, held constant (Fifty et al. 2024).

    lambda = |c|/|x|, R = I - 2 r r^T + 2 c^ x^^T with unit vectors x^, c^ and r = (x^ + c^)/|x^ + c^|. Where x or c is
    zero, or they point in opposite directions, there is no such rotation: g itself (straight-through).
    """
    norm_x, norm_c = x.norm(dim=-1, keepdim=True), c.norm(dim=-1, keepdim=True)
    unit_x, unit_c = x / norm_x, c / norm_c
    r = unit_x + unit_c
    norm_r = r.norm(dim=-1, keepdim=True)
    defined = (norm_x > 0) & (norm_c > 0) & (norm_r > DEGENERATE)
    r = r / norm_r
    rotated = g - 2 * r * (r * g).sum(-1, keepdim=True) + 2 * unit_x * (unit_c * g).sum(-1, keepdim=True)
    return torch.where(defined | ~x.isfinite().all(-1, keepdim=True), norm_c / norm_x * rotated, g)


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
    """Gradients to x and to the codebook; an empty tensor for one that is not needed.

    A vector that holds NaN or infinity gets a NaN gradient and gives the codebook none.
    """
    indices = torch.where(indices < codebook.shape[-2], indices, -1)  # no code is there to read
    real = (indices >= 0)[..., None]
    wide = x.double()
    codes = codes_of(codebook, indices).double()
    scale = 2 / max(1, int(real.sum()) * x.shape[-1])
    grad_x, grad_codebook = x.new_empty(0), codebook.new_empty(0)
    if need_x:
        total = torch.zeros_like(wide)
        if grad_quantized is not None and estimator != "none":
            g = grad_quantized.double()
            total = total + (rotate_back(g, wide, codes) if estimator == "rotation" else g)
        if grad_commitment is not None:
            total = total + grad_commitment.double() * beta * scale * (wide - codes)
        grad_x = torch.empty_like(x).copy_(torch.where(real, total, 0))
    if need_codebook:
        total = torch.zeros_like(codebook, dtype=torch.float64)
        if grad_codebook_loss is not None:
            pull = torch.where(real & x.isfinite().all(-1, keepdim=True), codes - wide, 0)
            heads = zip(total, indices, pull, strict=True) if codebook.dim() == 3 else [(total, indices, pull)]
            for out, i, p in heads:
                out.index_add_(0, i.clamp(min=0).reshape(-1), p.reshape(-1, x.shape[-1]))
            total *= grad_codebook_loss.double() * scale
        grad_codebook = torch.empty_like(codebook).copy_(total)
    return grad_x, grad_codebook
