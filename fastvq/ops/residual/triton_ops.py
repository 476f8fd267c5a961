# mypy: disable-error-code="no-untyped-def, no-untyped-call, has-type"
"""Residual quantization on a GPU, level by level: the lookup's launches, then one that subtracts the codes.

Where a program can hold its rows' residual, all levels are one launch: triton_levels.py, which says where that is.

tensors                                                     N rows, D columns, K codes, Q levels
    residual, total  [N, D] float32 (float64 where x or the codebooks are)      codebooks  [Q, K, D] any float, strides
    found            [N]    int64, the lookup's                                 indices    [N, Q] int64
    squares          [Q, programs] float64

    1. ``nearest`` of the residual (fastvq/ops/nearest/triton_ops.py)
    2. ``_advance``, BM rows a program: residual -= code, total += code, the squares of the difference added in float64,
       one sum a program; torch adds the programs' sums in a fixed order
    3. backward, ``_pull``: one pass over the rows retraces all levels in registers

Memory: 4 D bytes a row read and 8 D written a level beyond the lookup. Deterministic; nothing waits for the host.
Statistics are launches of their own, on residuals formed again from the indices where one launch found those.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastvq.backends import triton as triton_backend
from fastvq.ops.nearest.triton_ops import nearest
from fastvq.ops.quantize.call import QuantizeBackwardCall
from fastvq.ops.quantize.triton_backward import quantize_backward
from fastvq.ops.residual import triton_levels
from fastvq.ops.residual.call import ResidualBackwardCall, ResidualCall
from fastvq.ops.residual.common import elements, residual_dtype, residuals, rows_with_codes
from fastvq.ops.residual.triton_levels import as_work
from fastvq.ops.statistics.triton_statistics import code_statistics

__all__ = ["residual_quantize", "residual_quantize_backward"]


@triton.jit(do_not_specialize=["n_rows"])
def _advance(
    residual, total, codes, stride_k, stride_d, found, mask, indices, stride_i, squares, n_rows, dim,
    MASKED: tl.constexpr, WORK: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    r = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    there = r < n_rows
    real = there
    if MASKED:
        real = there & (tl.load(mask + r, mask=there, other=0) != 0)
    k = tl.load(found + r, mask=there, other=0)
    tl.store(indices + r * stride_i, tl.where(real, k, -1), mask=there)
    square = tl.zeros((BM,), tl.float64)
    for d0 in range(0, dim, BD):
        d = d0 + tl.arange(0, BD)
        inside = real[:, None] & (d < dim)[None, :]
        at = r[:, None] * dim + d[None, :]
        from_code = codes + k[:, None] * stride_k + d.to(tl.int64)[None, :] * stride_d
        code = as_work(tl.load(from_code, mask=inside, other=0.0), WORK)
        before = tl.load(residual + at, mask=inside, other=0.0)
        tl.store(residual + at, before - code, mask=inside)
        tl.store(total + at, tl.load(total + at, mask=inside, other=0.0) + code, mask=inside)
        gap = before.to(tl.float64) - code.to(tl.float64)
        # Infinity stands for no distance at all, as NaN does.
        square += tl.sum(tl.where(tl.abs(before) < float("inf"), gap * gap, float("nan")), axis=1)
    tl.store(squares + tl.program_id(0), tl.sum(square))


@triton.jit(do_not_specialize=["n_rows"])
def _pull(
    x, codebooks, stride_q, stride_k, stride_d, indices, weights, grad, out, total, n_rows, n_levels, dim,
    WITH_LOSS: tl.constexpr, WITH_GRAD: tl.constexpr, WITH_TOTAL: tl.constexpr, WORK: tl.constexpr,
    BM: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """out = grad (straight-through) + sum over levels of weights_q r_{q+1}; total = the sum of the codes.

    ``indices`` are those of ``common.rows_with_codes``: codes on every level of a row, or -1 on every level.
    """
    r = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    d = tl.program_id(1) * BD + tl.arange(0, BD)
    there = r < n_rows
    real = there & (tl.load(indices + r * n_levels, mask=there, other=-1) >= 0)
    inside = real[:, None] & (d < dim)[None, :]
    at = r[:, None] * dim + d[None, :]
    rest = as_work(tl.load(x + at, mask=inside, other=0.0), WORK)
    pulled = tl.zeros((BM, BD), WORK)
    added = tl.zeros((BM, BD), WORK)
    for q in range(0, n_levels):
        k = tl.load(indices + r * n_levels + q, mask=real, other=0)
        from_code = codebooks + k[:, None] * stride_k + d.to(tl.int64)[None, :] * stride_d
        code = as_work(tl.load(from_code, mask=inside, other=0.0), WORK)
        codebooks += stride_q
        rest -= code
        added += code
        if WITH_LOSS:
            pulled += rest * tl.load(weights + q)
    if WITH_GRAD:
        pulled += as_work(tl.load(grad + at, mask=inside, other=0.0), WORK)
    if WITH_TOTAL:
        tl.store(total + at, added, mask=there[:, None] & (d < dim)[None, :])
    tl.store(out + at, pulled, mask=there[:, None] & (d < dim)[None, :])


def _tile(dim: int) -> tuple[int, int]:
    """Rows and columns of a program: 2048 elements; the interpreter's time is the number of steps, not their size."""
    if triton_backend.interpreting():
        return 1024, 256
    columns = min(128, triton.next_power_of_2(dim))
    return 2048 // columns, columns


def _work(dtype: torch.dtype) -> tl.dtype:
    return tl.float64 if dtype == torch.float64 else tl.float32


