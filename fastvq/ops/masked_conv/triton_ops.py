"""The masked convolution by the Triton kernels: their launchers and tiles."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastvq.backends import triton as triton_backend
from fastvq.backends.tiles import Tile, pick
from fastvq.ops.masked_conv import triton_kernels as kernels
from fastvq.ops.masked_conv.common import like_input
from fastvq.ops.masked_conv.masks import tap_range

__all__ = ["gate_backward", "gated_masked_conv2d", "masked_conv2d", "masked_conv2d_backward"]

ANY = 2**31  # width of a row that serves every width left
HALVES = (torch.float16, torch.bfloat16)


def _tile(p: int, c: int, o: int, warps: int, stages: int) -> dict[str, int]:
    return {"BLOCK_P": p, "BLOCK_C": c, "BLOCK_O": o, "num_warps": warps, "num_stages": stages}


# By the channels that a pixel gets (C where gated). All: not measured on a GPU.
FORWARD = [
    *(
        tile
        for dtype in HALVES
        for tile in (
            Tile(80, 32, dtype, _tile(128, 64, 32, 4, 4)),
            Tile(80, 64, dtype, _tile(128, 64, 64, 4, 4)),
            Tile(80, ANY, dtype, _tile(128, 64, 128, 8, 3)),
            Tile(90, 32, dtype, _tile(128, 64, 32, 4, 4)),
            Tile(90, 64, dtype, _tile(128, 64, 64, 4, 4)),
            Tile(90, ANY, dtype, _tile(128, 64, 128, 8, 4)),
        )
    ),
    Tile(80, 32, torch.float32, _tile(64, 32, 32, 4, 3)),
    Tile(80, ANY, torch.float32, _tile(64, 32, 64, 4, 3)),
    Tile(80, ANY, torch.float64, _tile(32, 16, 32, 4, 2)),
]
GATED = [
    *(
        tile
        for dtype in HALVES
        for tile in (
            Tile(80, 32, dtype, _tile(128, 64, 32, 4, 4)),
            Tile(80, ANY, dtype, _tile(128, 32, 64, 8, 4)),
            Tile(90, 32, dtype, _tile(128, 64, 32, 4, 4)),
            Tile(90, ANY, dtype, _tile(128, 64, 64, 8, 4)),
        )
    ),
    Tile(80, ANY, torch.float32, _tile(64, 32, 32, 4, 3)),
]
WEIGHT_GRAD = [
    *(
        tile
        for dtype in HALVES
        for tile in (
            Tile(80, 64, dtype, _tile(64, 64, 64, 4, 4)),
            Tile(80, ANY, dtype, _tile(64, 128, 128, 8, 3)),
        )
    ),
    Tile(80, ANY, torch.float32, _tile(32, 64, 64, 4, 3)),
    Tile(100, ANY, torch.float32, _tile(32, 64, 32, 4, 3)),
    Tile(80, ANY, torch.float64, _tile(16, 32, 32, 4, 2)),
]
GATE_BLOCK = 1024
# Programs that the weight gradient is split into at least, by slices of the pixels, and pixels of a slice at least. Of
# sizes alone: the order of every sum is that of the sizes, on every card.
WANTED_PROGRAMS, SHORTEST_SLICE = 528, 512
WIDE_FROM = 2**31 - 2**16  # pixels are numbered in 64 bits from here on; addresses always are


class _Packed(NamedTuple):
    """The weights that count, and which taps they belong to."""

    weight: Tensor  # [n_taps, C_in, C_out], or for the gradient to x [n_taps, C_out, C_in]
    taps: Tensor | None  # [kh * kw + 1] int32, of a mask given as a tensor: its taps stay on the device
    first: int
    n_taps: int  # with taps: all of them


def _listed(taps: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """A mask's taps, active ones first, [kh * kw]; and the same as the kernels take them, how many are active last."""
    active = taps.to(device).flatten()
    order = torch.argsort(active, descending=True, stable=True)
    return order, torch.cat([order, active.sum()[None]]).to(torch.int32)


