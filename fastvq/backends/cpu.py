"""The compiled extension ``fastvq._cpu``: loading it, why it cannot serve a call, and which instruction set it uses."""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch

from fastvq import _env

_import_error: str | None = None
try:
    import fastvq._cpu as _cpu
except ModuleNotFoundError:
    _import_error = "was not built"
except ImportError as error:
    _import_error = f"cannot be loaded ({error})"

__all__ = [
    "ISAS",
    "ISAS_HERE",
    "ISA_NUMBERS_HERE",
    "amx_unavailable",
    "available_isas",
    "cpu_call",
    "isa",
    "unavailable",
    "why_unsupported_on",
]

Adapter = TypeVar("Adapter", bound=Callable[..., Any])

# The numbers of csrc/fastvq_cpu.h.
ISAS = {"generic": 0, "avx2": 1, "avx512": 2, "avx512_vnni": 3, "amx": 4, "emulated": 5}


def cpu_call(adapter: Adapter) -> Adapter:
    """Makes ``adapter``, which calls CPU kernels, the same whatever the caller set the processor to.

    Within the call the floating-point environment is the default one: rounding to nearest, denormals kept. After it the
    caller's is back. A call of Python's main thread that runs longer than 50 ms looks for signals from then on: Ctrl-C
    raises KeyboardInterrupt from inside the call, unless it is one that must finish (``ema_update_``).
    """

    @functools.wraps(adapter)
    def call(*args: Any, **kwargs: Any) -> Any:
        saved = _cpu.enter_call()
        try:
            return adapter(*args, **kwargs)
        finally:
            _cpu.leave_call(saved)

    return call  # type: ignore[return-value]


def _set_main_thread() -> None:
    _cpu.set_main_thread(threading.main_thread().ident or 0)


if _import_error is None:
    _set_main_thread()
    if hasattr(os, "register_at_fork"):  # the main thread of a child is the one that forked
        os.register_at_fork(after_in_child=_set_main_thread)


def unavailable() -> str | None:
    """Why the CPU kernels cannot run at all, or None."""
    if _import_error is not None:
        return f"the extension fastvq._cpu {_import_error}; {_remedy()}"
    return None


def _remedy() -> str:
    """For an extension that is missing; Python finds a source folder first when it runs in that folder."""
    folder = Path(__file__).resolve().parent.parent.parent
    if (folder / "setup.py").is_file() and (folder / "csrc").is_dir():
        return (
            f"this is the source folder {folder}: build it with pip install -e ., or leave the folder so that Python "
            "finds an installed fastvq"
        )
    return "reinstall fastvq"


def available_isas() -> list[str]:
    """Instruction sets that this build holds and this machine runs, weakest first; emulated tiles never come last."""
    return [] if _import_error is not None else _cpu.available_isas()


def amx_unavailable() -> str | None:
    """Why lookups do not run on matrix tiles here, or None."""
    return unavailable() or _cpu.amx_unavailable() or None


def isa() -> int:
    """The instruction set to use: the best one, or the one that FASTVQ_CPU_ISA names.

    Raises:
        ValueError: the machine does not have the one that is named.
    """
    available = ISAS_HERE
    forced = _env.read("FASTVQ_CPU_ISA")
    if forced is None:
        return ISAS[available[-1]]
    if forced not in available:
        reason = f" ({amx_unavailable()})" if forced == "amx" else ""
        raise ValueError(
            f"FASTVQ_CPU_ISA={forced}: this machine or build does not have that instruction set{reason}; "
            f"it has {', '.join(available)}; set one of those or unset it"
        )
    return ISAS[forced]


def why_unsupported_on(device: torch.device) -> str | None:
    return None if device.type == "cpu" else "it takes CPU tensors"


ISAS_HERE = available_isas()
ISA_NUMBERS_HERE = frozenset(ISAS[name] for name in ISAS_HERE)