def _level_by_level(
    x: Tensor,  # [N, D]
    codebooks: Tensor,  # [Q, K, D]
    real: Tensor | None,  # [N] bool
    metric: str,
    precision: str,
    sums: Tensor,  # [Q, K, D], or empty: no statistics are asked for
    counts: Tensor,  # [Q, K]
) -> tuple[Tensor, Tensor, Tensor]:
    """The sum of the codes [N, D], the indices [N, Q], and the squares of the differences [Q, programs]."""
    (n_levels, n_codes, dim), n = codebooks.shape, x.shape[0]
    residual = x.to(residual_dtype(x, codebooks)).clone(memory_format=torch.contiguous_format)
    total = torch.zeros_like(residual)
    bm, bd = _tile(dim)
    programs = triton.cdiv(n, bm)
    indices = torch.empty(n, n_levels, dtype=torch.int64, device=x.device)
    squares = torch.zeros(n_levels, max(1, programs), dtype=torch.float64, device=x.device)
    for q, codes in enumerate(codebooks):
        found = nearest(residual, codes.to(residual.dtype), metric, precision)
        before = residual.clone() if sums.numel() else residual
        if n:
            _advance[(programs,)](
                residual, total, codes, *codes.stride(), found, found if real is None else real, indices[:, q],
                n_levels, squares[q], n, dim, MASKED=real is not None, WORK=_work(residual.dtype), BM=bm, BD=bd,
            )  # fmt: skip
        if sums.numel():
            sums[q], counts[q] = code_statistics(before, indices[:, q], n_codes, None)
    return total, indices, squares


def residual_quantize(call: ResidualCall) -> tuple[Tensor, ...]:
    x, codebooks, mask, metric, _, beta, statistics, precision, _ = call
    n_levels, n_codes, dim = codebooks.shape
    dtype = residual_dtype(x, codebooks)
    rows = x.reshape(-1, dim)
    n = rows.shape[0]
    real = None if mask is None else mask.reshape(-1).contiguous()
    sums = x.new_empty((n_levels, n_codes, dim) if statistics else (0,), dtype=dtype)
    counts = x.new_empty((n_levels, n_codes) if statistics else (0,), dtype=torch.int64)
    if triton_levels.served(x, codebooks):
        total, indices, squares = triton_levels.residual_quantize(rows, codebooks, real, metric, precision)
        if statistics:
            for q, residual in enumerate(residuals(rows, codebooks.to(dtype), indices)):
                sums[q], counts[q] = code_statistics(residual, indices[:, q], n_codes, None)
    else:
        total, indices, squares = _level_by_level(rows, codebooks, real, metric, precision, sums, counts)
    mean = squares.sum(1) / elements(n if real is None else real, dim)
    loss = torch.float64 if x.dtype == torch.float64 else torch.float32
    quantized = torch.empty_like(x).copy_(total.view(x.shape))
    indices = indices.view(*x.shape[:-1], n_levels)
    return quantized, (beta * mean).to(loss), mean.to(loss), indices, sums, counts


def residual_quantize_backward(call: ResidualBackwardCall) -> tuple[Tensor, Tensor]:
    x, codebooks, indices, grad_quantized, grad_commitment, grad_codebook, estimator, beta, *_ = call
    n_levels, n_codes, dim = codebooks.shape
    dtype = residual_dtype(x, codebooks)
    rows, chosen = x.reshape(-1, dim).contiguous(), indices.reshape(-1, n_levels)
    n = rows.shape[0]
    real, chosen = rows_with_codes(chosen, n_codes)
    scale = 2 / elements(real, dim)
    grad_x, grad_codebooks = x.new_empty(0), codebooks.new_empty(0)
    if call.need_x:
        out = rows.new_empty(rows.shape, dtype=dtype)
        rotate = estimator == "rotation" and grad_quantized is not None
        straight = estimator == "straight_through" and grad_quantized is not None
        g = rows if grad_quantized is None else grad_quantized.reshape(-1, dim).contiguous()
        total = torch.empty_like(out) if rotate else out
        weights = out.new_empty(0) if grad_commitment is None else (grad_commitment * (beta * scale)).to(dtype)
        bm, bd = _tile(dim)
        if n:
            _pull[(triton.cdiv(n, bm), triton.cdiv(dim, bd))](
                rows, codebooks, *codebooks.stride(), chosen, weights, g, out, total, n, n_levels, dim,
                WITH_LOSS=grad_commitment is not None, WITH_GRAD=straight, WITH_TOTAL=rotate, WORK=_work(dtype),
                BM=bm, BD=bd,
            )  # fmt: skip
        if rotate:
            own_code = torch.where(real, torch.arange(n, device=rows.device), -1)
            rotation_alone = (None, None, "rotation", beta, True, False, None)
            turned, _ = quantize_backward(
                QuantizeBackwardCall(rows.to(dtype), total, own_code, g.to(dtype), *rotation_alone)
            )
            out = torch.where(real[:, None], out + turned, 0)
        grad_x = torch.empty_like(x).copy_(out.view(x.shape))
    if call.need_codebooks:
        grad_codebooks = torch.zeros_like(codebooks)
    if call.need_codebooks and grad_codebook is not None:
        for q, residual in enumerate(residuals(rows, codebooks.to(dtype), chosen)):
            # The sum of (c_k - r) over the residuals that chose k, from their count and sum.
            sums, counts = code_statistics(residual.double(), chosen[:, q], n_codes, None)
            pull = torch.where(counts[:, None] > 0, counts[:, None] * codebooks[q].double() - sums, 0)
            grad_codebooks[q] = pull * (grad_codebook[q].double() * scale)
    return grad_x, grad_codebooks