def _before(c_in: int, c_out: int, mask: str, colours: int, device: torch.device) -> Tensor:
    """[C_in, C_out] bool: what the centre tap lets a channel see, colours being ordered."""
    of_in, of_out = (torch.arange(n, device=device) * colours // n for n in (c_in, c_out))
    return torch.le(of_in[:, None], of_out) if mask.endswith("B") else torch.lt(of_in[:, None], of_out)


def _pack(weight: Tensor, mask: str, taps: Tensor | None, colours: int, transpose: bool = False) -> _Packed:
    c_out, c_in, kh, kw = weight.shape
    flat = weight.flatten(2)
    listed, active = None, tap_range(mask, kh, kw, colours)
    if taps is not None:
        order, listed = _listed(taps, weight.device)
        flat = flat.index_select(2, order)
    else:
        flat = flat[:, :, active.start : active.stop]
    packed = flat.permute(2, 1, 0)
    if colours > 1:  # the centre is the last tap of such a mask
        packed = packed.clone()
        packed[-1] = torch.where(_before(c_in, c_out, mask, colours, weight.device), packed[-1], 0)
    packed = (packed.mT if transpose else packed).contiguous()
    return _Packed(packed, listed, active.start, len(active))


def _pixels(t: Tensor) -> Tensor:
    """Channels-last: read as [B * H * W, C]. Once a call, where every tap would otherwise read at a stride."""
    return t.contiguous(memory_format=torch.channels_last)


def _pixels_for(target: Tensor) -> Tensor:
    """``target`` where it is channels-last, else a channels-last tensor to be copied to it."""
    if target.is_contiguous(memory_format=torch.channels_last):
        return target
    return torch.empty(target.shape, dtype=target.dtype, device=target.device, memory_format=torch.channels_last)


def _finish(pixels: Tensor, target: Tensor) -> Tensor:
    return target if pixels is target else target.copy_(pixels)


def _constants(x: Tensor, weight: Tensor) -> dict[str, Any]:
    double = x.dtype == torch.float64
    return {
        "KH": weight.shape[2],
        "KW": weight.shape[3],
        "SUMS": tl.float64 if double else tl.float32,
        "PRECISION": "tf32x3" if x.dtype == torch.float32 else "ieee",
        "WIDE": x.shape[0] * x.shape[2] * x.shape[3] >= WIDE_FROM,
        "INTERPRETED": triton_backend.interpreting(),
        "enable_fp_fusion": False,  # the default differs from one Triton to the next
    }


def _narrowed(meta: Mapping[str, int], **channels: int) -> dict[str, int]:
    """A row's tile without blocks that are wider than the channels: tl.dot takes no side below 16."""
    fitted = {name: min(meta[name], max(16, triton.next_power_of_2(n))) for name, n in channels.items()}
    return {**meta, **fitted}


def _convolve(
    name: str,
    table: list[Tile],
    x: Tensor,  # [B, C_in, H, W], channels-last
    weight: Tensor,  # for its kernel size
    packed: _Packed,
    bias: Tensor | None,
    condition: Tensor | None,  # [B, 2C] contiguous, or [B, 2C, H, W] channels-last
    outputs: tuple[Tensor, Tensor | None, Tensor | None],  # channels-last
    sign: int,
) -> None:
    out, tanh_a, sigmoid_b = outputs
    batch, c_in, height, width = x.shape
    n_pixels, c_out = batch * height * width, out.shape[1]
    if n_pixels == 0:
        return
    kind = "none" if condition is None else ("vector" if condition.dim() == 2 else "map")

    def launch(meta: Mapping[str, int]) -> None:
        meta = _narrowed(meta, BLOCK_C=c_in)
        grid = (triton.cdiv(n_pixels, meta["BLOCK_P"]) * triton.cdiv(c_out, meta["BLOCK_O"]),)
        kernels.masked_conv[grid](
            x, packed.weight, bias, condition, packed.taps, out, tanh_a, sigmoid_b, n_pixels, height, width, c_in,
            c_out, packed.first, packed.n_taps, SIGN=sign, GATED=table is GATED, CONDITION=kind,
            **_constants(x, weight), **meta,
        )  # fmt: skip

    launch(pick(name, table, x.device, c_out, x.dtype, launch))


def masked_conv2d(
    x: Tensor,  # [B, C_in, H, W]
    weight: Tensor,  # [C_out, C_in, kh, kw]
    bias: Tensor | None,  # [C_out]
    mask: str,
    taps: Tensor | None,  # [kh, kw] bool
    colours: int,
) -> Tensor:  # [B, C_out, H, W]
    target = like_input(x, weight.shape[0])
    out, packed = _pixels_for(target), _pack(weight, mask, taps, colours)
    bias = None if bias is None else bias.contiguous()
    _convolve("masked_conv2d", FORWARD, _pixels(x), weight, packed, bias, None, (out, None, None), 1)
    return _finish(out, target)


def masked_conv2d_backward(
    grad: Tensor,  # [B, C_out, H, W]
    x: Tensor,  # [B, C_in, H, W]
    weight: Tensor,  # [C_out, C_in, kh, kw]
    mask: str,
    taps: Tensor | None,
    colours: int,
    need_x: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    grad = _pixels(grad)
    grad_x, grad_weight, grad_bias = x.new_empty(0), weight.new_empty(0), weight.new_empty(0)
    if need_x:
        target = torch.empty_like(x)
        out, packed = _pixels_for(target), _pack(weight, mask, taps, colours, transpose=True)
        _convolve("masked_conv2d", FORWARD, grad, weight, packed, None, None, (out, None, None), -1)
        grad_x = _finish(out, target)
    if need_weight:
        grad_weight = _weight_grad(_pixels(x), grad, weight, mask, taps, colours)
    if need_bias:
        wide = torch.float64 if grad.dtype == torch.float64 else torch.float32
        grad_bias = grad.sum((0, 2, 3), dtype=wide).to(weight.dtype)
    return grad_x, grad_weight, grad_bias


def _weight_grad(
    x: Tensor,  # [B, C_in, H, W], channels-last
    grad: Tensor,  # [B, C_out, H, W], channels-last
    weight: Tensor,  # [C_out, C_in, kh, kw]
    mask: str,
    taps: Tensor | None,
    colours: int,
) -> Tensor:  # [C_out, C_in, kh, kw]
    c_out, c_in, kh, kw = weight.shape
    batch, _, height, width = x.shape
    n_pixels = batch * height * width
    active = tap_range(mask, kh, kw, colours)
    n_slots = len(active)
    result = torch.zeros(weight.shape, dtype=weight.dtype, device=weight.device)
    if n_pixels == 0 or n_slots == 0:
        return result
    order, listed = (None, None) if taps is None else _listed(taps, x.device)
    constants = _constants(x, weight)
    sums: list[Tensor] = []

    def launch(meta: Mapping[str, int]) -> None:
        meta = _narrowed(meta, BLOCK_C=c_in, BLOCK_O=c_out)
        n_tiles = triton.cdiv(c_in, meta["BLOCK_C"]) * triton.cdiv(c_out, meta["BLOCK_O"])
        n_slices = min(triton.cdiv(WANTED_PROGRAMS, n_tiles * n_slots), triton.cdiv(n_pixels, SHORTEST_SLICE))
        length = triton.cdiv(triton.cdiv(n_pixels, n_slices), meta["BLOCK_P"]) * meta["BLOCK_P"]
        n_slices = triton.cdiv(n_pixels, length)
        partial = torch.empty(
            (n_slices, n_slots, c_in, c_out), device=x.device, dtype=torch.promote_types(x.dtype, torch.float32)
        )
        kernels.masked_conv_weight_grad[(n_tiles, n_slots, n_slices)](
            x, grad, listed, partial, n_pixels, height, width, c_in, c_out, active.start, length, **constants, **meta,
        )  # fmt: skip
        sums[:] = [partial]

    launch(pick("masked_conv2d_weight_grad", WEIGHT_GRAD, x.device, max(c_in, c_out), x.dtype, launch))
    total = sums[0].sum(0)  # [slots, C_in, C_out], slice after slice
    if colours > 1:
        total[-1] = torch.where(_before(c_in, c_out, mask, colours, x.device), total[-1], 0)
    total = total.permute(2, 1, 0).to(weight.dtype)
    if order is None:
        result.flatten(2)[:, :, active.start : active.stop] = total
    else:
        result.flatten(2).index_copy_(2, order, total)
    return result


def gated_masked_conv2d(
    x: Tensor,  # [B, C_in, H, W]
    weight: Tensor,  # [2C, C_in, kh, kw]
    bias: Tensor | None,  # [2C]
    condition: Tensor | None,  # [B, 2C] or [B, 2C, H, W]
    mask: str,
    taps: Tensor | None,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    channels = weight.shape[0] // 2
    if x.dtype == torch.float64:
        return _gated_in_float64(x, weight, bias, condition, mask, taps, save)
    targets = [like_input(x, channels) for _ in range(3 if save else 1)]
    out = [_pixels_for(t) for t in targets]
    if condition is not None:
        condition = condition.contiguous() if condition.dim() == 2 else _pixels(condition)
    bias = None if bias is None else bias.contiguous()
    outputs = (out[0], out[1], out[2]) if save else (out[0], None, None)
    packed = _pack(weight, mask, taps, 1)
    _convolve("gated_masked_conv2d", GATED, _pixels(x), weight, packed, bias, condition, outputs, 1)
    done = [_finish(pixels, target) for pixels, target in zip(out, targets, strict=True)]
    return (done[0], done[1], done[2]) if save else (done[0], x.new_empty(0), x.new_empty(0))


def _gated_in_float64(
    x: Tensor, weight: Tensor, bias: Tensor | None, condition: Tensor | None, mask: str, taps: Tensor | None, save: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The gate by torch: the kernel's own series are those of float32."""
    y = masked_conv2d(x, weight, bias, mask, taps, 1)
    if condition is not None:
        y += condition if condition.dim() == 4 else condition[:, :, None, None]
    a, b = y.chunk(2, dim=1)
    tanh_a, sigmoid_b = (like_input(x, a.shape[1]).copy_(t) for t in (a.tanh(), b.sigmoid()))
    out = like_input(x, a.shape[1]).copy_(tanh_a * sigmoid_b)
    return (out, tanh_a, sigmoid_b) if save else (out, x.new_empty(0), x.new_empty(0))


def gate_backward(
    grad: Tensor,  # [B, C, H, W]
    tanh_a: Tensor,  # [B, C, H, W]
    sigmoid_b: Tensor,  # [B, C, H, W]
) -> Tensor:  # [B, 2C, H, W]
    # The saved factors are dense in one of two orders, which the gradient is brought to.
    both = like_input(tanh_a, 2 * tanh_a.shape[1])
    last = not both.is_contiguous()
    memory_format = torch.channels_last if last else torch.contiguous_format
    g, t, s = (v.contiguous(memory_format=memory_format) for v in (grad, tanh_a, sigmoid_b))
    if n := t.numel():
        inner = t.shape[1] if last else t[0].numel()
        sums = tl.float64 if t.dtype == torch.float64 else tl.float32
        kernels.gate_backward[(triton.cdiv(n, GATE_BLOCK),)](
            g, t, s, both, n, inner, SUMS=sums, INTERPRETED=triton_backend.interpreting(), enable_fp_fusion=False,
            BLOCK=GATE_BLOCK,
        )  # fmt: skip
    return both
