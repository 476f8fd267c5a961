"""The definition of the nearest code, in plain torch."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["nearest", "scores"]

# Scores held at once, in elements: the N x K matrix is never whole.
TILE = 1 << 20


def scores(
    x: Tensor,  # [N, D] float64
    codebook: Tensor,  # [K, D] float64
    metric: str,
) -> Tensor:  # [N, K] float64
    """d_k of the index contract: float64, d = 0 ... D-1 one after another, one accumulator, every operation rounded.

    A matrix product would sum in another order, and ties and near-ties would then fall differently.
    """
    accumulator = x.new_zeros(x.shape[0], codebook.shape[0])
    for d in range(x.shape[1]):
        if metric == "euclidean":
            t = x[:, d, None] - codebook[:, d]
            accumulator += t * t
        else:
            accumulator += x[:, d, None] * codebook[:, d]
    if metric == "euclidean":
        return accumulator
    if metric == "dot":
        return -accumulator
    norm = _norms(codebook)
    return torch.where(norm == 0, torch.inf, -accumulator / norm)


def _norms(
    codebook: Tensor,  # [K, D] float64
) -> Tensor:  # [K] float64
    square = codebook.new_zeros(codebook.shape[0])
    for d in range(codebook.shape[1]):
        square += codebook[:, d] * codebook[:, d]
    # math.sqrt rounds correctly; torch.sqrt need not (a vector library's may miss the last bit).
    return codebook.new_tensor([math.sqrt(s) for s in square.tolist()])


def _nearest_one_codebook(x: Tensor, codebook: Tensor, metric: str, precision: str) -> Tensor:
    # float64 holds every supported dtype exactly; "fast" allows what float32 gives.
    dtype = torch.float64 if precision == "exact" or x.dtype == torch.float64 else torch.float32
    code_is_finite = codebook.isfinite().all(dim=1)
    codes = codebook.to(dtype)
    indices = torch.empty(x.shape[0], dtype=torch.int64, device=x.device)
    order = torch.arange(codes.shape[0], device=x.device)
    for rows, out in zip(
        x.split(max(1, TILE // codes.shape[0])), indices.split(max(1, TILE // codes.shape[0])), strict=True
    ):
        d = scores(rows.to(dtype), codes, metric)
        # A code that is not finite, or whose distance overflows to nothing comparable, is never chosen.
        d = torch.where(code_is_finite & ~d.isnan(), d, torch.inf)
        # The lowest index among equals, spelled out: not every device's argmin promises it.
        tied = d == d.amin(dim=1, keepdim=True)
        first = torch.where(tied, order, codes.shape[0]).amin(dim=1)
        out.copy_(torch.where(rows.isfinite().all(dim=1), first, 0))
    return indices


def nearest(
    x: Tensor,  # [..., D] or [H, ..., D]
    codebook: Tensor,  # [K, D] or [H, K, D]
    metric: str,
    precision: str,
) -> Tensor:  # [...] or [H, ...] int64
    """index = lexicographic minimum over k of (d_k, k), with d_k in float64 and in the order of ``scores``.

    Codes that hold NaN or infinity are never chosen unless every code does; a row that does gets 0; where every d_k
    overflows, 0. Same arguments and result as ``fastvq.ops.nearest``.
    """
    if x.device.type == "mps":  # it has no float64
        return nearest(x.cpu(), codebook.cpu(), metric, precision).to(x.device)
    if codebook.dim() == 3:
        return torch.stack([nearest(a, c, metric, precision) for a, c in zip(x, codebook, strict=True)])
    flat = x.reshape(-1, x.shape[-1])
    return _nearest_one_codebook(flat, codebook, metric, precision).view(x.shape[:-1])
