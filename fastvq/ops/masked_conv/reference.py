"""The definition of the masked convolution, plain and gated, in plain torch; gradients too."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_input, conv2d_weight

from fastvq.ops.masked_conv.masks import active_weights

__all__ = ["gated", "gated_backward", "like_input", "masked_conv2d", "masked_conv2d_backward"]


def like_input(
    x: Tensor,  # [B, C_in, H, W]
    channels: int,
) -> Tensor:  # [B, channels, H, W], empty
    """Channels-last where x is, contiguous otherwise."""
    last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    memory_format = torch.channels_last if last else torch.contiguous_format
    return torch.empty(
        (x.shape[0], channels, *x.shape[2:]), dtype=x.dtype, device=x.device, memory_format=memory_format
    )


def _wide(t: Tensor) -> Tensor:
    """The type sums are made in: float32 for the 16-bit types, else its own."""
    return t.float() if t.dtype in (torch.float16, torch.bfloat16) else t


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None, mask: str, taps: Tensor | None, colours: int) -> Tensor:
    used = active_weights(mask, taps, colours, weight.shape, weight.device)
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
    return like_input(x, weight.shape[0]).copy_(_convolve(x, weight, bias, mask, taps, colours))


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
    used = active_weights(mask, taps, colours, weight.shape, weight.device)
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


def gated(
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
    channels = weight.shape[0] // 2
    out = like_input(x, channels).copy_(tanh_a * sigmoid_b)
    if not save:
        return out, x.new_empty(0), x.new_empty(0)
    return out, like_input(x, channels).copy_(tanh_a), like_input(x, channels).copy_(sigmoid_b)


def gated_backward(
    grad: Tensor,  # [B, C, H, W]
    tanh_a: Tensor,  # [B, C, H, W]
    sigmoid_b: Tensor,  # [B, C, H, W]
) -> Tensor:  # [B, 2C, H, W]
    """Gradient at the pre-activations."""
    g, t, s = _wide(grad), _wide(tanh_a), _wide(sigmoid_b)
    both = torch.cat([g * s * (1 - t * t), g * t * (s * (1 - s))], dim=1)
    return like_input(tanh_a, both.shape[1]).copy_(both)
