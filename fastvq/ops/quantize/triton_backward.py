# mypy: allow-untyped-defs
"""The gradients of quantization on a GPU.

tensors                                                        H heads, N rows a head, K codes, D columns
    x, g, grad_x  [H, N, D]   strides that ``fastvq.backends.views`` walks      codebook, grad_codebook  [H, K, D]
    indices  [H, N] int64, -1 where masked      sums [H, K, D] float64, counts [H, K] int64 of ``code_statistics``
    n_real  [] int64, the unmasked vectors      weights: the losses' incoming gradients, scalars on the device

    1. ``_to_x``, ROWS rows a program: the estimator's gradient and the commitment loss's. The rotation takes two passes
       over the columns for its sums (from the first-level cache, the second time) and one that writes.
    2. the sums and counts of the vectors that chose each code; ``_to_codes`` makes the gradient of them

Sums over columns or rows are float64. Elements are float32, float64 for the rotation and wherever an input is.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastvq.backends import tiles, views
from fastvq.backends.triton import float64_bits
from fastvq.ops._triton_rows import at_least_float32, axis_of, code_strides, row_offset, to_dtype, to_float64
from fastvq.ops.quantize.call import QuantizeBackwardCall
from fastvq.ops.quantize.common import DEGENERATE
from fastvq.ops.statistics.triton_statistics import code_statistics

__all__ = ["quantize_backward"]

# Smaller than the forward's: the rotation holds three tiles and nine numbers a row in float64.
TILES = [
    tiles.Tile(80, 16, torch.float64, {"ROWS": 32, "BLOCK_D": 16, "num_warps": 4}),
    tiles.Tile(80, 32, torch.float64, {"ROWS": 32, "BLOCK_D": 32, "num_warps": 4}),
    tiles.Tile(80, 1 << 62, torch.float64, {"ROWS": 16, "BLOCK_D": 64, "num_warps": 4}),
]
CODE_TILE = {"ROWS": 8, "BLOCK_D": 64}


@triton.jit(do_not_specialize=["n_rows", "n_total", "n_codes", "factor_bits", "x_inner", "g_inner", "out_inner"])
def _to_x(
    x, codebook, g, indices, grad_x, n_real, weight, n_rows, n_total, n_codes, factor_bits,
    x_inner, x_head, x_outer, x_step, x_d, g_inner, g_head, g_outer, g_step, g_d,
    out_inner, out_head, out_outer, out_step, out_d, codebook_head, codebook_k, codebook_d,
    D: tl.constexpr, WITH_G: tl.constexpr, WITH_LOSS: tl.constexpr, ROTATE: tl.constexpr, DEGENERATE: tl.constexpr,
    WORK: tl.constexpr, AXIS: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    index = tl.load(indices + row, mask=row < n_total, other=-1)
    index = tl.where(index < n_codes, index, -1)  # one that was changed since is left out
    real = tl.expand_dims(index >= 0, AXIS)
    head = row // n_rows
    in_head = row - head * n_rows
    head = head.to(tl.int64)
    from_x = tl.expand_dims(head * x_head + row_offset(in_head, x_inner, x_outer, x_step), AXIS)
    from_g = tl.expand_dims(head * g_head + row_offset(in_head, g_inner, g_outer, g_step), AXIS)
    to = tl.expand_dims(head * out_head + row_offset(in_head, out_inner, out_outer, out_step), AXIS)
    from_code = tl.expand_dims(head * codebook_head + index * codebook_k, AXIS)
    if WITH_LOSS:
        factor = factor_bits.to(tl.int64).to(tl.float64, bitcast=True)
        n = tl.maximum(tl.load(n_real), 1).to(tl.float64)
        pull = (tl.load(weight).to(tl.float64) * factor / n).to(WORK)
    if ROTATE:
        xx, cc = tl.zeros([ROWS], tl.float64), tl.zeros([ROWS], tl.float64)
        xg, cg = tl.zeros([ROWS], tl.float64), tl.zeros([ROWS], tl.float64)
        for begin in range(0, D, BLOCK_D):
            column = tl.expand_dims((begin + tl.arange(0, BLOCK_D)).to(tl.int64), 1 - AXIS)
            inside = real & (column < D)
            value = to_float64(tl.load(x + from_x + column * x_d, mask=inside, other=0.0))
            code = to_float64(tl.load(codebook + from_code + column * codebook_d, mask=inside, other=0.0))
            incoming = to_float64(tl.load(g + from_g + column * g_d, mask=inside, other=0.0))
            xx += tl.sum(value * value, axis=AXIS)
            cc += tl.sum(code * code, axis=AXIS)
            xg += tl.sum(value * incoming, axis=AXIS)
            cg += tl.sum(code * incoming, axis=AXIS)
        length_x, length_c = tl.sqrt(xx), tl.sqrt(cc)
        # A length of zero is caught below; its reciprocal must only not trap.
        per_x, per_c = 1.0 / length_x, 1.0 / length_c
        square = tl.zeros(
            [ROWS], tl.float64
        )  # |x^ + c^|^2; from the dot product it would cancel where they are opposite
        for begin in range(0, D, BLOCK_D):
            column = tl.expand_dims((begin + tl.arange(0, BLOCK_D)).to(tl.int64), 1 - AXIS)
            inside = real & (column < D)
            value = to_float64(tl.load(x + from_x + column * x_d, mask=inside, other=0.0))
            code = to_float64(tl.load(codebook + from_code + column * codebook_d, mask=inside, other=0.0))
            r = value * tl.expand_dims(per_x, AXIS) + code * tl.expand_dims(per_c, AXIS)
            square += tl.sum(r * r, axis=AXIS)
        # lambda (g - 2 r (r.g) + 2 x^ (c^.g)) as a g + b x + e c. A row that is not finite gets the NaN of the formula.
        turned = (length_x > 0) & (length_c > 0) & (square > DEGENERATE * DEGENERATE)
        turned |= ~(xx < float("inf"))
        scale = length_c * per_x
        along_r = 2 * (xg * per_x + cg * per_c) / square
        a = tl.expand_dims(tl.where(turned, scale, 1.0), AXIS)
        b = tl.expand_dims(tl.where(turned, scale * per_x * (2 * cg * per_c - along_r), 0.0), AXIS)
        e = tl.expand_dims(tl.where(turned, -scale * per_c * along_r, 0.0), AXIS)
    for begin in range(0, D, BLOCK_D):
        column = tl.expand_dims((begin + tl.arange(0, BLOCK_D)).to(tl.int64), 1 - AXIS)
        inside = real & (column < D)
        total = tl.zeros([ROWS, BLOCK_D] if AXIS == 1 else [BLOCK_D, ROWS], WORK)
        if WITH_LOSS or ROTATE:
            value = at_least_float32(tl.load(x + from_x + column * x_d, mask=inside, other=0.0)).to(WORK)
            code = at_least_float32(tl.load(codebook + from_code + column * codebook_d, mask=inside, other=0.0)).to(
                WORK
            )
        if WITH_G:
            incoming = at_least_float32(tl.load(g + from_g + column * g_d, mask=inside, other=0.0)).to(WORK)
            total = a * incoming + (b * value + e * code) if ROTATE else incoming
        if WITH_LOSS:
            total += pull * (value - code)
        result = tl.where(real, to_dtype(total, grad_x.dtype.element_ty), 0.0)
        tl.store(grad_x + to + column * out_d, result, mask=tl.expand_dims(row < n_total, AXIS) & (column < D))


@triton.jit(do_not_specialize=["n_codes", "n_keys", "factor_bits"])
def _to_codes(
    codebook, sums, counts, n_real, weight, grad_codebook, n_codes, n_keys, factor_bits,
    codebook_head, codebook_k, codebook_d, out_head, out_k, out_d,
    D: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    key = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = (tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)).to(tl.int64)[None, :]
    head = (key // n_codes).to(tl.int64)
    code = key - head * n_codes
    n = tl.load(counts + key, mask=key < n_keys, other=0)[:, None]
    here = (key < n_keys)[:, None] & (column < D)
    used = here & (n > 0)  # a code that is not finite is not used, and zero times it is not zero
    value = to_float64(
        tl.load(
            codebook + (head * codebook_head + code * codebook_k)[:, None] + column * codebook_d, mask=used, other=0.0
        )
    )
    total = n.to(tl.float64) * value - tl.load(sums + key[:, None].to(tl.int64) * D + column, mask=used, other=0.0)
    factor = factor_bits.to(tl.int64).to(tl.float64, bitcast=True)
    scale = tl.load(weight).to(tl.float64) * factor / tl.maximum(tl.load(n_real), 1).to(tl.float64)
    # Where unused, the weight may still be infinite.
    result = tl.where(used, to_dtype(total * scale, grad_codebook.dtype.element_ty), 0.0)
    tl.store(grad_codebook + (head * out_head + code * out_k)[:, None] + column * out_d, result, mask=here)


def quantize_backward(call: QuantizeBackwardCall) -> tuple[Tensor, Tensor]:
    x, codebook, indices, grad_quantized, grad_commitment, grad_codebook_loss, estimator, beta, *_ = call
    grad_x, grad_codebook = x.new_empty(0), codebook.new_empty(0)
    heads = codebook.shape[0] if codebook.dim() == 3 else None
    indices = indices.contiguous()
    n_real = (indices >= 0).sum()
    dim, n_codes = codebook.shape[-1], codebook.shape[-2]
    if call.need_x:
        out, view = views.QuantizedRows(x, heads), views.rows(x, heads)
        with_g = grad_quantized is not None and estimator != "none"
        incoming = views.rows(grad_quantized, heads) if grad_quantized is not None and with_g else view
        rotate = with_g and estimator == "rotation"
        exact = rotate or torch.float64 in (x.dtype, codebook.dtype)
        tile = tiles.pick("quantize_backward", TILES, x.device, dim, torch.float64)
        n_total = view.n_heads * view.n_rows
        if n_total:
            _to_x[(triton.cdiv(n_total, tile["ROWS"]),)](
                view.tensor, codebook, incoming.tensor, indices, out.rows.tensor, n_real,
                n_real if grad_commitment is None else grad_commitment, view.n_rows, n_total,
                n_codes, float64_bits(2 * beta / dim), *view.steps, *incoming.steps, *out.rows.steps,
                *code_strides(codebook), D=dim, WITH_G=with_g,
                WITH_LOSS=grad_commitment is not None, ROTATE=rotate, DEGENERATE=DEGENERATE,
                WORK=tl.float64 if exact else tl.float32, AXIS=axis_of(view.stride_d, view.n_inner), **tile,
            )  # fmt: skip
        grad_x = out.tensor()
    if call.need_codebook and grad_codebook_loss is None:
        grad_codebook = torch.zeros_like(codebook)
    elif call.need_codebook:
        # The sum of (c_k - x) over the vectors that chose k, from their count and sum.
        sums, counts = code_statistics(x, indices, n_codes, heads, sums_dtype=torch.float64)
        grad_codebook = torch.empty_like(codebook)
        _to_codes[(triton.cdiv(counts.numel(), CODE_TILE["ROWS"]), triton.cdiv(dim, CODE_TILE["BLOCK_D"]))](
            codebook, sums, counts, n_real, grad_codebook_loss, grad_codebook, n_codes, counts.numel(),
            float64_bits(2 / dim), *code_strides(codebook), *code_strides(grad_codebook), D=dim, **CODE_TILE,
        )  # fmt: skip
    return grad_x, grad_codebook
