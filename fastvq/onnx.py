"""Modules as ONNX graphs of standard operators: decompositions of fastvq's ops, for ``torch.onnx.export``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastvq.ops.quantize.common import gather

__all__ = ["decompositions"]


def decompositions() -> dict[Any, Callable[..., Any]]:
    """A table for ``ExportedProgram.run_decompositions``: torch's own, and the lookups of fastvq in plain operators.

    The lookup is the definition itself, spelled out: float64, d = 0 ... D-1 one after another, each product and each
    sum an operator. A runtime that rounds every operator to float64, as IEEE 754 and the ONNX standard have it, returns
    the indices of ``fastvq.ops.nearest``, ties included. The graph has about four operators for each of the D columns
    and holds N x K float64 scores, so it is for small calls and for other runtimes, not for speed.

    Covered: ``nearest``, ``quantize`` and ``residual_quantize``, so ``VectorQuantizer``, ``GroupedVQ``, ``ResidualVQ``
    and the models' ``encode`` and ``decode``, in eval. ``precision="fast"`` becomes exact, and ``check_finite`` is not
    read.

    Example:
        >>> program = torch.export.export(module.eval(), (x,))
        >>> program = program.run_decompositions(fastvq.onnx.decompositions())
        >>> torch.onnx.export(program, (x,), "module.onnx", dynamo=True)
    """
    ops = torch.ops.fastvq
    return {
        **torch.export.default_decompositions(),
        ops.nearest.default: _nearest,
        ops.quantize.default: _quantize,
        ops.residual_quantize.default: _residual_quantize,
    }


def _finite(rows: Tensor) -> Tensor:
    """Which rows [..., D] hold no NaN and no infinity: zero times either is NaN, which a sum keeps."""
    return (rows * 0).sum(dim=-1) == 0


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """The sum over the last dimension in the order of the index contract."""
    total = a[..., 0] * b[..., 0]
    for d in range(1, a.shape[-1]):
        total = total + a[..., d] * b[..., d]
    return total


def _nearest(
    x: Tensor,  # [..., D], or [H, ..., D] with heads
    codebook: Tensor,  # [K, D], or [H, K, D]
    metric: str,
    precision: str,
    check_finite: bool,
    backend: str | None,
    layout: Tensor | None = None,
) -> Tensor:
    if codebook.dim() == 3:
        heads = zip(x.unbind(0), codebook.unbind(0), strict=True)
        return torch.stack([_nearest(a, c, metric, precision, check_finite, backend) for a, c in heads])
    rows, codes = x.double().unsqueeze(-2), codebook.double()
    if metric == "euclidean":
        gap = rows[..., 0] - codes[:, 0]
        d_k = gap * gap
        for d in range(1, codes.shape[1]):
            gap = rows[..., d] - codes[:, d]
            d_k = d_k + gap * gap
    else:
        d_k = -_dot(rows, codes)
    if metric == "cosine":
        norm = _dot(codes, codes).sqrt()
        d_k = torch.where(norm == 0, torch.inf, d_k / norm)
    d_k = torch.where(_finite(codes) & (d_k == d_k), d_k, torch.inf)
    tied = d_k == d_k.amin(dim=-1, keepdim=True)
    order = torch.arange(codes.shape[0], device=x.device)
    first = torch.where(tied, order, codes.shape[0]).amin(dim=-1)
    return torch.where(_finite(x.double()), first, 0)


def _quantize(
    x: Tensor,
    codebook: Tensor,
    mask: Tensor | None,
    metric: str,
    estimator: str,
    beta: float,
    precision: str,
    backend: str | None,
    layout: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    indices = _nearest(x, codebook, metric, precision, False, backend)
    codes = gather(codebook, indices)
    gap = x.double() - codes.double()
    loss = torch.float64 if x.dtype == torch.float64 else torch.float32
    if mask is None:
        n_real = float(x.shape[-1]) * torch.ones_like(indices, dtype=torch.float64).sum()
    else:
        codes, gap = torch.where(mask[..., None], codes, 0), torch.where(mask[..., None], gap, 0)
        indices = torch.where(mask, indices, -1)
        n_real = float(x.shape[-1]) * mask.double().sum()
    mean = (gap * gap).sum() / n_real.clamp(min=1)
    return codes.to(x.dtype), (beta * mean).to(loss), mean.to(loss), indices


def _residual_quantize(
    x: Tensor,
    codebooks: Tensor,
    mask: Tensor | None,
    metric: str,
    estimator: str,
    beta: float,
    statistics: bool,
    precision: str,
    backend: str | None,
) -> tuple[Tensor, ...]:
    if statistics:
        raise ValueError("fastvq.onnx: the module must be in eval mode, a graph for ONNX does not learn; call eval()")
    dtype = torch.float64 if torch.float64 in (x.dtype, codebooks.dtype) else torch.float32
    residual, levels = x.to(dtype), []
    total = torch.zeros_like(residual)
    for codes in codebooks.to(dtype).unbind(0):
        q, *rest = _quantize(residual, codes, mask, metric, estimator, beta, precision, backend)
        levels.append(rest)
        total, residual = total + q, residual - q
    loss = torch.float64 if x.dtype == torch.float64 else torch.float32
    commitment, pull, indices = zip(*levels, strict=True)
    return (
        total.to(x.dtype),
        torch.stack(commitment).to(loss),
        torch.stack(pull).to(loss),
        torch.stack(indices, dim=-1),
        x.new_empty((0,), dtype=dtype),
        x.new_empty((0,), dtype=torch.int64),
    )
