"""Triton's interpreter, with every address checked: a load or store outside the launch's tensors raises IndexError.

Besides, float32 becomes bfloat16 as on a GPU, rounded to nearest even, where the plain interpreter cuts bits off; and a
launch prepares the language once, not at every call within it.

On a GPU a bad access may go unnoticed for years; in the plain interpreter it may crash the process or read a
neighbour. ``install()`` is called once, by conftest.py, before any kernel is imported.
"""

import numpy as np
import torch

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


def install() -> None:
    import triton.language as tl
    from triton.runtime import interpreter

    start = interpreter.GridExecutor._init_args_hst
    patch = interpreter._patch_lang
    patched: set[tuple[bool, ...]] = set()

    def patch_once(function):
        # The interpreter does it again at every call of a function within a kernel, tl.sum and tl.zeros included, and
        # spends most of its time so.
        modules = function.__globals__.values()
        key = tuple(any(value is module for value in modules) for module in (tl, tl.core))
        if key in patched:
            return None
        patched.add(key)
        return patch(function)

    interpreter._patch_lang = patch_once

    def record(self, args, kwargs):
        host, host_kwargs = start(self, args, kwargs)
        tensors = [t for t in [*host, *host_kwargs.values()] if isinstance(t, torch.Tensor)]
        _spans[:] = [_span(t) for t in tensors]
        patched.clear()
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
        if source.dtype.scalar == tl.float32 and to.scalar == tl.bfloat16:
            narrow = torch.from_numpy(np.ascontiguousarray(source.data)).bfloat16().view(torch.int16)
            return interpreter.TensorHandle(narrow.numpy().view(np.uint16), tl.bfloat16)
        return cast(self, source, to)

    interpreter.InterpreterBuilder.cast_impl = rounded
