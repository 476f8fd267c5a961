# mypy: disable-error-code="no-untyped-def, no-untyped-call, has-type"
"""Triton kernels of the masked convolution: an implicit GEMM over the active taps, its gate, and its gradients.

tensor      layout                          what
x           [B * H * W, C_in]               channels-last pixels
weight      [n_taps, C_in, C_out]           active taps only
bias        [C_out]
condition   [B, C_out] or [B * H * W, C_out]
taps        [KH * KW + 1] int32, or None    taps of a mask that is known on the device alone, active ones first, and how
                                            many of them are active; without it they are first ... first + n_taps - 1
out         [B * H * W, C_out]              C_out halves to C where gated, as do tanh_a and sigmoid_b
partial     [slices, slots, C_in, C_out]    sums of a slice of the pixels, in the type sums are made in

A program of the forward kernel makes BLOCK_P pixels x BLOCK_O channels. One loop runs over taps and BLOCK_C channels
of each: the pixels move by the tap, those that it moves off their image read zeros, and a product of matrices adds to
the sums, which stay in registers. Shared memory: num_stages * (BLOCK_P + n * BLOCK_O) * BLOCK_C elements, n = 2 where
gated. The gradient to x is the same kernel with SIGN = -1 and C_in and C_out exchanged. The gradient to the weight
reduces over pixels instead: a program takes a tile of C_in x C_out for one tap and one slice of the pixels; the slices
are added by the launcher.

Sums are float32 (float64 for float64). float32 operands are split into two TF32 numbers each, whose three largest
products are taken (PRECISION "tf32x3"), so the tensor cores serve them too.
"""

import triton
import triton.language as tl

__all__ = ["as_type_of", "dot", "gate_backward", "masked_conv", "masked_conv_weight_grad", "sigmoid", "tanh"]


@triton.jit
def _split_exp(x):
    """2^n and expm1(r) with x = n ln2 + r, for x <= 0: a series to r^7/7!, 0.26 * 2^-24 off on |r| <= ln2 / 2."""
    x = tl.where(x < -87.0, -87.0, x)  # 2^n stays normal; NaN stays NaN
    n = tl.floor(tl.fma(x, 1.44269504, 0.5))
    r = tl.fma(n, -0.693145752, x)  # ln2 in two pieces, the first short enough for an exact product
    r = tl.fma(n, -1.42860677e-6, r)
    q = tl.fma(r, 1.0 / 5040.0, 1.0 / 720.0)
    q = tl.fma(q, r, 1.0 / 120.0)
    q = tl.fma(q, r, 1.0 / 24.0)
    q = tl.fma(q, r, 1.0 / 6.0)
    q = tl.fma(q, r, 0.5)
    scale = ((n.to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)
    return scale, tl.fma(q * r, r, r)


# Both are within 8 * 2^-24 of the true value, relative, for float32: the formulas of the CPU kernel.
@triton.jit
def tanh(a):
    """sign(a) * -m / (2 + m) with m = expm1(-2 |a|)."""
    scale, series = _split_exp(-2.0 * tl.abs(a))
    m = tl.fma(scale, series, scale - 1.0)
    t = tl.div_rn(-m, 2.0 + m)
    return tl.where(a < 0, -t, t)


@triton.jit
def sigmoid(b):
    """(b < 0 ? z : 1) / (1 + z) with z = exp(-|b|)."""
    scale, series = _split_exp(-tl.abs(b))
    z = tl.fma(scale, series, scale)
    return tl.div_rn(tl.where(b < 0, z, 1.0), 1.0 + z)


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr, INTERPRETED: tl.constexpr):
    if INTERPRETED:  # whose product of bfloat16 would be one of raw bits
        a, b = a.to(acc.dtype), b.to(acc.dtype)
    return tl.dot(a, b, acc, input_precision=PRECISION, out_dtype=acc.dtype)


