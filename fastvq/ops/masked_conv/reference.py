"""The definition of the masked convolution, plain and gated, in plain torch; gradients too."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_input, conv2d_weight

__all__ = ["gate_backward", "gated_masked_conv2d", "masked_conv2d", "masked_conv2d_backward"]


def _used_weights(
    mask: str,
    taps: Tensor | None,  # [kh, kw] bool, for mask "custom"
    colours: int,
    weight: Tensor,  # [C_out, C_in, kh, kw]
) -> Tensor:  # bool, broadcasts to weight's shape
    """True where a weight counts, from the place of its tap relative to the centre and the groups of its channels."""
    c_out, c_in, kh, kw = weight.shape
    row = torch.arange(kh, device=weight.device)[:, None] - kh // 2
    column = torch.arange(kw, device=weight.device) - kw // 2
    above, left, centre = row < 0, (row == 0) & (column < 0), (row == 0) & (column == 0)
    up_to = mask.endswith("B")  # the row, respectively the tap, of the centre counts too
    if taps is not None:
        used = taps
    elif mask.startswith("vertical"):
        used = (above | (row == 0) & up_to).expand(kh, kw)
    elif mask.startswith("horizontal"):
        used = left | centre & up_to
    else:
        used = above | left | centre & up_to
    if colours == 1:
        return used
    group_out = (torch.arange(c_out, device=weight.device) // (c_out // colours))[:, None, None, None]
    group_in = (torch.arange(c_in, device=weight.device) // (c_in // colours))[:, None, None]
    sees = group_in < group_out + up_to
    return torch.where(centre, sees, used)


def _as_input(
    y: Tensor,  # [B, C, H, W]
    x: Tensor,  # [B, C_in, H, W]
) -> Tensor:  # [B, C, H, W]
    """``y`` in x's dtype; channels-last where x is that and not contiguous, else contiguous."""
    _, channels, height, width = y.shape
    strides = (channels * height * width, height * width, width, 1)
    if not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last):
        strides = (height * width * channels, 1, width * channels, channels)
    return torch.empty_strided(y.shape, strides, dtype=x.dtype, device=x.device).copy_(y)


def _wide(t: Tensor) -> Tensor:
    """The type sums are made in: float32 for the 16-bit types, else its own."""
    return t.float() if t.dtype in (torch.float16, torch.bfloat16) else t


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None, mask: str, taps: Tensor | None, colours: int) -> Tensor:
    used = _used_weights(mask, taps, colours, weight)
    # where, not a product: a masked weight may be NaN.
    weight = torch.where(used, _wide(weight), 0)
    padding = (weight.shape[2] // 2, weight.shape[3] // 2)
    return F.conv2d(_wide(x), weight, None if bias is None else _wide(bias), padding=padding)


def masked_conv2d(
    x: Tensor,  # [B, C_in, H, W]
    weight: Tensor,  # [C_out, C_in, kh, kw]
    bias: Tensor | None,  # [C_out]
    mask: str,
    taps: Tensor | None,  # [kh, kw] bool
    colours: int,
) -> Tensor:  # [B, C_out, H, W]
    """conv2d with the weights outside the mask replaced by zero, same padding, stride 1."""
    return _as_input(_convolve(x, weight, bias, mask, taps, colours), x)


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
    """Gradients to x, weight and bias; an empty tensor for one that is not needed."""
    used = _used_weights(mask, taps, colours, weight)
    padding = (weight.shape[2] // 2, weight.shape[3] // 2)
    wide = _wide(grad)
    grad_x, grad_weight, grad_bias = x.new_empty(0), weight.new_empty(0), weight.new_empty(0)
    if need_x:
        masked = torch.where(used, _wide(weight), 0)
        grad_x = torch.empty_like(x).copy_(conv2d_input(x.shape, masked, wide, padding=padding))
    if need_weight:
        dense = conv2d_weight(_wide(x), weight.shape, wide, padding=padding)
        grad_weight = torch.where(used, dense, 0).to(weight.dtype).contiguous()
    if need_bias:
        grad_bias = wide.sum((0, 2, 3)).to(weight.dtype)
    return grad_x, grad_weight, grad_bias


def gated_masked_conv2d(
    x: Tensor,  # [B, C_in, H, W]
    weight: Tensor,  # [2C, C_in, kh, kw]
    bias: Tensor | None,  # [2C]
    condition: Tensor | None,  # [B, 2C] or [B, 2C, H, W]
    mask: str,
    taps: Tensor | None,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(tanh(a) sigmoid(b), tanh(a), sigmoid(b)); the last two empty unless ``save``."""
    y = _convolve(x, weight, bias, mask, taps, 1)
    if condition is not None:
        y = y + _wide(condition if condition.dim() == 4 else condition[:, :, None, None])
    a, b = y.chunk(2, dim=1)
    tanh_a, sigmoid_b = a.tanh(), b.sigmoid()
    out = _as_input(tanh_a * sigmoid_b, x)
    if not save:
        return out, x.new_empty(0), x.new_empty(0)
    return out, _as_input(tanh_a, x), _as_input(sigmoid_b, x)


def gate_backward(
    grad: Tensor,  # [B, C, H, W]
    tanh_a: Tensor,  # [B, C, H, W]
    sigmoid_b: Tensor,  # [B, C, H, W]
) -> Tensor:  # [B, 2C, H, W]
    """Gradient at the pre-activations."""
    g, t, s = _wide(grad), _wide(tanh_a), _wide(sigmoid_b)
    both = torch.cat([g * s * (1 - t * t), g * t * (s * (1 - s))], dim=1)
    return _as_input(both, tanh_a)
