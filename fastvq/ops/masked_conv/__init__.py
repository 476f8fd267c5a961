"""Masked convolution, plain and gated."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from fastvq._checks import FLOATS, check_backend_name, check_float, check_same_device
from fastvq.backends import triton as triton_backend
from fastvq.backends.golden import calls as golden_calls
from fastvq.backends.golden import gate
from fastvq.backends.registry import bound_backend
from fastvq.ops._contract import check_gradient
from fastvq.ops._op import Autograd, Kernel, Op, register, without_backend
from fastvq.ops._transforms import active, no_forward_mode
from fastvq.ops.masked_conv import cpu, cuda, reference
from fastvq.ops.masked_conv.call import ConvBackwardCall, ConvCall, GateBackwardCall, GatedConvCall
from fastvq.ops.masked_conv.common import like_input
from fastvq.ops.masked_conv.contract import (
    as_autocast,
    check_arguments,
    check_backward,
    check_dtypes,
    check_gate,
    check_operands,
)
from fastvq.ops.masked_conv.masks import MASKS, MaskName

__all__ = [
    "GATED_CONV",
    "GATE_BACKWARD",
    "MASKED_CONV",
    "MASKED_CONV_BACKWARD",
    "MASKS",
    "gated_masked_conv2d",
    "masked_conv2d",
]

OP = "fastvq.ops.masked_conv2d"
GATED = "fastvq.ops.gated_masked_conv2d"


def masked_conv2d(
    x: Tensor,  # [B, C_in, H, W]
    weight: Tensor,  # [C_out, C_in, kh, kw]
    bias: Tensor | None = None,  # [C_out]
    *,
    mask: MaskName | Tensor = "B",  # or [kh, kw] bool
    colours: int = 1,
    backend: Literal["cpu", "triton", "cuda", "reference"] | None = None,
) -> Tensor:  # [B, C_out, H, W]
    """Convolution, stride 1 and same padding, that uses only the weights of its mask (van den Oord et al. 2016).

    .. math:: out_{b,o,i,j} = bias_o + \\sum_{(y,x) \\in mask} \\sum_c weight_{o,c,y,x} \\, x_{b,c,i+y-kh/2,j+x-kw/2}

    with zeros outside the image. Masks, in a kernel of odd sizes kh and kw:

    - "A": taps before the centre in raster order; "B": those and the centre;
    - "vertical-A": rows above the centre's; "vertical-B": those and the whole row of the centre;
    - "horizontal-A": taps left of the centre in its row; "horizontal-B": those and the centre;
    - a bool tensor [kh, kw]: True marks a tap that counts.

    With ``colours=3`` the channels are three equal contiguous groups R, G, B, in and out, and at the centre tap a group
    sees those before it ("A", "horizontal-A") or up to itself ("B", "horizontal-B").

    Weights outside the mask may hold anything, NaN included; they are never read into a result, and their gradient is
    exactly zero. The work is that of the active taps.

    Args:
        x: float32, float64, float16 or bfloat16, contiguous or channels-last (the output is as x), any strides.
            float32, float16 and bfloat16 accumulate in float32, float64 in float64. Under autocast: its dtype.
        weight, bias: of x's dtype.
        mask: see above.
        colours: 1, or the number of ordered channel groups.
        backend: one of ``fastvq.build_info()["backends"]``; None: the fastest that can serve. A named one never
            falls back.

    Returns:
        x's dtype. On the CPU every element is summed in one order, whatever the number of threads, the batch and its
        place in the image, and so are its gradients: results are bit-identical for any number of threads. bfloat16
        tensors are multiplied on AMX tiles where the processor has them: exact products, float32 sums in the order
        of that instruction, numbers below 2^-126 taken for 0, and a pixel that is not finite may make the gradient
        of any tap NaN; elsewhere they are widened and computed in float32. The Triton
        kernels, for CUDA tensors, sum in an order that the sizes and the card's generation decide, the same in every
        run, and an image alone as in a batch; they add nothing atomically. Their products of float32 are made of three
        products of TF32 pairs, with an error below 3 * 2^-22 of the product, whatever ``torch.backends`` allows TF32.
        In the CUDA C++ kernels the order follows from the sizes alone, and float32 products are fused multiply-adds.

    Raises:
        ValueError: shapes, devices or kernel sizes that do not fit, an unknown mask, channels that ``colours`` does
            not divide, colours with a mask that they mean nothing to, a backend that cannot serve.
        TypeError: arguments that are no floating-point tensors of one dtype, a mask that is no bool tensor.
        RuntimeError: a second derivative is asked for.

    Example:
        >>> x, weight = torch.randn(4, 16, 32, 32), torch.randn(24, 16, 5, 5)
        >>> masked_conv2d(x, weight, mask="A").shape
        torch.Size([4, 24, 32, 32])
    """
    check_backend_name(OP, backend)
    kind, taps = check_arguments(OP, x, weight, bias, mask, colours)
    x, weight, bias = as_autocast(x, weight, bias)
    check_dtypes(OP, x, weight, bias)
    return _conv(x, weight, bias, kind, taps, colours, backend)


def gated_masked_conv2d(
    x: Tensor,  # [B, C_in, H, W]
    weight: Tensor,  # [2C, C_in, kh, kw]
    bias: Tensor | None = None,  # [2C]
    condition: Tensor | None = None,  # [B, 2C] or [B, 2C, H, W]
    *,
    mask: MaskName | Tensor = "B",  # or [kh, kw] bool
    backend: Literal["cpu", "triton", "cuda", "reference"] | None = None,
) -> Tensor:  # [B, C, H, W]
    """Masked convolution and its gate in one (van den Oord et al. 2016, "Conditional Image Generation with PixelCNN
    Decoders").

    .. math:: out = \\tanh(a + condition_a) \\, \\sigma(b + condition_b)

    where a and b are the first and the last C channels of ``masked_conv2d(x, weight, bias, mask=mask)``. Without
    gradients no pre-activation tensor is written; with them the two factors are kept for backward.

    On the CPU and in the CUDA C++ kernels tanh and sigmoid are each within 6 * 2^-24 of the true value, relative, in
    the Triton kernels within 8 * 2^-24 (float64: torch's own, unfused). Layouts, dtypes, determinism, ``mask`` and
    ``backend`` are as in ``masked_conv2d``.

    Args:
        condition: a vector per image or a map, of x's dtype, added before the gate.

    Raises:
        ValueError, TypeError: as ``masked_conv2d``; an odd number of output channels; a condition of another shape.
        RuntimeError: a second derivative is asked for.

    Example:
        >>> x, weight = torch.randn(4, 16, 32, 32), torch.randn(48, 16, 3, 3)
        >>> gated_masked_conv2d(x, weight, condition=torch.randn(4, 48)).shape
        torch.Size([4, 24, 32, 32])
    """
    check_backend_name(GATED, backend)
    kind, taps = check_arguments(GATED, x, weight, bias, mask, 1)
    if weight.shape[0] % 2:
        raise ValueError(
            f"{GATED}: weight must be [2 * C, C_in, kh, kw], a and b one after the other, got {list(weight.shape)}"
        )
    if condition is not None:
        check_float(GATED, "condition", condition)
        check_same_device(GATED, "x", x, "condition", condition)
        vector = [x.shape[0], weight.shape[0]]
        if list(condition.shape) not in (vector, [*vector, *x.shape[2:]]):
            raise ValueError(
                f"{GATED}: condition must be {vector} or {[*vector, *x.shape[2:]]}, got {list(condition.shape)}; "
                "bring a map to the size of x first"
            )
    x, weight, bias, condition = as_autocast(x, weight, bias, condition)
    check_dtypes(GATED, x, weight, bias, condition)
    tensors = (x, weight, bias, condition)
    save = (torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)) or active()
    return _gated(x, weight, bias, condition, kind, taps, save, backend)[0]


def _check_conv(call: ConvCall) -> None:
    check_operands(OP, call.x, call.weight, call.bias, call.mask, call.taps, call.colours)


def _setup_context(ctx: Any, call: ConvCall, output: Tensor) -> None:
    ctx.mask, ctx.colours, ctx.has_bias = call.mask, call.colours, call.bias is not None
    ctx.backend = bound_backend(call.backend)
    ctx.save_for_backward(call.x, call.weight, call.taps)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, taps = ctx.saved_tensors
    need_x, need_weight = ctx.needs_input_grad[:2]
    need_bias = ctx.needs_input_grad[2] and ctx.has_bias
    grads = _conv_backward(grad, x, weight, ctx.mask, taps, ctx.colours, need_x, need_weight, need_bias, ctx.backend)
    needed = (need_x, need_weight, need_bias)
    return *(g if need else None for g, need in zip(grads, needed, strict=True)), None, None, None, None


def _check_conv_backward(call: ConvBackwardCall) -> None:
    check_backward(f"{OP}_backward", call.grad, call.x, call.weight, call.mask, call.taps, call.colours)


def _fake_backward(call: ConvBackwardCall) -> tuple[Tensor, Tensor, Tensor]:
    x, weight = call.x, call.weight
    return (
        torch.empty_like(x) if call.need_x else x.new_empty(0),
        weight.new_empty(weight.shape) if call.need_weight else weight.new_empty(0),
        weight.new_empty(weight.shape[:1]) if call.need_bias else weight.new_empty(0),
    )


def _check_gated(call: GatedConvCall) -> None:
    check_operands(GATED, call.x, call.weight, call.bias, call.mask, call.taps, 1)
    check_gate(GATED, call.x, call.weight, call.condition)


def _fake_gated(call: GatedConvCall) -> tuple[Tensor, Tensor, Tensor]:
    x, channels = call.x, call.weight.shape[0] // 2
    tanh_a, sigmoid_b = (like_input(x, channels) if call.save else x.new_empty(0) for _ in range(2))
    return like_input(x, channels), tanh_a, sigmoid_b


def _setup_gated(ctx: Any, call: GatedConvCall, output: tuple[Tensor, ...]) -> None:
    _out, tanh_a, sigmoid_b = output
    ctx.mark_non_differentiable(tanh_a, sigmoid_b)
    ctx.set_materialize_grads(False)
    ctx.mask, ctx.colours, ctx.has_bias, ctx.save = call.mask, 1, call.bias is not None, call.save
    ctx.condition_dim = 0 if call.condition is None else call.condition.dim()
    ctx.backend = bound_backend(call.backend)
    ctx.save_for_backward(call.x, call.weight, call.taps, tanh_a, sigmoid_b)


def _gated_conv_backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 8
    if not ctx.save:
        raise RuntimeError(f"{GATED}: backward needs the factors of the gate, which save=False did not keep")
    x, weight, taps, tanh_a, sigmoid_b = ctx.saved_tensors
    need_x, need_weight, need_bias, need_condition = ctx.needs_input_grad[:4]
    grad_ab = _gate_backward(grad, tanh_a, sigmoid_b, ctx.backend)
    needed = (need_x, need_weight, need_bias and ctx.has_bias)
    grads = _conv_backward(grad_ab, x, weight, ctx.mask, taps, 1, *needed, ctx.backend)
    grad_condition = None
    if need_condition and ctx.condition_dim:
        grad_condition = grad_ab if ctx.condition_dim == 4 else grad_ab.sum((2, 3))
    return *(g if need else None for g, need in zip(grads, needed, strict=True)), grad_condition, None, None, None, None


def _check_gate_backward(call: GateBackwardCall) -> None:
    op, grad = "fastvq.ops.gate_backward", call.grad
    check_gradient(op, "tanh_a", call.tanh_a, grad)
    check_gradient(op, "sigmoid_b", call.sigmoid_b, grad)
    if grad.dim() != 4 or grad.dtype not in FLOATS:
        raise ValueError(f"{op}: grad must be a float [B, C, H, W], got {grad.dtype} {list(grad.shape)}")


def _no_second_derivative(ctx: Any, *grads: Tensor | None) -> tuple[None, ...]:
    raise RuntimeError(
        f"{OP}: a second derivative was asked for (create_graph=True), which is not implemented; "
        "use fastvq.ops.masked_conv.reference, which is plain torch"
    )


def _jvp(
    ctx: Any, x_tangent: Tensor | None, weight_tangent: Tensor | None, bias_tangent: Tensor | None, *_: None
) -> Tensor | None:
    """The op is linear in x and bias, and in weight and bias."""
    x, weight, taps = ctx.saved_tensors[:3]
    total: Tensor | None = None
    for image, kernel in ((x_tangent, weight), (x, weight_tangent)):
        if image is not None and kernel is not None:
            part = _conv(image, kernel, bias_tangent, ctx.mask, taps, ctx.colours, ctx.backend)
            total, bias_tangent = part if total is None else total + part, None
    if bias_tangent is not None:
        total = bias_tangent[:, None, None].expand(x.shape[0], -1, *x.shape[2:])
    return total


def _gated_jvp(
    ctx: Any, x_tangent: Tensor | None, weight_tangent: Tensor | None, bias_tangent: Tensor | None,
    condition_tangent: Tensor | None, *_: None,
) -> tuple[Tensor | None, None, None]:  # fmt: skip
    tangent = _jvp(ctx, x_tangent, weight_tangent, bias_tangent)
    if condition_tangent is not None:
        if condition_tangent.dim() == 2:
            condition_tangent = condition_tangent[:, :, None, None]
        tangent = condition_tangent if tangent is None else tangent + condition_tangent
    if tangent is None:
        return None, None, None
    tanh_a, sigmoid_b = ctx.saved_tensors[3:]
    wide = torch.float64 if tanh_a.dtype == torch.float64 else torch.float32
    a, b = tangent.to(wide).chunk(2, dim=1)
    t, s = tanh_a.to(wide), sigmoid_b.to(wide)
    return (s * ((1 - t * t) * a + t * (1 - s) * b)).to(tanh_a.dtype), None, None


def _fold(info: Any, in_dims: tuple[int | None, ...], x: Tensor, *others: Any) -> tuple[Tensor, int] | None:
    """A batch of images and one weight: a larger batch."""
    if in_dims[0] is None or any(d is not None for d in in_dims[1:]):
        return None
    out = _conv(x.movedim(in_dims[0], 0).flatten(0, 1), *others)
    return out.unflatten(0, (info.batch_size, -1)), 0


def _kernels(name: str) -> dict[str, Kernel[Any]]:
    """The functions ``name`` of the backends' files. They take a call's arguments without the backend."""
    triton = triton_backend.lazy_function("fastvq.ops.masked_conv.triton_ops", name)
    return {
        "cpu": Kernel(without_backend(getattr(cpu, name)), cpu.why_unsupported),
        "triton": Kernel(without_backend(triton)),
        "cuda": Kernel(without_backend(getattr(cuda, name)), cuda.why_unsupported, golden=(_golden,)),
        "reference": Kernel(without_backend(getattr(reference, name))),
    }


def _golden(op: Op[Any], backend: str, call: Any) -> str | None:
    """The convolution and its gradients, of the kernels that all four ops share."""

    def both_ways(name: str) -> Callable[..., tuple[Tensor, ...]]:
        def run(x: Tensor, weight: Tensor, bias: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
            out = MASKED_CONV.kernels[name].run(ConvCall(x, weight, bias, "B", None, 1, name))
            backward = ConvBackwardCall(grad, x, weight, "B", None, 1, True, True, True, name)
            return out, *MASKED_CONV_BACKWARD.kernels[name].run(backward)

        return run

    device = op.device(call)
    return gate.check_op(
        backend, "masked_conv2d", device, both_ways(backend), both_ways("reference"), golden_calls.masked_conv
    )


# No convolution is measured on a GPU yet: Triton comes before CUDA C++, as in the lookup.
MASKED_CONV = Op(
    "masked_conv2d",
    ConvCall,
    _kernels("masked_conv2d"),
    check=_check_conv,
    fake=lambda call: like_input(call.x, call.weight.shape[0]),
    autograd=Autograd(_backward, _jvp, _setup_context, _fold),
)
NO_SECOND = "the derivative of its gradient is not implemented"
MASKED_CONV_BACKWARD = Op(
    "masked_conv2d_backward",
    ConvBackwardCall,
    _kernels("masked_conv2d_backward"),
    check=_check_conv_backward,
    fake=_fake_backward,
    returns="(Tensor grad_x, Tensor grad_weight, Tensor grad_bias)",
    autograd=Autograd(_no_second_derivative, no_forward_mode(OP, NO_SECOND)),
    public_name=OP,
)
GATED_CONV = Op(
    "gated_masked_conv2d",
    GatedConvCall,
    _kernels("gated_masked_conv2d"),
    check=_check_gated,
    fake=_fake_gated,
    returns="(Tensor out, Tensor tanh_a, Tensor sigmoid_b)",
    autograd=Autograd(_gated_conv_backward, _gated_jvp, _setup_gated),
)
GATE_BACKWARD = Op(
    "gate_backward",
    GateBackwardCall,
    _kernels("gate_backward"),
    check=_check_gate_backward,
    fake=lambda call: like_input(call.tanh_a, 2 * call.tanh_a.shape[1]),
    autograd=Autograd(_no_second_derivative, no_forward_mode(GATED, NO_SECOND)),
    public_name=GATED,
)
_conv, _conv_backward = register(MASKED_CONV), register(MASKED_CONV_BACKWARD)
_gated, _gate_backward = register(GATED_CONV), register(GATE_BACKWARD)
