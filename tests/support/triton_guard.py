"""Triton's interpreter, with every address checked: a load or store outside the launch's tensors raises IndexError.

On a GPU such an access may go unnoticed for years; in the plain interpreter it may crash the process or read a
neighbour. ``install()`` is called once, by conftest.py, before any kernel is imported.
"""

from types import SimpleNamespace

import numpy as np
import torch
import triton

_spans: list[tuple[int, int]] = []  # bytes [low, high) of each tensor argument of the launch that runs


def _span(t: torch.Tensor) -> tuple[int, int]:
    reach = 1 + sum((size - 1) * abs(stride) for size, stride in zip(t.shape, t.stride(), strict=True))
    return t.data_ptr(), t.data_ptr() + (reach * t.element_size() if t.numel() else 0)


def _check(pointers, mask, what: str) -> None:
    addresses = np.broadcast_to(pointers.data, mask.data.shape)[mask.data.astype(bool)].astype(np.int64)
    size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
    inside = np.zeros(addresses.shape, bool)
    for low, high in _spans:
        inside |= (addresses >= low) & (addresses + size <= high)
    if not inside.all():
        raise IndexError(
            f"{what} outside every tensor of the launch: {int((~inside).sum())} of {inside.size} addresses"
        )


def _patch_once_a_launch(interpreter) -> None:
    # The interpreter swaps triton.language's functions for its own at every call of a device function, though the
    # launch has done so already: two milliseconds a call, more than everything else.
    modules = SimpleNamespace(__globals__={"tl": triton.language, "core": triton.language.core})
    patch = interpreter._patch_lang
    interpreter._patch_lang = lambda function: patch(modules)

    def call(self, *args, **kwargs):
        return self.rewrite()(*args, **kwargs)

    interpreter.InterpretedFunction.__call__ = call


def install() -> None:
    from triton.runtime import interpreter

    _patch_once_a_launch(interpreter)
    start = interpreter.GridExecutor._init_args_hst

    def record(self, args, kwargs):
        host, host_kwargs = start(self, args, kwargs)
        tensors = [t for t in [*host, *host_kwargs.values()] if isinstance(t, torch.Tensor)]
        _spans[:] = [_span(t) for t in tensors]
        return host, host_kwargs

    interpreter.GridExecutor._init_args_hst = record
    # (method, position of its mask, what it does); an unmasked load or store comes here too, with a mask of ones.
    for name, mask_at, what in (
        ("create_masked_load", 1, "a load"),
        ("create_masked_store", 2, "a store"),
    ):
        inner = getattr(interpreter.InterpreterBuilder, name)

        def checked(self, pointers, *rest, inner=inner, mask_at=mask_at, what=what):
            _check(pointers, rest[mask_at - 1], what)
            return inner(self, pointers, *rest)

        setattr(interpreter.InterpreterBuilder, name, checked)
    atomic = interpreter.InterpreterBuilder.create_atomic_rmw

    def checked_atomic(self, operation, pointers, value, mask, *rest):
        _check(pointers, mask, "an atomic")
        return atomic(self, operation, pointers, value, mask, *rest)

    interpreter.InterpreterBuilder.create_atomic_rmw = checked_atomic
    cast = interpreter.InterpreterBuilder.cast_impl

    def rounded(self, source, to):
        # float32 to bfloat16 goes to the nearest, ties to even, on a GPU; the interpreter cuts bits off.
        if source.dtype.scalar == triton.language.float32 and to.scalar == triton.language.bfloat16:
            narrow = torch.from_numpy(np.ascontiguousarray(source.data)).bfloat16().view(torch.int16)
            return interpreter.TensorHandle(narrow.numpy().view(np.uint16), triton.language.bfloat16)
        # bfloat16 to float32 is exact on a GPU; the interpreter changes numbers below the smallest normal one.
        if source.dtype.scalar == triton.language.bfloat16 and to.scalar == triton.language.float32:
            wide = np.left_shift(source.data.astype(np.uint32), 16).view(np.float32)
            return interpreter.TensorHandle(wide, triton.language.float32)
        return cast(self, source, to)

    interpreter.InterpreterBuilder.cast_impl = rounded