@triton.jit
def as_type_of(value, like, INTERPRETED: tl.constexpr):
    """In the type that ``like`` points to, rounded to nearest even; the interpreter would cut bfloat16 off."""
    if INTERPRETED and like.dtype.element_ty == tl.bfloat16:
        bits = value.to(tl.int32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        value = tl.where(value == value, rounded.to(tl.float32, bitcast=True), value)
    return value.to(like.dtype.element_ty)


@triton.jit
def _place(pixel, height, width):
    """Image, row and column of a pixel's number."""
    line = pixel // width
    image = line // height
    return image, (line - image * height).to(tl.int32), (pixel - line * width).to(tl.int32)


@triton.jit
def _step(slot, taps, first, row, column, height, width, SIGN: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr):
    """How far a tap moves a pixel, in pixels, and which pixels stay in their image."""
    tap = first + slot if taps is None else tl.load(taps + slot)
    dy = SIGN * (tap // KW - KH // 2)
    dx = SIGN * (tap % KW - KW // 2)
    y = row + dy
    x = column + dx
    return dy.to(tl.int64) * width + dx, (y >= 0) & (y < height) & (x >= 0) & (x < width)


_RUNTIME = ["n_pixels", "height", "width", "first", "n_taps", "slice_length"]


@triton.jit(do_not_specialize=_RUNTIME)
def masked_conv(
    x, weight, bias, condition, taps, out, tanh_a, sigmoid_b, n_pixels, height, width, c_in, c_out, first, n_taps,
    SIGN: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, GATED: tl.constexpr, CONDITION: tl.constexpr,
    SUMS: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr, INTERPRETED: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_O: tl.constexpr,
):  # fmt: skip
    """c_out is what is stored: C where gated. CONDITION: "none", "vector" or "map"."""
    # 1. This program's channels and pixels: neighbours share pixels.
    n_blocks = tl.cdiv(c_out, BLOCK_O)
    program = tl.program_id(0)
    o = (program % n_blocks) * BLOCK_O + tl.arange(0, BLOCK_O)
    start = program // n_blocks
    if WIDE:
        start = start.to(tl.int64)
    pixel = start * BLOCK_P + tl.arange(0, BLOCK_P)
    inside, kept = pixel < n_pixels, o < c_out
    image, row, column = _place(pixel, height, width)
    pixel = pixel.to(tl.int64)
    rows = x + pixel[:, None] * c_in

    # 2. Taps, and channels of each.
    stride = c_out * 2 if GATED else c_out
    if taps is not None:
        n_taps = tl.load(taps + KH * KW)
    n_chunks = tl.cdiv(c_in, BLOCK_C)
    sums = tl.zeros((BLOCK_P, BLOCK_O), SUMS)
    sums_b = sums
    for i in range(n_taps * n_chunks):
        slot = i // n_chunks
        c = (i - slot * n_chunks) * BLOCK_C + tl.arange(0, BLOCK_C)
        move, seen = _step(slot, taps, first, row, column, height, width, SIGN, KH, KW)
        seen = inside & seen
        a = tl.load(rows + (move * c_in + c)[None, :], mask=seen[:, None] & (c < c_in)[None, :], other=0.0)
        columns = weight + (slot.to(tl.int64) * c_in + c)[:, None] * stride + o[None, :]
        used = (c < c_in)[:, None] & kept[None, :]
        sums = dot(a, tl.load(columns, mask=used, other=0.0), sums, PRECISION, INTERPRETED)
        if GATED:
            sums_b = dot(a, tl.load(columns + c_out, mask=used, other=0.0), sums_b, PRECISION, INTERPRETED)

    # 3. Bias, condition and gate.
    if bias is not None:
        sums += tl.load(bias + o, mask=kept, other=0.0).to(SUMS)[None, :]
        if GATED:
            sums_b += tl.load(bias + c_out + o, mask=kept, other=0.0).to(SUMS)[None, :]
    stored = inside[:, None] & kept[None, :]
    to = pixel[:, None] * c_out + o[None, :]
    if GATED:  # one half after the other: both at once would not fit in the registers
        if CONDITION != "none":
            at = image.to(tl.int64) if CONDITION == "vector" else pixel
            condition += at[:, None] * stride + o[None, :]
            sums += tl.load(condition, mask=stored, other=0.0).to(SUMS)
        sums = tanh(sums)
        if tanh_a is not None:
            tl.store(tanh_a + to, as_type_of(sums, tanh_a, INTERPRETED), mask=stored)
        if CONDITION != "none":
            sums_b += tl.load(condition + c_out, mask=stored, other=0.0).to(SUMS)
        sums_b = sigmoid(sums_b)
        if sigmoid_b is not None:
            tl.store(sigmoid_b + to, as_type_of(sums_b, sigmoid_b, INTERPRETED), mask=stored)
        sums = sums * sums_b
    tl.store(out + to, as_type_of(sums, out, INTERPRETED), mask=stored)


@triton.jit(do_not_specialize=_RUNTIME)
def masked_conv_weight_grad(
    x, grad, taps, partial, n_pixels, height, width, c_in, c_out, first, slice_length,
    KH: tl.constexpr, KW: tl.constexpr, SUMS: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr,
    INTERPRETED: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_O: tl.constexpr,
):  # fmt: skip
    """Grid: tiles of [C_in, C_out], slots (a mask known on the device alone has one for every tap), slices."""
    n_blocks = tl.cdiv(c_out, BLOCK_O)
    c = (tl.program_id(0) // n_blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    o = (tl.program_id(0) % n_blocks) * BLOCK_O + tl.arange(0, BLOCK_O)
    slot, part = tl.program_id(1), tl.program_id(2)
    start = part.to(tl.int64) * slice_length if WIDE else part * slice_length
    end = tl.minimum(start + slice_length, n_pixels)
    if taps is not None and slot >= tl.load(taps + KH * KW):
        end = start  # not active: zeros
    sums = tl.zeros((BLOCK_C, BLOCK_O), SUMS)
    for at in range(start, end, BLOCK_P):
        pixel = at + tl.arange(0, BLOCK_P)
        _image, row, column = _place(pixel, height, width)
        move, seen = _step(slot, taps, first, row, column, height, width, 1, KH, KW)
        inside = pixel < end
        pixel = pixel.to(tl.int64)
        a = tl.load(
            x + (pixel + move)[:, None] * c_in + c[None, :],
            mask=(inside & seen)[:, None] & (c < c_in)[None, :], other=0.0,
        )  # fmt: skip
        g = tl.load(grad + pixel[:, None] * c_out + o[None, :], mask=inside[:, None] & (o < c_out)[None, :], other=0.0)
        sums = dot(tl.trans(a), g, sums, PRECISION, INTERPRETED)
    to = ((part.to(tl.int64) * tl.num_programs(1) + slot) * c_in + c)[:, None] * c_out + o[None, :]
    tl.store(partial + to, sums, mask=(c < c_in)[:, None] & (o < c_out)[None, :])


@triton.jit(do_not_specialize=["n", "inner"])
def gate_backward(
    grad, tanh_a, sigmoid_b, out, n, inner, SUMS: tl.constexpr, INTERPRETED: tl.constexpr, BLOCK: tl.constexpr
):
    """[n / inner, inner] -> [n / inner, 2, inner]: the gradient at a, then at b."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    g = tl.load(grad + at, mask=inside, other=0.0).to(SUMS)
    t = tl.load(tanh_a + at, mask=inside, other=0.0).to(SUMS)
    s = tl.load(sigmoid_b + at, mask=inside, other=0.0).to(SUMS)
    to = out + at + (at // inner) * inner
    tl.store(to, as_type_of(g * s * (1.0 - t * t), out, INTERPRETED), mask=inside)
    tl.store(to + inner, as_type_of(g * t * (s * (1.0 - s)), out, INTERPRETED), mask=inside)
