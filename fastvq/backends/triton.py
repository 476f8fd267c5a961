"""The Triton backend: can it run here, on which tensors, and with which tiles.

The kernels are in ``fastvq/ops/<op>/triton_*.py``. They are imported at the first call, because Triton is not there on
every machine that fastvq runs on, and because Triton reads ``TRITON_INTERPRET`` when a kernel is decorated: with
``TRITON_INTERPRET=1`` in the environment the kernels run on CPU tensors, in plain NumPy (slowly; for tests).
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import struct
from collections.abc import Callable
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "capability",
    "float64_bits",
    "interpreting",
    "lazy_function",
    "unavailable",
    "why_too_many_rows",
    "why_unsupported_on",
]

OLDEST_TRITON = (3, 6)
OLDEST = 80  # compute capability times ten: the first with bf16 tensor cores and asynchronous copies
ROWS_OF_ALL_LEVELS = 1 << 15  # of a residual quantization in one launch (fastvq/ops/residual/triton_levels.py)
MOST_ROWS = 2**31 - 2**16  # a last block that reaches over the end is still numbered in 32 bits


def interpreting() -> bool:
    """True where the kernels run in Triton's interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def _version(package: str) -> tuple[int, int] | None:
    """Of an installed package, unless it is one that was built without saying so."""
    try:
        major, minor = version(package).split(".")[:2]
        return int(major), int(minor)
    except (PackageNotFoundError, ValueError):
        return None


@cache
def _missing() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed; pip install triton"
    found, numpy = _version("triton"), _version("numpy")
    told = "" if found is None else f"{found[0]}.{found[1]}"
    if found is not None and found < OLDEST_TRITON:
        return f"it needs Triton 3.6 or later, got {told}; pip install -U triton"
    # The old interpreter passes loop bounds as 1-element arrays; NumPy >= 2.4 refuses those as indices.
    if interpreting() and found is not None and found < (3, 7) and numpy is not None and numpy >= (2, 4):
        return f"the interpreter of Triton {told} needs NumPy below 2.4; pip install -U triton, or 'numpy<2.4'"
    return None


def unavailable() -> str | None:
    """Why the Triton kernels cannot run at all, or None."""
    reason = _missing()
    if reason is None and not interpreting() and not torch.cuda.is_available():
        reason = "torch sees no GPU (with TRITON_INTERPRET=1, set before the start, the kernels run on CPU tensors)"
    return reason


def capability(device: torch.device) -> int:
    """Compute capability times ten, 90 for an H100. The interpreter runs the oldest card's tiles."""
    if device.type != "cuda":
        return OLDEST
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def why_unsupported_on(device: torch.device) -> str | None:
    if device.type == "cpu" and interpreting():
        return None
    if device.type != "cuda":
        return "it takes CUDA tensors"
    if (found := capability(device)) < OLDEST:
        return f"it needs compute capability {OLDEST / 10} or later, {device} has {found / 10}"
    return None


def why_too_many_rows(x: Tensor) -> str | None:
    """Why a kernel cannot number the vectors of x [..., D] in 32 bits, or None. Addresses have 64."""
    if x.numel() // x.shape[-1] > MOST_ROWS:
        return f"it takes at most {MOST_ROWS} vectors in one call, got {x.numel() // x.shape[-1]}; split them"
    return None


def lazy_function(module: str, name: str) -> Callable[..., Any]:
    """The function ``name`` of ``module``, which is imported at its first call, on the device of its first tensor.

    It takes tensors and other arguments, or a NamedTuple of them.
    """

    def run(*args: Any) -> Any:
        function = getattr(importlib.import_module(module), name)
        device = (args[0] if isinstance(args[0], Tensor) else args[0][0]).device
        if device.type != "cuda":
            return function(*args)
        with torch.cuda.device(device):  # Triton launches on the current device, not on its tensors'
            return function(*args)

    return run


def float64_bits(value: float) -> int:
    """``value`` as a kernel takes it whole, the integer of its bits: Triton makes a float32 of a Python float."""
    return int(struct.unpack("q", struct.pack("d", value))[0])
