# mypy: disable-error-code="no-untyped-def, no-untyped-call, has-type"
"""Triton kernels of the sampler's step. The position is a number on the device, so that a captured launch serves all.

tensor      layout                    what
source      [B, rings, W, C]          inputs of a layer: of row i, line i % rings; rings = 1 for the horizontal stack
ids         [B, H, W] int64           of the first layer, whose inputs are rows of the embedding [K, C]
weight      [n_taps, C_in, C_out]
link        [B, W, 2C]                what the vertical stack of this row adds to the horizontal gate
condition   [B, h, w, 4C]             of this layer: vertical a and b, horizontal a and b; or None
gated, skip [B, C]                    of this position

A program makes BLOCK_M vectors x BLOCK_O channels: one vector an image for the horizontal stack (ROW = False), one a
column for the vertical stack. Nothing is read of a cache that the same map has not written before: what lies outside
the map is masked, and a line of a ring is written before it is first read. Sums are float32.
"""

import triton
import triton.language as tl

from fastvq.ops.masked_conv.triton_kernels import as_type_of, dot, sigmoid, tanh

__all__ = ["gate_step", "linear_step"]


@triton.jit
def _vectors(position, n, width, ROW: tl.constexpr, BLOCK_M: tl.constexpr):
    """Number, image, row and column of a program's vectors, and a mask of the valid ones."""
    at = tl.load(position)
    m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    row = tl.zeros_like(m) + at // width
    if ROW:
        return m, m // width, row, m % width, m < n
    return m, m, row, tl.zeros_like(m) + at % width, m < n


