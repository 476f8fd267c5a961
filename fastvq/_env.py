"""Every environment variable that fastvq reads, in one table. Each is read at every call, or by setup.py as noted."""

from __future__ import annotations

import os
from typing import Any, NamedTuple

__all__ = ["VARIABLES", "Variable", "read"]


class Variable(NamedTuple):
    name: str
    values: tuple[str, ...]  # what it may hold, besides being unset or empty
    meaning: str


VARIABLES = {
    v.name: v
    for v in (
        Variable("FASTVQ_BACKEND", ("cpu", "triton", "cuda", "reference"), "backend of every call that names none"),
        Variable(
            "FASTVQ_CPU_ISA",
            ("generic", "avx2", "avx512", "avx512_vnni", "amx", "emulated"),
            "instruction set of the CPU kernels, not the best",
        ),
        Variable("FASTVQ_EMULATED_TILES", ("0", "1"), "build the emulated tiles, for tests without AMX"),  # by setup.py
        Variable("FASTVQ_TESTING", ("0", "1"), "build fastvq._cpu_testing, for tests and benchmarks"),  # by setup.py
        Variable(
            "FASTVQ_CHECK",
            ("0", "1", "2"),
            "1: check indices on a GPU too, those of a backward included, which waits for the device "
            "(unchecked, a wrong one is left out or reads some code); 2: also that ranks hold the same codebooks",
        ),
        Variable("FASTVQ_AUTOTUNE", ("0", "1"), "time the Triton kernels' tiles, and keep the fastest on disk"),
        Variable("FASTVQ_CUDA", ("0", "1"), "0: leave the CUDA C++ kernels out, 1: stop without nvcc"),  # by setup.py
    )
}


# Ops read variables at every call. To see that one is unset takes 1 us in os.environ, which raises and catches a
# KeyError, and 0.1 us in the dictionary behind it. Where Python has no such dictionary, os.environ alone is asked.
_RAW: dict[Any, Any] | None = getattr(os.environ, "_data", None)
_RAW_NAMES = {name: os.environ.encodekey(name) for name in VARIABLES}


def read(name: str) -> str | None:
    """The value of a variable of the table, None where it is unset or empty; ValueError where the table forbids it."""
    if _RAW is not None and _RAW_NAMES[name] not in _RAW:
        return None
    variable = VARIABLES[name]
    value = os.environ.get(name) or None
    if value is not None and value not in variable.values:
        raise ValueError(
            f"{name}={value!r}: expected one of {', '.join(variable.values)} ({variable.meaning}); "
            f"change it, or unset it for the default"
        )
    return value
