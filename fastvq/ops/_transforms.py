"""torch.func and forward-mode derivatives.

The autograd formula of a registered op serves the plain backward. Where a transform of ``torch.func`` or a level of
``torch.autograd.forward_ad`` is active, the op is called by way of an ``autograd.Function`` of the same formula, which
transforms see through.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

__all__ = ["active", "no_forward_mode", "refuse_tangents", "transformable"]


def active() -> bool:
    """Whether a transform is at work in this thread. Costs a tenth of a microsecond."""
    if torch.compiler.is_compiling():  # transforms inside of a compiled function are the compiler's own
        return False
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def no_forward_mode(op: str, why: str) -> Callable[..., Any]:
    """A jvp that raises, rather than let a tangent be dropped in silence."""

    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise RuntimeError(
            f"{op}: a forward-mode derivative was asked for (torch.func.jvp, torch.autograd.forward_ad), and it has "
            f"none: {why}; use the backward (torch.autograd.grad, torch.func.grad, torch.func.vjp)"
        )

    return jvp


def refuse_tangents(op: str, why: str, *tensors: Tensor | None) -> None:
    """Raises as ``no_forward_mode`` where a tensor has a tangent, for an op without a gradient.

    Nothing is looked at outside of a level of forward mode, which ``torch.func.jvp`` opens too.
    """
    if torch.compiler.is_compiling() or forward_ad._current_level < 0:
        return
    floats = [t for t in tensors if t is not None and t.is_floating_point()]
    if floats:
        _Refusal.apply(no_forward_mode(op, why), *floats)


class _Refusal(torch.autograd.Function):
    """Nothing, but for a tangent, which it refuses. Tangents of outer transforms are seen by a Function alone."""

    @staticmethod
    def forward(*args: Any) -> Any:
        return args[1].new_empty(0)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.refuse = inputs[0]

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return (None,) * len(ctx.needs_input_grad)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        return ctx.refuse(ctx, *tangents)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        return _Refusal.apply(*args), None


def transformable(
    op: Callable[..., Any],
    backward: Callable[..., Any],
    setup_context: Callable[..., Any],
    jvp: Callable[..., Any],
    fold: Callable[..., Any] | None = None,
) -> Callable[..., Any]:
    """``op``, called so that transforms see its formula where any is active.

    setup_context and backward are those that the op is registered with. fold: takes what ``vmap`` of an
    ``autograd.Function`` does, and serves a batch by one call where it can; otherwise it returns None and the op is
    called once for every element of the batch.
    """

    class Transformed(torch.autograd.Function):
        @staticmethod
        def forward(*args: Any) -> Any:
            return op(*args)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            setup_context(ctx, inputs, output)
            ctx.save_for_forward(*(getattr(ctx, "to_save", None) or ()))

        @staticmethod
        def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
            folded = None if fold is None else fold(info, in_dims, *args)
            return folded or _one_by_one(call, info.batch_size, in_dims, args)

    Transformed.backward = staticmethod(backward)  # type: ignore[method-assign]
    Transformed.jvp = staticmethod(jvp)  # type: ignore[method-assign]

    def call(*args: Any) -> Any:
        return Transformed.apply(*args) if active() else op(*args)

    return call


def _one_by_one(
    call: Callable[..., Any], batch_size: int, in_dims: tuple[Any, ...], args: tuple[Any, ...]
) -> tuple[Any, Any]:
    """The outputs of a call for every element of a batch, side by side in dimension 0."""
    found = [
        call(*(a if d is None else a.select(d, i) for a, d in zip(args, in_dims, strict=True)))
        for i in range(batch_size)
    ]
    if isinstance(found[0], Tensor):
        return torch.stack(found), 0
    return tuple(torch.stack(each) for each in zip(*found, strict=True)), (0,) * len(found[0])
