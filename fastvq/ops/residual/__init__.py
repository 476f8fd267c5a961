"""Residual quantization: a vector becomes the sum of one code per level."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from fastvq._checks import (
    check_backend_name,
    check_codebook,
    check_dense,
    check_float,
    check_integer,
    check_mask,
    check_option,
    check_weight,
)
from fastvq.backends import triton as triton_backend
from fastvq.backends.golden import gate
from fastvq.backends.golden.cases import configuration
from fastvq.backends.registry import bound_backend
from fastvq.ops._contract import check_choices, check_gradient, check_lookup, check_tensor, checking_indices
from fastvq.ops._library import no_second_derivative, serialisable
from fastvq.ops._op import Autograd, Kernel, Op, register, without_backend
from fastvq.ops._transforms import no_forward_mode
from fastvq.ops.nearest import METRICS, PRECISIONS
from fastvq.ops.quantize import ESTIMATORS
from fastvq.ops.residual import cpu, cuda, reference
from fastvq.ops.residual.call import ResidualBackwardCall, ResidualCall
from fastvq.ops.residual.common import residual_dtype

__all__ = ["RESIDUAL_QUANTIZE", "ResidualQuantized", "residual_quantize"]

OP = "fastvq.ops.residual_quantize"
BACKWARD_OP = cpu.BACKWARD_OP


@serialisable("ops.ResidualQuantized")
class ResidualQuantized(NamedTuple):
    """What ``residual_quantize`` returns.

    Attributes:
        quantized: [..., D], of x's dtype: the sum of the codes of every vector.
        indices: [..., Q] int64, a code a level; -1 where masked.
        commitment_losses: [Q] float32 (float64 for float64 x), train x.
        codebook_losses: [Q] float32 (float64 for float64 x), train the codebooks.
        sums: [Q, K, D], the sum of the residuals of each code; None without ``statistics``.
        counts: [Q, K] int64, their number; None without ``statistics``.
    """

    quantized: Tensor
    indices: Tensor
    commitment_losses: Tensor
    codebook_losses: Tensor
    sums: Tensor | None
    counts: Tensor | None


def residual_quantize(
    x: Tensor,  # [..., D]
    codebooks: Tensor | Sequence[Tensor],  # [Q, K, D], or Q of [K, D]
    *,
    n_levels: int | None = None,
    metric: Literal["euclidean", "cosine", "dot"] = "euclidean",
    estimator: Literal["straight_through", "rotation", "none"] = "straight_through",
    mask: Tensor | None = None,  # [...] bool
    beta: float = 1.0,
    statistics: bool = False,
    precision: Literal["exact", "fast"] = "exact",
    backend: Literal["cpu", "triton", "cuda", "reference"] | None = None,
) -> ResidualQuantized:
    """Replaces every vector by a sum of codes, each level quantizing what the levels before left over.

    .. math:: r_0 = x, \\quad i_q = nearest(r_q, c_q), \\quad r_{q+1} = r_q - c_{q, i_q}, \\quad
        quantized = \\sum_q c_{q, i_q}

    (Zeghidour et al. 2021.) Residuals are kept in float32, rounded once a level (float64 where x or the codebooks are);
    each level's index is that of ``fastvq.ops.nearest`` for its residual, exact, ties to the lowest.

    Gradients: the estimator takes x and the whole sum, as one ``fastvq.ops.quantize`` would. The commitment loss of
    level q is ``beta * mean |r_q - sg(c_q)|^2`` and trains x, with r_q = x less constants; the codebook loss is
    ``mean |sg(r_q) - c_q|^2`` and trains codebook q.

    Args:
        x: vectors, float32, float64, float16 or bfloat16, any strides.
        codebooks: Q levels, all of one shape.
        n_levels: use the first so many only; None: all.
        metric, estimator, mask, beta, precision, backend: as in ``fastvq.ops.quantize``.
        statistics: also return what ``code_statistics`` gives for each level's residuals.

    Returns:
        ``ResidualQuantized``: quantized, x's shape and dtype; indices [..., Q] int64, -1 where masked;
        commitment_losses and codebook_losses [Q], float32 (float64 for float64 x); sums [Q, K, D] and counts [Q, K], or
        None. With ``n_levels`` that is Q. Deterministic whatever the number of threads.

    Raises:
        ValueError, TypeError: as ``fastvq.ops.quantize``; levels of different shapes; n_levels outside 1 ... Q.
        RuntimeError: a second derivative is asked for.

    Example:
        >>> q = residual_quantize(torch.randn(4, 100, 32), torch.randn(8, 256, 32))
        >>> q.quantized.shape, q.indices.shape, q.commitment_losses.shape
        (torch.Size([4, 100, 32]), torch.Size([4, 100, 8]), torch.Size([8]))
    """
    if not isinstance(codebooks, Tensor):
        if not isinstance(codebooks, Iterable):
            raise TypeError(f"{OP}: codebooks must be a tensor or a sequence of them, got {type(codebooks).__name__}")
        codebooks = list(codebooks)
        for i, level in enumerate(codebooks):
            check_float(OP, f"codebooks[{i}]", level)
            check_codebook(OP, x, level)
        if not codebooks or any(c.dim() != 2 or c.shape != codebooks[0].shape for c in codebooks):
            shapes = [list(c.shape) for c in codebooks]
            raise ValueError(f"{OP}: codebooks must be at least one [K, D], all of one shape, got {shapes}")
        codebooks = _stacked(codebooks)
    check_dense(OP, "codebooks", codebooks)
    if codebooks.dim() != 3 or codebooks.shape[0] == 0:
        raise ValueError(f"{OP}: codebooks must be [Q, K, D] with Q >= 1, got {list(codebooks.shape)}")
    check_codebook(OP, x, codebooks[0])
    check_backend_name(OP, backend)
    check_weight(OP, "beta", beta)
    if n_levels is not None:
        check_integer(OP, "n_levels", n_levels)
        if not 1 <= n_levels <= codebooks.shape[0]:
            raise ValueError(f"{OP}: n_levels must be 1 ... {codebooks.shape[0]}, got {n_levels}")
        codebooks = codebooks[:n_levels]
    check_option(OP, "metric", metric, METRICS)
    check_option(OP, "estimator", estimator, ESTIMATORS)
    check_option(OP, "precision", precision, PRECISIONS)
    check_mask(OP, x, mask)
    quantized, commitment, codebook, indices, sums, counts = _residual_quantize(
        x, codebooks, mask, metric, estimator, float(beta), statistics, precision, backend
    )
    if estimator == "none":
        quantized = quantized.detach()
    found = (sums.detach(), counts) if statistics else (None, None)
    return ResidualQuantized(quantized, indices, commitment, codebook, *found)


def _stacked(levels: list[Tensor]) -> Tensor:  # [Q, K, D]
    device = levels[0].device.type
    if device not in ("cpu", "cuda"):
        return torch.stack(levels)
    with torch.autocast(device, enabled=False):  # it refuses float16 on the CPU, bfloat16 on a GPU
        return torch.stack(levels)


def _check_levels(op: str, x: Tensor, codebooks: Tensor, mask: Tensor | None) -> None:
    if codebooks.dim() != 3 or codebooks.shape[0] == 0:
        raise ValueError(f"{op}: codebooks must be [Q, K, D] with Q >= 1, got {list(codebooks.shape)}")
    check_lookup(op, x, codebooks[0], mask)


def _check(call: ResidualCall) -> None:
    _check_levels(OP, call.x, call.codebooks, call.mask)
    check_choices(OP, call.metric, call.precision)


def _fake(call: ResidualCall) -> tuple[Tensor, ...]:
    x, codebooks, statistics = call.x, call.codebooks, call.statistics
    loss = torch.float64 if x.dtype == torch.float64 else torch.float32
    n_levels, n_codes, dim = codebooks.shape
    return (
        torch.empty_like(x),
        x.new_empty(n_levels, dtype=loss),
        x.new_empty(n_levels, dtype=loss),
        x.new_empty((*x.shape[:-1], n_levels), dtype=torch.int64),
        x.new_empty((n_levels, n_codes, dim) if statistics else (0,), dtype=residual_dtype(x, codebooks)),
        x.new_empty((n_levels, n_codes) if statistics else (0,), dtype=torch.int64),
    )


def _setup_context(ctx: Any, call: ResidualCall, output: tuple[Tensor, ...]) -> None:
    ctx.estimator, ctx.beta, ctx.backend = call.estimator, call.beta, bound_backend(call.backend)
    ctx.mark_non_differentiable(*output[3:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(call.x, call.codebooks, output[3])


def _backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    x, codebooks, indices = ctx.saved_tensors
    need_x, need_codebooks = ctx.needs_input_grad[:2]
    grad_x, grad_codebooks = _residual_quantize_backward(
        x, codebooks, indices, *grads[:3], ctx.estimator, ctx.beta, need_x, need_codebooks, ctx.backend
    )
    return grad_x if need_x else None, grad_codebooks if need_codebooks else None, *[None] * 7


def _check_backward(call: ResidualBackwardCall) -> None:
    x, n_levels = call.x, call.codebooks.shape[0]
    _check_levels(BACKWARD_OP, x, call.codebooks, None)
    check_option(BACKWARD_OP, "estimator", call.estimator, ESTIMATORS)
    check_tensor(BACKWARD_OP, "indices", call.indices, (*x.shape[:-1], n_levels), torch.int64, x.device)
    check_gradient(BACKWARD_OP, "grad_quantized", call.grad_quantized, x)
    for name, weight in (("grad_commitment", call.grad_commitment), ("grad_codebook", call.grad_codebook)):
        if weight is not None:
            check_tensor(BACKWARD_OP, name, weight, (n_levels,), None, x.device)


def _fake_backward(call: ResidualBackwardCall) -> tuple[Tensor, Tensor]:
    x, codebooks = call.x, call.codebooks
    return (
        torch.empty_like(x) if call.need_x else x.new_empty(0),
        torch.empty_like(codebooks) if call.need_codebooks else codebooks.new_empty(0),
    )


def _golden_levels(
    run: Callable[[ResidualCall], tuple[Tensor, ...]], n_levels: int, masked: bool
) -> Callable[[Tensor, Tensor, str, str], Tensor]:
    """``run`` as the golden set asks for lookups: the indices of levels that share a codebook."""

    def indices(x: Tensor, codebook: Tensor, metric: str, precision: str) -> Tensor:
        mask = torch.ones(len(x), dtype=torch.bool, device=x.device) if masked else None
        levels = codebook.expand(n_levels, -1, -1)
        return run(ResidualCall(x, levels, mask, metric, "none", 1.0, False, precision, None))[3]

    return indices


def _golden(op: Op[Any], backend: str, call: ResidualCall) -> str | None:
    """Lookups that are hard to decide, on at most two levels.

    Not the lookup's own golden set: all levels may be one kernel, and then a call would have the lookup's kernels
    compiled for nothing. Where there are too many rows for one kernel, on one level, which is never one kernel.
    """
    x, codebooks = call.x, call.codebooks
    many = x.numel() > triton_backend.ROWS_OF_ALL_LEVELS * x.shape[-1]
    levels = 1 if many else min(2, codebooks.shape[0]), call.mask is not None
    ours, right = (_golden_levels(op.kernels[name].run, *levels) for name in (backend, "reference"))
    kind = configuration(x, codebooks, call.metric, call.precision, *levels)
    return gate.check_lookup(backend, x.device, ours, right, kind, op.name)


def _reference(call: ResidualCall) -> tuple[Tensor, ...]:
    return reference.residual_quantize(
        call.x, call.codebooks, call.mask, call.metric, call.beta, call.statistics, call.precision
    )


def _triton(name: str) -> Callable[..., Any]:
    return triton_backend.lazy_function("fastvq.ops.residual.triton_ops", name)


NO_JVP = no_forward_mode(OP, "the estimator defines what goes back alone")
RESIDUAL_QUANTIZE = Op(
    "residual_quantize",
    ResidualCall,
    {
        "cpu": Kernel(cpu.residual_quantize),
        "triton": Kernel(_triton("residual_quantize"), golden=(_golden,)),
        "cuda": Kernel(cuda.residual_quantize, golden=(_golden,)),
        "reference": Kernel(_reference),
    },
    check=_check,
    fake=_fake,
    returns="(Tensor quantized, Tensor commitment_losses, Tensor codebook_losses, Tensor indices, Tensor sums, "
    "Tensor counts)",
    autograd=Autograd(_backward, NO_JVP, _setup_context),
)
RESIDUAL_QUANTIZE_BACKWARD = Op(
    "residual_quantize_backward",
    ResidualBackwardCall,
    {
        "cpu": Kernel(cpu.residual_quantize_backward),
        "triton": Kernel(checking_indices(BACKWARD_OP, _triton("residual_quantize_backward"))),
        "cuda": Kernel(checking_indices(BACKWARD_OP, cuda.residual_quantize_backward)),
        "reference": Kernel(checking_indices(BACKWARD_OP, without_backend(reference.residual_quantize_backward))),
    },
    check=_check_backward,
    fake=_fake_backward,
    returns="(Tensor grad_x, Tensor grad_codebooks)",
    public_name=OP,
    autograd=Autograd(no_second_derivative(OP), NO_JVP),
)
_residual_quantize, _residual_quantize_backward = register(RESIDUAL_QUANTIZE), register(RESIDUAL_QUANTIZE_BACKWARD)
