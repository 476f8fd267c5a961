"""The masked convolution by the C++ kernels: active taps only, sums in registers, gate fused."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastvq.backends import cpu as cpu_backend
from fastvq.backends import views
from fastvq.backends.views import address
from fastvq.ops.masked_conv.common import like_input
from fastvq.ops.masked_conv.masks import active_taps

__all__ = ["gate_backward", "gated_masked_conv2d", "masked_conv2d", "masked_conv2d_backward", "why_unsupported"]


def why_unsupported(call: Any) -> str | None:
    dtype = call[0].dtype  # of x, or of a gradient, which has the same
    if dtype not in (torch.float32, torch.bfloat16):
        return f"it computes in float32, for float32 and bfloat16 tensors, x is {dtype}"
    return None


def _weight_view(weight: Tensor, mask: str, taps: Tensor | None, colours: int) -> tuple[Any, ...]:
    """A contiguous ``weight`` as the MaskedWeight of csrc/fastvq_cpu.h."""
    active = active_taps(mask, taps, weight.shape[2], weight.shape[3], colours)
    return (
        address(weight),
        views.DTYPES[weight.dtype],
        list(weight.shape),
        active,
        colours,
        not mask.endswith("A"),
    )


def _bias(bias: Tensor | None) -> tuple[Tensor | None, int]:
    """float32 and contiguous, and its address (0 for none)."""
    if bias is None:
        return None, 0
    bias = bias.float().contiguous()
    return bias, address(bias)


@cpu_backend.cpu_call
def masked_conv2d(
    x: Tensor,  # [B, C_in, H, W]
    weight: Tensor,  # [C_out, C_in, kh, kw]
    bias: Tensor | None,  # [C_out]
    mask: str,
    taps: Tensor | None,  # [kh, kw] bool
    colours: int,
) -> Tensor:  # [B, C_out, H, W]
    out, weight = like_input(x, weight.shape[0]), weight.contiguous()
    kept, address = _bias(bias)
    cpu_backend._cpu.masked_conv_forward(
        views.image_view(x), _weight_view(weight, mask, taps, colours), address, views.image_view(out),
        cpu_backend.isa(), torch.get_num_threads(),
    )  # fmt: skip
    del kept  # it had to live until here
    return out


@cpu_backend.cpu_call
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
    weight = weight.contiguous()
    view = _weight_view(weight, mask, taps, colours)
    settings = cpu_backend.isa(), torch.get_num_threads()
    grad_x, grad_weight, grad_bias = x.new_empty(0), weight.new_empty(0), weight.new_empty(0)
    if need_x:
        grad_x = torch.empty_like(x)
        cpu_backend._cpu.masked_conv_input_grad(views.image_view(grad), view, views.image_view(grad_x), *settings)
    if need_weight:
        sums = torch.empty(weight.shape, dtype=torch.float32, device="cpu")
        bias_sums = torch.empty(weight.shape[0], dtype=torch.float32, device="cpu")
        cpu_backend._cpu.masked_conv_weight_grad(
            views.image_view(x), views.image_view(grad), view, address(sums),
            address(bias_sums) if need_bias else 0, *settings,
        )  # fmt: skip
        grad_weight = sums.to(weight.dtype)
        if need_bias:
            grad_bias = bias_sums.to(weight.dtype)
    elif need_bias:
        grad_bias = grad.sum((0, 2, 3), dtype=torch.float32).to(weight.dtype)
    return grad_x, grad_weight, grad_bias


@cpu_backend.cpu_call
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
    out, weight = like_input(x, channels), weight.contiguous()
    tanh_a, sigmoid_b = (like_input(x, channels) if save else x.new_empty(0) for _ in range(2))
    kept, address = _bias(bias)
    if condition is not None and condition.dim() == 2:
        condition = condition[:, :, None, None].expand(-1, -1, *x.shape[2:])
    cpu_backend._cpu.gated_masked_conv_forward(
        views.image_view(x), _weight_view(weight, mask, taps, 1), address,
        None if condition is None else views.image_view(condition),
        views.image_view(tanh_a) if save else None, views.image_view(sigmoid_b) if save else None,
        views.image_view(out), cpu_backend.isa(), torch.get_num_threads(),
    )  # fmt: skip
    del kept  # it had to live until here
    return out, tanh_a, sigmoid_b


@cpu_backend.cpu_call
def gate_backward(
    grad: Tensor,  # [B, C, H, W]
    tanh_a: Tensor,  # [B, C, H, W]
    sigmoid_b: Tensor,  # [B, C, H, W]
) -> Tensor:  # [B, 2C, H, W]
    # The saved factors are dense in one of two orders, which the gradient is brought to.
    batch, channels, height, width = tanh_a.shape
    last = not tanh_a.is_contiguous()
    memory_format = torch.channels_last if last else torch.contiguous_format
    g, t, s = (v.float().contiguous(memory_format=memory_format) for v in (grad, tanh_a, sigmoid_b))
    shape = (batch, 2 * channels, height, width)
    both = torch.empty(shape, dtype=torch.float32, device="cpu", memory_format=memory_format)
    outer, inner = (batch * height * width, channels) if last else (batch, channels * height * width)
    cpu_backend._cpu.gate_backward(
        address(g), address(t), address(s), address(both), outer, inner, cpu_backend.isa(),
        torch.get_num_threads(),
    )  # fmt: skip
    return both.to(tanh_a.dtype)
