"""The compiled extension ``fastvq._cuda``: is it there, can it run, on which tensors, on which stream."""

from __future__ import annotations

from contextlib import AbstractContextManager
from functools import cache
from typing import Any

import torch
from torch import Tensor

_import_error: str | None = None
try:
    import fastvq._cuda as _cuda
except ModuleNotFoundError:
    _import_error = "was not built"
except ImportError as error:
    _import_error = f"cannot be loaded ({error})"

__all__ = ["built", "on_device_of", "stream", "unavailable", "why_unsupported_on", "workspace"]

OLDEST = (8, 0)  # the first with asynchronous copies to shared memory
DEVICE = "cuda"  # the type of device whose tensors the kernels take


def built() -> bool:
    return _import_error is None


@cache
def _no_device() -> str | None:
    return _cuda.unavailable()


def unavailable() -> str | None:
    """Why the CUDA C++ kernels cannot run at all, or None."""
    if _import_error is not None:
        return (
            f"the extension fastvq._cuda {_import_error}; "
            "install the CUDA toolkit (nvcc) and reinstall fastvq with FASTVQ_CUDA=1"
        )
    if (reason := _no_device()) is not None:
        return f"no CUDA device can be used: {reason}"
    return None


def why_unsupported_on(device: torch.device) -> str | None:
    if device.type != DEVICE:
        return "it takes CUDA tensors"
    if DEVICE == "cuda" and (found := torch.cuda.get_device_capability(device)) < OLDEST:
        return f"it needs compute capability {OLDEST[0]}.{OLDEST[1]} or later, {device} has {found[0]}.{found[1]}"
    return None


def on_device_of(x: Tensor) -> AbstractContextManager[Any]:
    """Kernels are launched on the current device, which within the block is that of ``x``."""
    return torch.cuda.device(x.device)


def stream(x: Tensor) -> int:
    """The stream that torch uses on the device of ``x``: kernels go there, so nothing waits for anything."""
    return torch.cuda.current_stream(x.device).cuda_stream


def workspace(x: Tensor, n_bytes: int) -> Tensor:
    """Memory for a kernel. Once the kernel is queued it may be freed: torch gives it to later work of that stream."""
    return torch.empty(n_bytes, dtype=torch.uint8, device=x.device)
