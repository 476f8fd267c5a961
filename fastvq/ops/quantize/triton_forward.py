# mypy: allow-untyped-defs
"""Quantization on a GPU: lookup, then one pass that gathers the codes and measures their distance.

tensors                                                        H heads, N rows a head, K codes, D columns
    x, quantized  [H, N, D]  any float, strides of ``backends.views.Rows``     codebook  [H, K, D]  any float, strides
    indices       [H, N]     int64, of ``nearest``; -1 is written where masked      mask  [H, N]  bool
    partial       [blocks] float64, partial_counts [blocks] int64

    1. the lookup's own kernels
    2. ``_gather``, ROWS rows a program, BLOCK_D columns at a time: x and the codes in, quantized out; the squares are
       added in float64, a block's sum and its number of unmasked rows go to ``partial``
    3. ``_losses``, one program: the blocks in a fixed order, the mean, and both losses

x is read and quantized written once. No atomics: the losses are the same from run to run.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastvq.backends import tiles, views
from fastvq.backends.triton import float64_bits
from fastvq.ops._triton_rows import axis_of, code_strides, row_offset, to_dtype, to_float64
from fastvq.ops.nearest.triton_ops import nearest
from fastvq.ops.quantize.call import QuantizeCall

__all__ = ["gather", "quantize"]

BLOCKS = 1024  # partial sums a step of _losses
# By width alone: an element costs its loads, whatever its type.
TILES = [
    tiles.Tile(80, 16, torch.float64, {"ROWS": 128, "BLOCK_D": 16, "num_warps": 4}),
    tiles.Tile(80, 32, torch.float64, {"ROWS": 64, "BLOCK_D": 32, "num_warps": 4}),
    tiles.Tile(80, 1 << 62, torch.float64, {"ROWS": 32, "BLOCK_D": 64, "num_warps": 4}),
]


@triton.jit(do_not_specialize=["n_rows", "n_total", "x_inner", "quantized_inner"])
def _gather(
    x, codebook, mask, quantized, indices, partial, partial_counts, n_rows, n_total,
    x_inner, x_head, x_outer, x_step, x_d,
    quantized_inner, quantized_head, quantized_outer, quantized_step, quantized_d,
    codebook_head, codebook_k, codebook_d,
    D: tl.constexpr, MASKED: tl.constexpr, AXIS: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    real = row < n_total
    if MASKED:
        real &= tl.load(mask + row, mask=real, other=0).to(tl.int1)
    index = tl.load(indices + row, mask=real, other=0)
    if MASKED:
        tl.store(indices + row, tl.where(real, index, -1), mask=row < n_total)
    head = row // n_rows
    in_head = row - head * n_rows
    head = head.to(tl.int64)
    from_x = tl.expand_dims(head * x_head + row_offset(in_head, x_inner, x_outer, x_step), AXIS)
    to = tl.expand_dims(
        head * quantized_head + row_offset(in_head, quantized_inner, quantized_outer, quantized_step), AXIS
    )
    from_code = tl.expand_dims(head * codebook_head + index * codebook_k, AXIS)
    here = tl.expand_dims(row < n_total, AXIS)
    real_here = tl.expand_dims(real, AXIS)
    squares = tl.zeros([ROWS, BLOCK_D] if AXIS == 1 else [BLOCK_D, ROWS], tl.float64)
    for begin in range(0, D, BLOCK_D):
        column = tl.expand_dims((begin + tl.arange(0, BLOCK_D)).to(tl.int64), 1 - AXIS)
        inside = real_here & (column < D)
        code = to_float64(tl.load(codebook + from_code + column * codebook_d, mask=inside, other=0.0))
        value = to_float64(tl.load(x + from_x + column * x_d, mask=inside, other=0.0))
        tl.store(
            quantized + to + column * quantized_d, to_dtype(code, quantized.dtype.element_ty), mask=here & (column < D)
        )
        difference = value - code
        # Infinity stands for no distance at all, as NaN does.
        squares += tl.where(tl.abs(value) < float("inf"), difference * difference, float("nan"))
    tl.store(partial + tl.program_id(0), tl.sum(tl.sum(squares, axis=1), axis=0))
    tl.store(partial_counts + tl.program_id(0), tl.sum(real.to(tl.int64), axis=0))


@triton.jit(do_not_specialize=["n_blocks", "beta_bits"])
def _losses(
    partial, partial_counts, commitment_loss, codebook_loss, n_blocks, beta_bits, D: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    total, count = tl.zeros([BLOCK], tl.float64), tl.zeros([BLOCK], tl.int64)
    for begin in range(0, n_blocks, BLOCK):
        block = begin + tl.arange(0, BLOCK)
        total += tl.load(partial + block, mask=block < n_blocks, other=0.0)
        count += tl.load(partial_counts + block, mask=block < n_blocks, other=0)
    n = tl.sum(count, axis=0) * D
    mean = tl.sum(total, axis=0) / tl.maximum(n, 1).to(tl.float64)
    beta = beta_bits.to(tl.int64).to(tl.float64, bitcast=True)
    tl.store(codebook_loss, mean.to(codebook_loss.dtype.element_ty))
    tl.store(commitment_loss, (beta * mean).to(commitment_loss.dtype.element_ty))


def quantize(call: QuantizeCall) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    indices = nearest(call.x, call.codebook, call.metric, call.precision)
    return gather(call.x, call.codebook, indices, call.mask, call.beta)


def gather(
    x: Tensor,  # [..., D] or [H, ..., D]
    codebook: Tensor,  # [K, D] or [H, K, D]
    indices: Tensor,  # [...] or [H, ...] int64, contiguous; -1 is written into it where masked
    mask: Tensor | None,  # [...] or [H, ...] bool
    beta: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(quantized, commitment_loss, codebook_loss, indices) of the codes that a lookup found."""
    heads = codebook.shape[0] if codebook.dim() == 3 else None
    loss = torch.float64 if x.dtype == torch.float64 else torch.float32
    out, view = views.QuantizedRows(x, heads), views.rows(x, heads)
    n_total = view.n_heads * view.n_rows
    if n_total == 0:
        return out.tensor(), x.new_zeros((), dtype=loss), x.new_zeros((), dtype=loss), indices
    tile = tiles.pick("quantize", TILES, x.device, view.dim, torch.float64)
    n_blocks = triton.cdiv(n_total, tile["ROWS"])
    partial = x.new_empty(n_blocks, dtype=torch.float64)
    partial_counts = indices.new_empty(n_blocks)
    _gather[(n_blocks,)](
        view.tensor, codebook, indices if mask is None else mask.contiguous(), out.rows.tensor, indices, partial,
        partial_counts, view.n_rows, n_total, *view.steps, *out.rows.steps, *code_strides(codebook),
        D=view.dim, MASKED=mask is not None, AXIS=axis_of(view.stride_d, view.n_inner), **tile,
    )  # fmt: skip
    commitment_loss, codebook_loss = x.new_empty((), dtype=loss), x.new_empty((), dtype=loss)
    _losses[(1,)](
        partial, partial_counts, commitment_loss, codebook_loss, n_blocks, float64_bits(beta), D=view.dim, BLOCK=BLOCKS
    )
    return out.tensor(), commitment_loss, codebook_loss, indices
