"""The table of backends: which exist, which can run here, and which one serves a call.

An op holds one ``Implementation`` a backend. ``choose`` walks the backends in order of preference and takes
the first whose predicate has nothing against the call; the same predicates write the error message.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch

from fastvq import _cuda_native, _env, _native, _triton

__all__ = ["BACKENDS", "Backend", "Implementation", "check_backend", "choose", "use_backend"]


class Backend(NamedTuple):
    name: str
    what: str
    unavailable: Callable[[], str | None]  # why it cannot run on this machine at all, or None


# In order of preference. Triton's interpreter takes CPU tensors too: it is slower than anything, so it stands behind
# the CPU kernels. On an H100 Triton's lookup is 2 to 5 times faster than that of CUDA C++, which serves where Triton
# cannot.
BACKENDS = {
    b.name: b
    for b in (
        Backend("cpu", "C++ kernels for CPU tensors", _native.unavailable),
        Backend("triton", "Triton kernels for CUDA tensors", _triton.unavailable),
        Backend("cuda", "CUDA C++ kernels for CUDA tensors", _cuda_native.unavailable),
        Backend("reference", "plain torch, any device", lambda: None),
    )
}


class Implementation(NamedTuple):
    run: Callable[..., Any]
    refuse: Callable[..., str | None]  # called with run's arguments: why it cannot serve this call, or None


_override: str | None = None


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Within the block, every fastvq call that names no backend uses ``name``, on all threads of the process.

    As with ``backend=`` of a single call there is no falling back: a call that ``name`` cannot serve raises, with the
    reason. ``FASTVQ_BACKEND`` does the same for a whole process.

    Raises:
        ValueError: ``name`` is no backend, or cannot run on this machine.
    """
    # Process-wide rather than per thread: autograd runs a backward on threads of its own.
    global _override
    check_backend("fastvq.use_backend", name)
    before, _override = _override, name
    try:
        yield
    finally:
        _override = before


def check_backend(op: str, name: str) -> None:
    """ValueError where ``name`` is no backend, or one that cannot run on this machine."""
    _check_name(op, name)
    reason = BACKENDS[name].unavailable()
    if reason is not None:
        raise ValueError(f"{op}: backend {name!r} cannot run here: {reason}")


def _check_name(op: str, name: str) -> None:
    if name not in BACKENDS:
        raise ValueError(f"{op}: backend must be one of {', '.join(BACKENDS)} or None, got {name!r}")


def choose(
    op: str, implementations: Mapping[str, Implementation], requested: str | None, *args: Any
) -> Callable[..., Any]:
    """The implementation of ``op`` that serves the call ``args``.

    ``requested``, else ``use_backend``, else ``FASTVQ_BACKEND`` is taken or raises; with none of them, the fastest that
    supports the call.

    Raises:
        ValueError: the requested backend cannot serve the call, or none can; every refusal is listed.
    """
    named = requested or _override or _env.read("FASTVQ_BACKEND")
    if named:
        _check_name(op, named)
    refusals = []
    for name in [named] if named else BACKENDS:
        implementation = implementations.get(name)
        if implementation is None:
            reason: str | None = "it does not have this operation"
        else:
            reason = BACKENDS[name].unavailable() or implementation.refuse(*args)
            if reason is None:
                return _outside_autocast(implementation.run) if name == "reference" else implementation.run
        refusals.append(f"{name}: {reason}")
    remedy = "; pass backend=None to let fastvq choose" if named else ""
    raise ValueError(f"{op}: no backend can serve this call ({'; '.join(refusals)}){remedy}")


def _outside_autocast(run: Callable[..., Any]) -> Callable[..., Any]:
    """``run`` without autocast, which casts, or refuses, what torch's ``stack`` and ``cat`` are given."""
    devices = [d for d in ("cpu", "cuda") if torch.is_autocast_enabled(d)]
    if not devices:
        return run

    def plain(*args: Any) -> Any:
        with ExitStack() as stack:
            for device in devices:
                stack.enter_context(torch.autocast(device, enabled=False))
            return run(*args)

    return plain
