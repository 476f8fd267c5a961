"""The masked convolution by the CUDA C++ kernels: one product over the active taps, on the tensor core where the type
has one, gate fused."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastvq.backends import cuda as cuda_backend
from fastvq.backends import views
from fastvq.backends.views import address
from fastvq.ops.masked_conv.common import like_input
from fastvq.ops.masked_conv.masks import tap_range

__all__ = ["gate_backward", "gated_masked_conv2d", "masked_conv2d", "masked_conv2d_backward", "why_unsupported"]


def why_unsupported(call: Any) -> str | None:
    if call[0].dtype == torch.float64:  # of x, or of a gradient, which has the same
        return "it adds in float32, for float32, float16 and bfloat16 tensors, x is torch.float64"
    return None


def _weight_view(weight: Tensor, mask: str, used: Tensor | None, colours: int) -> tuple[Any, ...]:
    """Contiguous ``weight`` and ``used`` as the ConvWeight of csrc/fastvq_cuda.h."""
    places = tap_range(mask, weight.shape[2], weight.shape[3], colours)
    return (
        address(weight), views.DTYPES[weight.dtype], list(weight.shape), places.start, len(places),
        0 if used is None else address(used), colours, not mask.endswith("A"),
    )  # fmt: skip


def _address(t: Tensor | None) -> int:
    return 0 if t is None else address(t)


def masked_conv2d(
    x: Tensor,  # [B, C_in, H, W]
    weight: Tensor,  # [C_out, C_in, kh, kw]
    bias: Tensor | None,  # [C_out]
    mask: str,
    taps: Tensor | None,  # [kh, kw] bool
    colours: int,
) -> Tensor:  # [B, C_out, H, W]
    with cuda_backend.on_device_of(x):
        out, weight = like_input(x, weight.shape[0]), weight.contiguous()
        used, bias = (None if t is None else t.contiguous() for t in (taps, bias))
        view = _weight_view(weight, mask, used, colours)
        workspace = cuda_backend.workspace(x, cuda_backend._cuda.masked_conv_workspace(view, False, False))
        cuda_backend._cuda.masked_conv_forward(
            views.image_view(x), view, _address(bias), views.image_view(out), address(workspace),
            cuda_backend.stream(x),
        )  # fmt: skip
    return out


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
    grad_x = torch.empty_like(x) if need_x else x.new_empty(0)
    with cuda_backend.on_device_of(x):
        weight, used = weight.contiguous(), None if taps is None else taps.contiguous()
        grad_weight = weight.new_empty(weight.shape if need_weight else 0)
        grad_bias = weight.new_empty(weight.shape[:1] if need_bias else 0)
        view, stream = _weight_view(weight, mask, used, colours), cuda_backend.stream(x)
        image, incoming = views.image_view(x), views.image_view(grad)
        if need_x:
            workspace = cuda_backend.workspace(x, cuda_backend._cuda.masked_conv_workspace(view, False, True))
            cuda_backend._cuda.masked_conv_input_grad(
                incoming, view, views.image_view(grad_x), address(workspace), stream
            )
        if need_weight or need_bias:
            workspace = cuda_backend.workspace(x, cuda_backend._cuda.masked_conv_weight_grad_workspace(image, view))
            cuda_backend._cuda.masked_conv_weight_grad(
                image, incoming, view, address(grad_weight) if need_weight else 0,
                address(grad_bias) if need_bias else 0, address(workspace), stream,
            )  # fmt: skip
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
    channels = weight.shape[0] // 2
    with cuda_backend.on_device_of(x):
        out, weight = like_input(x, channels), weight.contiguous()
        tanh_a, sigmoid_b = (like_input(x, channels) if save else x.new_empty(0) for _ in range(2))
        used, bias = (None if t is None else t.contiguous() for t in (taps, bias))
        if condition is not None and condition.dim() == 2:
            condition = condition[:, :, None, None].expand(-1, -1, *x.shape[2:])
        view = _weight_view(weight, mask, used, 1)
        workspace = cuda_backend.workspace(x, cuda_backend._cuda.masked_conv_workspace(view, True, False))
        cuda_backend._cuda.gated_masked_conv_forward(
            views.image_view(x), view, _address(bias), None if condition is None else views.image_view(condition),
            views.image_view(tanh_a) if save else None, views.image_view(sigmoid_b) if save else None,
            views.image_view(out), address(workspace), cuda_backend.stream(x),
        )  # fmt: skip
    return out, tanh_a, sigmoid_b


def gate_backward(
    grad: Tensor,  # [B, C, H, W]
    tanh_a: Tensor,  # [B, C, H, W]
    sigmoid_b: Tensor,  # [B, C, H, W]
) -> Tensor:  # [B, 2C, H, W]
    with cuda_backend.on_device_of(grad):
        both = like_input(tanh_a, 2 * tanh_a.shape[1])
        cuda_backend._cuda.gate_backward(
            views.image_view(grad), views.image_view(tanh_a), views.image_view(sigmoid_b), views.image_view(both),
            cuda_backend.stream(grad),
        )  # fmt: skip
    return both