@triton.jit
def _given(condition, image, row, column, tall, wide, scale_y, scale_x, channels):
    """Where the condition of a vector starts."""
    return condition + ((image * tall + row // scale_y) * wide + column // scale_x) * 4 * channels


@triton.jit(do_not_specialize=["n", "height", "width", "tall", "wide", "scale_y", "scale_x", "n_taps", "n_codes"])
def gate_step(
    source, ids, weight, bias, link, condition, out, position, n, height, width, channels, n_codes, n_taps,
    tall, wide, scale_y, scale_x, RINGS: tl.constexpr, OUT_RINGS: tl.constexpr, KW: tl.constexpr, REACH: tl.constexpr,
    ROW: tl.constexpr, FIRST: tl.constexpr, INTERPRETED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_O: tl.constexpr,
):  # fmt: skip
    """out = [ROW and not FIRST] source + tanh(a) sigmoid(b), of a convolution of source, FIRST: of the embedding."""
    m, image, row, column, inside = _vectors(position, n, width, ROW, BLOCK_M)
    o = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
    kept = o < channels
    a = tl.zeros((BLOCK_M, BLOCK_O), tl.float32)
    b = a
    n_chunks = tl.cdiv(channels, BLOCK_C)
    for i in range(n_taps * n_chunks):
        tap = i // n_chunks
        c = (i - tap * n_chunks) * BLOCK_C + tl.arange(0, BLOCK_C)
        y = row + (tap // KW - REACH if ROW else 0)
        x = column + (tap % KW - REACH)
        seen = inside & (y >= 0) & (x >= 0) & (x < width)
        if FIRST:
            at = tl.load(ids + (image * height + y) * width + x, mask=seen, other=0)
            seen = seen & (at >= 0) & (at < n_codes)  # an id that is none of the embedding's reads nothing
        else:
            at = (image * RINGS + y % RINGS) * width + x
        used = c < channels
        v = tl.load(source + at[:, None] * channels + c[None, :], mask=seen[:, None] & used[None, :], other=0.0)
        w = weight + (tap.to(tl.int64) * channels + c)[:, None] * (2 * channels) + o[None, :]
        used = used[:, None] & kept[None, :]
        a = dot(v, tl.load(w, mask=used, other=0.0), a, "ieee", INTERPRETED)
        b = dot(v, tl.load(w + channels, mask=used, other=0.0), b, "ieee", INTERPRETED)

    stored = inside[:, None] & kept[None, :]
    if ROW:
        a += tl.load(bias + o, mask=kept, other=0.0).to(tl.float32)[None, :]
        b += tl.load(bias + channels + o, mask=kept, other=0.0).to(tl.float32)[None, :]
        if condition is not None:
            add = _given(condition, image, row, column, tall, wide, scale_y, scale_x, channels)[:, None] + o[None, :]
            a += tl.load(add, mask=stored, other=0.0).to(tl.float32)
            b += tl.load(add + channels, mask=stored, other=0.0).to(tl.float32)
    else:
        add = link + (image * width + column)[:, None] * (2 * channels) + o[None, :]
        a += tl.load(add, mask=stored, other=0.0).to(tl.float32)
        b += tl.load(add + channels, mask=stored, other=0.0).to(tl.float32)
    v = tanh(a) * sigmoid(b)
    to = m
    if ROW:
        if not FIRST:
            here = (image * RINGS + row % RINGS) * width + column
            v += tl.load(source + here[:, None] * channels + o[None, :], mask=stored, other=0.0).to(tl.float32)
        to = (image * OUT_RINGS + row % OUT_RINGS) * width + column
    tl.store(out + to[:, None] * channels + o[None, :], as_type_of(v, out, INTERPRETED), mask=stored)


@triton.jit(do_not_specialize=["n", "width", "tall", "wide", "scale_y", "scale_x"])
def linear_step(
    source, weight, bias, condition, before, out, skip, position, n, width, channels, n_out,
    tall, wide, scale_y, scale_x, RINGS: tl.constexpr, KIND: tl.constexpr, FIRST: tl.constexpr,
    INTERPRETED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_O: tl.constexpr,
):  # fmt: skip
    """weight . source + bias, for every vector of a row or of a position.

    KIND "link": of the row's vertical stack, condition added. "out": of the gated vectors; all but the last C channels
    go to ``out`` [B, W, C] at the position, added to ``before`` there unless FIRST, the last C are added to ``skip``,
    FIRST: begin it. "head": of relu(source) [B, C].
    """
    m, image, row, column, inside = _vectors(position, n, width, KIND == "link", BLOCK_M)
    o = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
    kept = o < n_out
    at = m
    if KIND == "link":
        at = (image * RINGS + row % RINGS) * width + column
    sums = tl.zeros((BLOCK_M, BLOCK_O), tl.float32)
    for chunk in range(0, channels, BLOCK_C):
        c = chunk + tl.arange(0, BLOCK_C)
        used = c < channels
        v = tl.load(source + at[:, None] * channels + c[None, :], mask=inside[:, None] & used[None, :], other=0.0)
        if KIND == "head":
            wide_v = v.to(tl.float32)
            v = tl.where(wide_v < 0, 0.0, wide_v).to(v.dtype)  # NaN stays
        w = tl.load(
            weight + c.to(tl.int64)[:, None] * n_out + o[None, :], mask=used[:, None] & kept[None, :], other=0.0
        )
        sums = dot(v, w, sums, "ieee", INTERPRETED)
    sums += tl.load(bias + o, mask=kept, other=0.0).to(tl.float32)[None, :]
    stored = inside[:, None] & kept[None, :]
    if KIND == "out":
        ours = n_out - channels  # 0 in the last layer
        to = (image * width + column)[:, None] * channels + o[None, :]
        residual = stored & (o < ours)[None, :]
        value = sums
        if not FIRST:
            value += tl.load(before + to, mask=residual, other=0.0).to(tl.float32)
        tl.store(out + to, as_type_of(value, out, INTERPRETED), mask=residual)
        to = m[:, None] * channels + (o - ours)[None, :]
        skipped = stored & (o >= ours)[None, :]
        if not FIRST:
            sums += tl.load(skip + to, mask=skipped, other=0.0).to(tl.float32)
        tl.store(skip + to, as_type_of(sums, skip, INTERPRETED), mask=skipped)
    else:
        if KIND == "link" and condition is not None:
            add = _given(condition, image, row, column, tall, wide, scale_y, scale_x, channels) + 2 * channels
            sums += tl.load(add[:, None] + o[None, :], mask=stored, other=0.0).to(tl.float32)
        tl.store(out + m[:, None] * n_out + o[None, :], as_type_of(sums, out, INTERPRETED), mask=stored)
