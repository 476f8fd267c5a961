"""The table of backends: which exist, which can run here, and which one a call or a block names.

An op holds one ``Kernel`` a backend and chooses among them: fastvq/ops/_op.py.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from typing import NamedTuple

import torch

from fastvq import _env
from fastvq.backends import cpu as cpu_backend
from fastvq.backends import cuda as cuda_backend
from fastvq.backends import triton as triton_backend

__all__ = [
    "BACKENDS",
    "Backend",
    "bound_backend",
    "check_backend",
    "named_backend",
    "outside_autocast",
    "serving",
    "use_backend",
    "warn_of_reference",
    "why_unsupported_on",
]


class Backend(NamedTuple):
    name: str
    what: str
    unavailable: Callable[[], str | None]  # why it cannot run on this machine at all, or None
    why_unsupported_on: Callable[[torch.device], str | None]  # why it cannot serve tensors of that device, or None


# In order of preference, unless an op declares another. Triton's interpreter takes CPU tensors too: it is slower than
# anything, so it stands behind the CPU kernels. On an H100 Triton's lookup is 2 to 5 times faster than the lookup of
# CUDA C++: benchmarks/results/nvidia_h100_80gb_hbm3/lookup.csv.
BACKENDS: dict[str, Backend] = {
    b.name: b
    for b in (
        Backend("cpu", "C++ kernels for CPU tensors", cpu_backend.unavailable, cpu_backend.why_unsupported_on),
        Backend(
            "triton", "Triton kernels for CUDA tensors", triton_backend.unavailable, triton_backend.why_unsupported_on
        ),
        Backend("cuda", "CUDA C++ kernels for CUDA tensors", cuda_backend.unavailable, cuda_backend.why_unsupported_on),
        Backend("reference", "plain torch, any device", lambda: None, lambda device: None),
    )
}


_override: ContextVar[str | None] = ContextVar("fastvq_backend", default=None)
_serves: set[tuple[str, torch.device]] = set()  # backends that were found to run on a device
_warned: set[str] = set()  # types of device whose calls fell to the reference


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Within the block, every fastvq call of this thread that names no backend uses ``name``.

    As with ``backend=`` of a single call there is no falling back: a call that ``name`` cannot serve raises, with the
    reason. ``FASTVQ_BACKEND`` does the same for a whole process.

    The choice is a context variable: other threads, and other tasks of asyncio, are not affected, whatever they do
    meanwhile, and a thread that is started inside the block does not inherit it (``contextvars.copy_context().run``
    hands it on). A backward uses what its forward was called with, on whatever thread and after the block too.

    A graph of ``torch.compile`` asks at every run: its forward and its backward use ``name`` where they are run inside
    the block, wherever the graph was compiled. On a GPU a compiled backward runs on a thread of autograd's, where no
    block is seen: pass ``backend=`` in the compiled function to fix it there.

    Raises:
        ValueError: ``name`` is no backend, or cannot run on this machine.
    """
    check_backend("fastvq.use_backend", name)
    token = _override.set(name)
    try:
        yield
    finally:
        _override.reset(token)


def bound_backend(requested: str | None) -> str | None:
    """What a call's backward must name to get the backend that the call named, or that ``use_backend`` did.

    While a graph is being compiled: ``requested``, as the graph will be run inside and outside of ``use_backend``.
    """
    return requested if torch.compiler.is_compiling() else requested or _override.get()


def check_backend(op: str, name: str) -> None:
    """ValueError where ``name`` is no backend, or one that cannot run on this machine."""
    _check_name(op, name)
    reason = BACKENDS[name].unavailable()
    if reason is not None:
        raise ValueError(f"{op}: backend {name!r} cannot run here: {reason}")


def _check_name(op: str, name: str) -> None:
    if name not in BACKENDS:
        raise ValueError(f"{op}: backend must be one of {', '.join(BACKENDS)} or None, got {name!r}")


def why_unsupported_on(name: str, device: torch.device) -> str | None:
    """Why the backend ``name`` cannot serve tensors on ``device``, or None, which is remembered."""
    if (name, device) in _serves:
        return None
    backend = BACKENDS[name]
    reason = backend.unavailable() or backend.why_unsupported_on(device)
    if reason is None:
        _serves.add((name, device))
    return reason


def named_backend(op: str, requested: str | None) -> str | None:
    """The backend that a call of ``op`` has to use: ``requested``, else ``use_backend``, else ``FASTVQ_BACKEND``."""
    named = requested or _override.get() or _env.read("FASTVQ_BACKEND")
    if named:
        _check_name(op, named)
    return named


@contextmanager
def outside_autocast() -> Iterator[None]:
    """Within the block autocast is off: it casts, or refuses, what torch's ``stack`` and ``cat`` are given."""
    with ExitStack() as stack:
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        yield


def serving(device: torch.device) -> tuple[str, str | None]:
    """The backend that serves calls on ``device`` which name none, and, for the reference, why no kernels do."""
    named = _override.get() or _env.read("FASTVQ_BACKEND")
    if named:
        return named, None
    reasons: list[str] = []
    for backend in BACKENDS.values():
        reason = backend.why_unsupported_on(device) or backend.unavailable()
        if reason is None:
            return backend.name, "; ".join(reasons) if backend.name == "reference" else None
        reasons.append(f"{backend.name}: {reason}")
    raise AssertionError("the reference serves every device")


def warn_of_reference(op: str, device: torch.device) -> None:
    """Warns once for each type of device on which no kernels run, so that the reference serves its calls."""
    if device.type in _warned or device.type == "meta":  # which computes nothing
        return
    backend, reason = serving(device)
    if backend != "reference":
        return  # kernels run on the device, though not for this call: the op's documentation says which it takes
    _warned.add(device.type)
    warnings.warn(
        f"{op}: no fastvq kernels run on {device.type} tensors here, so plain torch serves them (backend 'reference'): "
        f"right, but many times slower. {reason}. {_remedy(device)}, or choose backend='reference' to do without this "
        "warning",
        RuntimeWarning,
        stacklevel=2,
    )


def _remedy(device: torch.device) -> str:
    if device.type == "cpu":
        return "Build the CPU kernels: pip install fastvq-kernels, or pip install -e . in its source folder"
    if device.type == "cuda":
        return "Install a Triton that serves, or build the CUDA C++ kernels, as the reasons say"
    return f"There are no kernels for {device.type}: move the tensors to a CPU or to a CUDA GPU"
