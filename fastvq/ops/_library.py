"""Registration with torch: every op of fastvq is ``torch.ops.fastvq.<name>``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch.utils import _pytree as pytree

from fastvq.ops._transforms import transformable

__all__ = ["no_second_derivative", "register", "serialisable"]

T = TypeVar("T")
LIBRARY = torch.library.Library("fastvq", "DEF")


def serialisable(name: str) -> Callable[[type[T]], type[T]]:
    """Registers a NamedTuple that modules return, so that ``torch.export.save`` can write it, as ``fastvq.<name>``.

    The name is part of saved files: it stays when the class moves.
    """

    def register_class(cls: type[T]) -> type[T]:
        pytree._register_namedtuple(cls, serialized_type_name=f"fastvq.{name}")
        return cls

    return register_class


def register(
    schema: str,
    run: Callable[..., Any],
    fake: Callable[..., Any],
    backward: Callable[..., Any] | None = None,
    setup_context: Callable[..., Any] | None = None,
    jvp: Callable[..., Any] | None = None,
    fold: Callable[..., Any] | None = None,
) -> Callable[..., Any]:
    """Registers an op under ``schema``: one implementation for every device, which chooses its backend per call.

    The choice is made inside the op rather than before it, so that a compiled or exported graph holds the op alone and
    chooses where it runs. ``fake`` gives the outputs' shapes and dtypes; ``backward`` and ``setup_context`` are for
    differentiable ops only (a registered autograd costs 15 to 30 microseconds a call), which also have a ``jvp``; for
    it and ``fold`` see ``_transforms.transformable``. Returns the op, as the public functions and formulas call it.
    """
    name = "fastvq::" + schema.split("(", 1)[0]
    LIBRARY.define(schema)
    LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(name, fake, lib=LIBRARY)
    op: Callable[..., Any] = getattr(torch.ops.fastvq, name.partition("::")[2]).default
    if backward is None or setup_context is None or jvp is None:
        return op
    torch.library.register_autograd(name, backward, setup_context=setup_context, lib=LIBRARY)
    return transformable(op, backward, setup_context, jvp, fold)


def no_second_derivative(op: str) -> Callable[..., Any]:
    """The backward of an estimator's backward: it raises, rather than let autograd return zeros in silence."""

    def backward(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError(
            f"{op}: a second derivative was asked for (create_graph=True), and it has none: "
            "the gradient is an estimate, not a derivative"
        )

    return backward
