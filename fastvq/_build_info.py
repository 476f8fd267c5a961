"""What was built, what was chosen, and why a backend cannot run."""

from __future__ import annotations

from typing import Any

import torch

from fastvq._version import VERSION
from fastvq.backends import cpu as cpu_backend
from fastvq.backends import cuda as cuda_backend
from fastvq.backends.registry import BACKENDS, serving

__all__ = ["build_info"]


def build_info() -> dict[str, Any]:
    """What this build holds and what it uses on this machine.

    Returns a dictionary:

    - ``version``, ``torch``, ``threads``: of fastvq, of torch, and ``torch.get_num_threads()``;
    - ``cpu``: ``compiler``, the instruction sets ``available`` here (weakest first), the one in use, ``isa``
      (None, with the reason under ``backends``, where the extension was not built), and ``amx``, why lookups do not run
      on matrix tiles (None where they can);
    - ``cuda``: ``compiler`` and the GPU ``architectures`` compiled for; None and none where it was not built;
    - ``devices``: for each kind of device that torch sees, the ``backend`` that serves calls which name none
      (``use_backend`` and ``FASTVQ_BACKEND`` count) and, where that is the reference, the ``reason`` why no kernels do;
    - ``backends``: for each, fastest first, ``what`` it is, whether it is ``available``, and the ``reason`` if not.

    Raises:
        ValueError: ``FASTVQ_CPU_ISA`` names an instruction set that this machine does not have.
    """
    missing = cpu_backend.unavailable()
    available = cpu_backend.available_isas()
    names = {number: name for name, number in cpu_backend.ISAS.items()}
    return {
        "version": VERSION,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "cpu": {
            "compiler": None if missing else cpu_backend._cpu.compiler(),
            "available": available,
            "isa": None if missing else names[cpu_backend.isa()],
            "amx": cpu_backend.amx_unavailable(),
        },
        "cuda": {
            "compiler": cuda_backend._cuda.compiler() if cuda_backend.built() else None,
            "architectures": cuda_backend._cuda.architectures().split() if cuda_backend.built() else [],
        },
        "devices": {
            str(device): dict(zip(("backend", "reason"), serving(device), strict=True)) for device in _devices()
        },
        "backends": {
            b.name: {"what": b.what, "available": (reason := b.unavailable()) is None, "reason": reason}
            for b in BACKENDS.values()
        },
    }


def _devices() -> list[torch.device]:
    found = [torch.device("cpu"), *(torch.device("cuda", i) for i in range(torch.cuda.device_count()))]
    for kind in ("mps", "xpu"):
        module = getattr(torch, kind, None)
        if module is not None and module.is_available():
            found.append(torch.device(kind))
    return found
