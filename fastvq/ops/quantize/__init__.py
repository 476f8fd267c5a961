"""Lookup, gather, gradient estimator and losses in one op."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from fastvq._checks import (
    check_backend_name,
    check_codebook,
    check_mask,
    check_option,
    check_weight,
)
from fastvq.backends import triton as triton_backend
from fastvq.backends.golden import calls as golden_calls
from fastvq.backends.registry import bound_backend
from fastvq.ops._contract import check_choices, check_gradient, check_lookup, check_tensor, checking_indices
from fastvq.ops._library import no_second_derivative, serialisable
from fastvq.ops._op import Autograd, Kernel, Op, known_results, register, rests_on, without_backend
from fastvq.ops._transforms import no_forward_mode
from fastvq.ops.nearest import METRICS, NEAREST, PRECISIONS, PackedCodebook, operands
from fastvq.ops.quantize import cpu, cuda, reference
from fastvq.ops.quantize.call import QuantizeBackwardCall, QuantizeCall
from fastvq.ops.statistics import CODE_STATISTICS
from fastvq.ops.statistics.cuda import why_too_many_vectors

__all__ = ["ESTIMATORS", "Quantized", "backward", "quantize", "setup_context"]

OP = "fastvq.ops.quantize"
BACKWARD_OP = cpu.BACKWARD_OP
ESTIMATORS = ("straight_through", "rotation", "none")


@serialisable("ops.Quantized")
class Quantized(NamedTuple):
    """What ``quantize`` returns.

    Attributes:
        quantized: [..., D] or [H, ..., D], of x's dtype: the code of every vector.
        indices: [...] or [H, ...] int64; -1 where masked.
        commitment_loss: [] float32 (float64 for float64 x), trains x.
        codebook_loss: [] float32 (float64 for float64 x), trains the codebook.
    """

    quantized: Tensor
    indices: Tensor
    commitment_loss: Tensor
    codebook_loss: Tensor


def quantize(
    x: Tensor,  # [..., D], or [H, ..., D] with heads
    codebook: Tensor | PackedCodebook,  # [K, D], or [H, K, D]
    *,
    metric: Literal["euclidean", "cosine", "dot"] = "euclidean",
    estimator: Literal["straight_through", "rotation", "none"] = "straight_through",
    mask: Tensor | None = None,  # [...] or [H, ...] bool
    beta: float = 1.0,
    precision: Literal["exact", "fast"] = "exact",
    backend: Literal["cpu", "triton", "cuda", "reference"] | None = None,
) -> Quantized:
    """Replaces every vector by its nearest code, with the losses that train both and a gradient estimator.

    .. math::
        quantized = c_{index}, \\quad
        commitment\\_loss = \\beta \\, \\mathrm{mean} |x - sg(c)|^2, \\quad
        codebook\\_loss = \\mathrm{mean} |sg(x) - c|^2

    with ``index`` of ``fastvq.ops.nearest`` (exact, ties to the lowest index) and the means over all elements of the
    vectors that ``mask`` does not exclude (van den Oord et al. 2017). ``sg`` stops the gradient: the commitment loss
    trains x, the codebook loss trains the codebook.

    What the gradient g at ``quantized`` gives x is the ``estimator``'s choice:

    - "straight_through": g (Bengio et al. 2013);
    - "rotation": lambda R^T g, with the rescaled rotation lambda R that takes x to its code, held constant (Fifty et
      al. 2024, "Restructuring Vector Quantization with the Rotation Trick"); g where no rotation is defined (x or its
      code zero, or opposite);
    - "none": nothing; ``quantized`` is detached.

    Args:
        x: vectors, float32, float64, float16 or bfloat16; any strides, channel-first views included.
        codebook: codes, any of those dtypes. With heads, one codebook a head.
            One that ``pack_codebook`` packed takes no gradient.
        metric: "euclidean", "cosine" or "dot"; with any of them the codes come out, and enter the losses, as stored.
        mask: True marks a real vector. The others give zeros, index -1, no loss and no gradient.
        beta: weight of the commitment loss.
        precision, backend: as in ``fastvq.ops.nearest``.

    Returns:
        ``Quantized(quantized, indices, commitment_loss, codebook_loss)``: x's shape, dtype and memory order; int64 of
        x's shape without its last dimension; two scalars, float32 (float64 for float64 x), summed in float64 in an
        order that does not depend on the number of threads. With nothing unmasked, or N = 0, both losses are 0. A
        vector that holds NaN or infinity gets index 0 and makes the losses NaN; it gives the codebook no gradient.

    Raises:
        ValueError, TypeError: as ``fastvq.ops.nearest``; an unknown estimator; a mask that is no bool tensor of x's
            shape without its last dimension.
        RuntimeError: a second derivative is asked for.

    Example:
        >>> x, codebook = torch.randn(8, 32, 32, 64, requires_grad=True), torch.randn(512, 64)
        >>> q = quantize(x, codebook, beta=0.25)
        >>> q.quantized.shape, q.indices.shape, q.commitment_loss.shape
        (torch.Size([8, 32, 32, 64]), torch.Size([8, 32, 32]), torch.Size([]))
    """
    check_backend_name(OP, backend)
    check_weight(OP, "beta", beta)
    codes, packed, named = operands(OP, codebook, metric, backend)
    check_codebook(OP, x, codes)
    check_option(OP, "metric", metric, METRICS)
    check_option(OP, "estimator", estimator, ESTIMATORS)
    check_option(OP, "precision", precision, PRECISIONS)
    check_mask(OP, x, mask)
    quantized, commitment_loss, codebook_loss, indices = _quantize(
        x, codes, mask, metric, estimator, float(beta), precision, named, packed
    )
    if estimator == "none":
        quantized = quantized.detach()
    return Quantized(quantized, indices, commitment_loss, codebook_loss)


def _check(call: QuantizeCall) -> None:
    check_lookup(OP, call.x, call.codebook, call.mask)
    check_choices(OP, call.metric, call.precision)


def _fake(call: QuantizeCall) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x = call.x
    loss = torch.float64 if x.dtype == torch.float64 else torch.float32
    return (
        torch.empty_like(x),
        x.new_empty((), dtype=loss),
        x.new_empty((), dtype=loss),
        x.new_empty(x.shape[:-1], dtype=torch.int64),
    )


def setup_context(ctx: Any, call: Any, output: tuple[Tensor, ...]) -> None:
    """Of this op, and of those whose calls begin with its arguments and whose outputs begin with its own."""
    ctx.estimator, ctx.beta, ctx.backend = call.estimator, call.beta, bound_backend(call.backend)
    ctx.mark_non_differentiable(*output[3:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(call.x, call.codebook, output[3])


def backward(
    ctx: Any,
    grad_quantized: Tensor | None,
    grad_commitment: Tensor | None,
    grad_codebook_loss: Tensor | None,
    *_: None,
) -> tuple[Tensor | None, ...]:
    """The gradients of one that ``setup_context`` set up."""
    x, codebook, indices = ctx.saved_tensors
    need_x, need_codebook = ctx.needs_input_grad[:2]
    grad_x, grad_codebook = _quantize_backward(
        x, codebook, indices, grad_quantized, grad_commitment, grad_codebook_loss,
        ctx.estimator, ctx.beta, need_x, need_codebook, ctx.backend,
    )  # fmt: skip
    return grad_x if need_x else None, grad_codebook if need_codebook else None, *[None] * 7


def _check_backward(call: QuantizeBackwardCall) -> None:
    x = call.x
    check_lookup(BACKWARD_OP, x, call.codebook)
    check_option(BACKWARD_OP, "estimator", call.estimator, ESTIMATORS)
    check_tensor(BACKWARD_OP, "indices", call.indices, x.shape[:-1], torch.int64, x.device)
    check_gradient(BACKWARD_OP, "grad_quantized", call.grad_quantized, x)
    for name, weight in (("grad_commitment", call.grad_commitment), ("grad_codebook_loss", call.grad_codebook_loss)):
        if weight is not None:
            check_tensor(BACKWARD_OP, name, weight, (), None, x.device)


def _fake_backward(call: QuantizeBackwardCall) -> tuple[Tensor, Tensor]:
    x, codebook = call.x, call.codebook
    return (
        torch.empty_like(x) if call.need_x else x.new_empty(0),
        torch.empty_like(codebook) if call.need_codebook else codebook.new_empty(0),
    )


NO_JVP = no_forward_mode(OP, "the estimator defines what goes back alone")
QUANTIZE = Op(
    "quantize",
    QuantizeCall,
    {
        "cpu": Kernel(cpu.quantize),
        "triton": Kernel(
            triton_backend.lazy_function("fastvq.ops.quantize.triton_forward", "quantize"),
            lambda call: triton_backend.why_too_many_rows(call.x),
            (rests_on(NEAREST),),
        ),
        "cuda": Kernel(cuda.quantize, golden=(rests_on(NEAREST),)),
        "reference": Kernel(
            lambda call: reference.quantize(call.x, call.codebook, call.mask, call.metric, call.beta, call.precision)
        ),
    },
    check=_check,
    fake=_fake,
    returns="(Tensor quantized, Tensor commitment_loss, Tensor codebook_loss, Tensor indices)",
    autograd=Autograd(backward, NO_JVP, setup_context),
)
QUANTIZE_BACKWARD = Op(
    "quantize_backward",
    QuantizeBackwardCall,
    {
        "cpu": Kernel(cpu.quantize_backward),
        "triton": Kernel(
            checking_indices(
                BACKWARD_OP, triton_backend.lazy_function("fastvq.ops.quantize.triton_backward", "quantize_backward")
            ),
            lambda call: triton_backend.why_too_many_rows(call.x),
        ),
        "cuda": Kernel(
            checking_indices(BACKWARD_OP, cuda.quantize_backward),
            lambda call: why_too_many_vectors(call.x, call.codebook),
            (rests_on(CODE_STATISTICS), known_results(golden_calls.quantize_backward)),
        ),
        "reference": Kernel(checking_indices(BACKWARD_OP, without_backend(reference.quantize_backward))),
    },
    check=_check_backward,
    fake=_fake_backward,
    returns="(Tensor grad_x, Tensor grad_codebook)",
    public_name=OP,
    autograd=Autograd(no_second_derivative(OP), NO_JVP),
)
_quantize, _quantize_backward = register(QUANTIZE), register(QUANTIZE_BACKWARD)
