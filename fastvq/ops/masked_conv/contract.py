"""Checks of the masked convolution: what public functions are given, and what kernels rely on in the registered ops."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastvq._checks import FLOATS, check_float, check_integer, check_option, check_same_device
from fastvq.ops._contract import check_tensor
from fastvq.ops.masked_conv.masks import COLOUR_MASKS, MASKS

__all__ = [
    "as_autocast",
    "check_arguments",
    "check_backward",
    "check_dtypes",
    "check_gate",
    "check_operands",
]


def check_arguments(
    op: str, x: Tensor, weight: Tensor, bias: Tensor | None, mask: str | Tensor, colours: int
) -> tuple[str, Tensor | None]:
    """The mask's name and, for one given as a tensor ("custom"), its taps."""
    check_integer(op, "colours", colours)
    check_float(op, "x", x)
    check_float(op, "weight", weight)
    check_same_device(op, "x", x, "weight", weight)
    if x.dim() != 4 or 0 in x.shape[1:]:
        raise ValueError(f"{op}: x must be [B, C_in, H, W] with C_in, H, W >= 1, got {list(x.shape)}")
    if weight.dim() != 4 or weight.shape[1] != x.shape[1] or weight.shape[0] == 0:
        raise ValueError(
            f"{op}: weight must be [C_out, C_in, kh, kw] with C_in = {x.shape[1]} to match x, got {list(weight.shape)}"
        )
    if weight.shape[2] % 2 == 0 or weight.shape[3] % 2 == 0:
        raise ValueError(
            f"{op}: weight must have odd kernel sizes, so that there is a centre, got {list(weight.shape)}; "
            "pad it with masked taps"
        )
    if bias is not None:
        check_float(op, "bias", bias)
        check_same_device(op, "x", x, "bias", bias)
        if bias.shape != weight.shape[:1]:
            raise ValueError(
                f"{op}: bias must be [{weight.shape[0]}], one element an output channel, got {list(bias.shape)}"
            )
    if isinstance(mask, str):
        check_option(op, "mask", mask, MASKS)
    elif not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(
            f"{op}: mask must be one of {', '.join(MASKS)} or a bool tensor, got {got}; convert with .bool()"
        )
    elif mask.shape != weight.shape[2:]:
        raise ValueError(f"{op}: mask must be {list(weight.shape[2:])}, weight's kernel size, got {list(mask.shape)}")
    else:
        check_same_device(op, "x", x, "mask", mask)
    if colours != 1:
        if not isinstance(mask, str) or mask not in COLOUR_MASKS:
            raise ValueError(
                f"{op}: colours = {colours} goes with mask {', '.join(COLOUR_MASKS)}, whose centre tap is ordered, "
                f"got {mask!r}; pass colours=1"
            )
        if colours < 1 or x.shape[1] % colours or weight.shape[0] % colours:
            raise ValueError(
                f"{op}: colours must divide the channels in and out, got colours = {colours} with C_in = {x.shape[1]} "
                f"and C_out = {weight.shape[0]}"
            )
    return (mask, None) if isinstance(mask, str) else ("custom", mask)


def as_autocast(x: Tensor, *others: Tensor | None) -> tuple[Any, ...]:
    """Under autocast, its dtype, as torch's own convolutions take it."""
    device = x.device.type
    if not torch.is_autocast_enabled(device):
        return x, *others
    dtype = torch.get_autocast_dtype(device)
    return tuple(t.to(dtype) if t is not None and t.dtype != torch.float64 else t for t in (x, *others))


def check_dtypes(op: str, x: Tensor, *others: Tensor | None) -> None:
    dtype = x.dtype
    for i, t in enumerate(others):
        if t is not None and t.dtype != dtype:
            name = ("weight", "bias", "condition")[i]
            raise TypeError(f"{op}: {name} must be {dtype}, as x, got {t.dtype}; convert one with .to()")


def check_operands(
    op: str,
    x: Tensor,  # [B, C_in, H, W]
    weight: Tensor,  # [C_out, C_in, kh, kw]
    bias: Tensor | None,  # [C_out]
    mask: str,
    taps: Tensor | None,  # [kh, kw] bool, for mask "custom"
    colours: int,
) -> None:
    """Names, shapes, dtypes and devices are those that ``masked_conv2d`` hands on."""
    at, kernel = x.shape, weight.shape
    if len(at) != 4 or 0 in at[1:] or x.dtype not in FLOATS:
        raise ValueError(
            f"{op}: x must be a float [B, C_in, H, W] with C_in, H, W >= 1, got {x.dtype} {list(at)}; "
            "call fastvq.ops.masked_conv2d"
        )
    if len(kernel) != 4 or kernel[1] != at[1] or kernel[0] == 0 or kernel[2] % 2 == 0 or kernel[3] % 2 == 0:
        raise ValueError(
            f"{op}: weight must be [C_out, {at[1]}, kh, kw] with odd kh and kw to match x, got {list(kernel)}"
        )
    if weight.dtype != x.dtype or weight.device != x.device:
        check_tensor(op, "weight", weight, kernel, x.dtype, x.device)
    if bias is not None:
        check_tensor(op, "bias", bias, kernel[:1], x.dtype, x.device)
    if taps is not None:
        check_tensor(op, "taps", taps, kernel[2:], torch.bool, x.device)
    if (mask == "custom") != (taps is not None):
        raise ValueError(f"{op}: taps go with mask 'custom' and with no other, got mask {mask!r}")
    if taps is None:
        check_option(op, "mask", mask, MASKS)
    if colours != 1 and (colours < 1 or mask not in COLOUR_MASKS or at[1] % colours or kernel[0] % colours):
        raise ValueError(
            f"{op}: colours must be 1, or divide the channels in and out with a mask of {', '.join(COLOUR_MASKS)}, "
            f"got {colours} with mask {mask!r}, C_in = {at[1]}, C_out = {kernel[0]}"
        )


def check_backward(
    op: str, grad: Tensor, x: Tensor, weight: Tensor, mask: str, taps: Tensor | None, colours: int
) -> None:
    check_operands(op, x, weight, None, mask, taps, colours)
    check_tensor(op, "grad", grad, (x.shape[0], weight.shape[0], *x.shape[2:]), x.dtype, x.device)


def check_gate(op: str, x: Tensor, weight: Tensor, condition: Tensor | None) -> None:
    """The gated form's own: an even number of channels, a condition [B, 2C] or [B, 2C, H, W]."""
    if weight.shape[0] % 2:
        raise ValueError(f"{op}: weight must be [2 * C, C_in, kh, kw], got {list(weight.shape)}")
    if condition is not None:
        vector = (x.shape[0], weight.shape[0])
        shape = vector if condition.dim() == 2 else (*vector, *x.shape[2:])
        check_tensor(op, "condition", condition, shape, x.dtype, x.device)
