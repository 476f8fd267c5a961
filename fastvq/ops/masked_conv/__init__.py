"""Masked convolution, plain and gated."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastvq._checks import FLOATS, check_backend_name, check_float, check_integer, check_option, check_same_device
from fastvq.backends import triton as triton_backend
from fastvq.backends.registry import Implementation, bound_backend, choose
from fastvq.ops._contract import check_gradient
from fastvq.ops._library import register
from fastvq.ops._transforms import active, no_forward_mode
from fastvq.ops.masked_conv import cpu, cuda, reference
from fastvq.ops.masked_conv.common import like_input
from fastvq.ops.masked_conv.contract import check_backward, check_gate, check_operands
from fastvq.ops.masked_conv.masks import COLOUR_MASKS, MASKS

__all__ = ["MASKS", "gated_masked_conv2d", "masked_conv2d"]

OP = "fastvq.ops.masked_conv2d"
GATED = "fastvq.ops.gated_masked_conv2d"


def _table(name: str) -> dict[str, Implementation]:
    return {
        "cpu": Implementation(getattr(cpu, name), cpu.why_unsupported),
        "triton": Implementation(
            triton_backend.lazy_function("fastvq.ops.masked_conv.triton_ops", name), triton_backend.why_unsupported
        ),
        "cuda": Implementation(getattr(cuda, name), cuda.why_unsupported),
        "reference": Implementation(getattr(reference, name), lambda *_: None),
    }


FORWARD, BACKWARD = _table("masked_conv2d"), _table("masked_conv2d_backward")
GATED_FORWARD, GATE_BACKWARD = _table("gated"), _table("gated_backward")


def masked_conv2d(
    x: Tensor,  # [B, C_in, H, W]
    weight: Tensor,  # [C_out, C_in, kh, kw]
    bias: Tensor | None = None,  # [C_out]
    *,
    mask: str | Tensor = "B",  # or [kh, kw] bool
    colours: int = 1,
    backend: str | None = None,
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
    mask, taps = _check(OP, x, weight, bias, mask, colours)
    x, weight, bias = _autocast(x, weight, bias)
    _check_dtypes(OP, x, weight, bias)
    return _conv(x, weight, bias, mask, taps, colours, backend)


def gated_masked_conv2d(
    x: Tensor,  # [B, C_in, H, W]
    weight: Tensor,  # [2C, C_in, kh, kw]
    bias: Tensor | None = None,  # [2C]
    condition: Tensor | None = None,  # [B, 2C] or [B, 2C, H, W]
    *,
    mask: str | Tensor = "B",  # or [kh, kw] bool
    backend: str | None = None,
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
    mask, taps = _check(GATED, x, weight, bias, mask, 1)
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
    x, weight, bias, condition = _autocast(x, weight, bias, condition)
    _check_dtypes(GATED, x, weight, bias, condition)
    tensors = (x, weight, bias, condition)
    save = (torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)) or active()
    return _gated(x, weight, bias, condition, mask, taps, save, backend)[0]


def _check(
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


def _autocast(*tensors: Tensor | None) -> list[Any]:
    """Under autocast, its dtype, as torch's own convolutions take it."""
    device = next(t for t in tensors if t is not None).device.type
    if not torch.is_autocast_enabled(device):
        return list(tensors)
    dtype = torch.get_autocast_dtype(device)
    return [t.to(dtype) if t is not None and t.dtype != torch.float64 else t for t in tensors]


def _check_dtypes(op: str, x: Tensor, *others: Tensor | None) -> None:
    for name, t in zip(("weight", "bias", "condition"), others, strict=False):
        if t is not None and t.dtype != x.dtype:
            raise TypeError(f"{op}: {name} must be {x.dtype}, as x, got {t.dtype}; convert one with .to()")


def _run(
    x: Tensor, weight: Tensor, bias: Tensor | None, mask: str, taps: Tensor | None, colours: int, backend: str | None
) -> Tensor:
    check_operands(OP, x, weight, bias, mask, taps, colours)
    arguments = (x, weight, bias, mask, taps, colours)
    return choose(OP, FORWARD, backend, *arguments)(*arguments)


def _fake(
    x: Tensor, weight: Tensor, bias: Tensor | None, mask: str, taps: Tensor | None, colours: int, backend: str | None
) -> Tensor:
    return like_input(x, weight.shape[0])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias, ctx.mask, taps, ctx.colours, backend = inputs
    ctx.backend = bound_backend(backend)
    ctx.has_bias = bias is not None
    ctx.save_for_backward(x, weight, taps)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, taps = ctx.saved_tensors
    need_x, need_weight = ctx.needs_input_grad[:2]
    need_bias = ctx.needs_input_grad[2] and ctx.has_bias
    grads = _conv_backward(grad, x, weight, ctx.mask, taps, ctx.colours, need_x, need_weight, need_bias, ctx.backend)
    needed = (need_x, need_weight, need_bias)
    return *(g if need else None for g, need in zip(grads, needed, strict=True)), None, None, None, None


