"""What the kernels of the masked convolution rely on, checked in the registered ops."""

from __future__ import annotations

import torch
from torch import Tensor

from fastvq._checks import FLOATS, check_option
from fastvq.ops._contract import check_tensor
from fastvq.ops.masked_conv.masks import COLOUR_MASKS, MASKS

__all__ = ["check_backward", "check_gate", "check_operands"]


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