def _run_backward(
    grad: Tensor, x: Tensor, weight: Tensor, mask: str, taps: Tensor | None, colours: int, need_x: bool,
    need_weight: bool, need_bias: bool, backend: str | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    check_backward(f"{OP}_backward", grad, x, weight, mask, taps, colours)
    arguments = (grad, x, weight, mask, taps, colours, need_x, need_weight, need_bias)
    return choose(OP, BACKWARD, backend, x, *arguments)(*arguments)


def _fake_backward(
    grad: Tensor, x: Tensor, weight: Tensor, mask: str, taps: Tensor | None, colours: int, need_x: bool,
    need_weight: bool, need_bias: bool, backend: str | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return (
        torch.empty_like(x) if need_x else x.new_empty(0),
        weight.new_empty(weight.shape) if need_weight else weight.new_empty(0),
        weight.new_empty(weight.shape[:1]) if need_bias else weight.new_empty(0),
    )


def _run_gated(
    x: Tensor, weight: Tensor, bias: Tensor | None, condition: Tensor | None, mask: str, taps: Tensor | None,
    save: bool, backend: str | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    check_operands(GATED, x, weight, bias, mask, taps, 1)
    check_gate(GATED, x, weight, condition)
    arguments = (x, weight, bias, condition, mask, taps, save)
    return choose(GATED, GATED_FORWARD, backend, *arguments)(*arguments)


def _fake_gated(
    x: Tensor, weight: Tensor, bias: Tensor | None, condition: Tensor | None, mask: str, taps: Tensor | None,
    save: bool, backend: str | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    channels = weight.shape[0] // 2
    tanh_a, sigmoid_b = (like_input(x, channels) if save else x.new_empty(0) for _ in range(2))
    return like_input(x, channels), tanh_a, sigmoid_b


def _setup_gated(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, bias, condition, ctx.mask, taps, save, backend = inputs
    ctx.backend = bound_backend(backend)
    _out, tanh_a, sigmoid_b = output
    ctx.mark_non_differentiable(tanh_a, sigmoid_b)
    ctx.set_materialize_grads(False)
    ctx.has_bias, ctx.save, ctx.colours = bias is not None, save, 1
    ctx.condition_dim = 0 if condition is None else condition.dim()
    ctx.save_for_backward(x, weight, taps, tanh_a, sigmoid_b)


def _backward_gated(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
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


def _run_gate_backward(grad: Tensor, tanh_a: Tensor, sigmoid_b: Tensor, backend: str | None) -> Tensor:
    for name, factor in (("tanh_a", tanh_a), ("sigmoid_b", sigmoid_b)):
        check_gradient("fastvq.ops.gate_backward", name, factor, grad)
    if grad.dim() != 4 or grad.dtype not in FLOATS:
        raise ValueError(
            f"fastvq.ops.gate_backward: grad must be a float [B, C, H, W], got {grad.dtype} {list(grad.shape)}"
        )
    arguments = (grad, tanh_a, sigmoid_b)
    return choose(GATED, GATE_BACKWARD, backend, *arguments)(*arguments)


def _fake_gate_backward(grad: Tensor, tanh_a: Tensor, sigmoid_b: Tensor, backend: str | None) -> Tensor:
    return like_input(tanh_a, 2 * tanh_a.shape[1])


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


NO_SECOND = "the derivative of its gradient is not implemented"
_conv = register(
    "masked_conv2d(Tensor x, Tensor weight, Tensor? bias, str mask, Tensor? taps, int colours, str? backend) -> Tensor",
    _run, _fake, _backward, _setup_context, _jvp, _fold,
)  # fmt: skip
_conv_backward = register(
    "masked_conv2d_backward(Tensor grad, Tensor x, Tensor weight, str mask, Tensor? taps, int colours, bool need_x, "
    "bool need_weight, bool need_bias, str? backend) -> (Tensor grad_x, Tensor grad_weight, Tensor grad_bias)",
    _run_backward, _fake_backward, _no_second_derivative, lambda ctx, inputs, output: None,
    no_forward_mode(OP, NO_SECOND),
)  # fmt: skip
_gated = register(
    "gated_masked_conv2d(Tensor x, Tensor weight, Tensor? bias, Tensor? condition, str mask, Tensor? taps, bool save, "
    "str? backend) -> (Tensor out, Tensor tanh_a, Tensor sigmoid_b)",
    _run_gated, _fake_gated, _backward_gated, _setup_gated, _gated_jvp,
)  # fmt: skip
_gate_backward = register(
    "gate_backward(Tensor grad, Tensor tanh_a, Tensor sigmoid_b, str? backend) -> Tensor",
    _run_gate_backward, _fake_gate_backward, _no_second_derivative, lambda ctx, inputs, output: None,
    no_forward_mode(GATED, NO_SECOND),
)  # fmt: skip
