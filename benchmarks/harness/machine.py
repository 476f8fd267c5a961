"""What a figure was measured on: processor, cores, versions, commit, and how fast the machine can multiply and add."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

import fastvq

PACKAGES = ("torch", "numpy", "faiss-cpu", "vector-quantize-pytorch", "scikit-image", "matplotlib")
# Numbers of the binding's instruction sets.
ISAS = ("generic", "avx2", "avx512", "avx512_vnni", "amx")
# Variables that hold a competitor to an instruction set or a number of threads: a figure without them is not the same.
VARIABLES = ("FASTVQ_CPU_ISA", "FAISS_OPT_LEVEL", "OPENBLAS_CORETYPE", "OMP_NUM_THREADS", "MKL_ENABLE_INSTRUCTIONS")
PROBE_MILLISECONDS = 3
NO_CEILINGS = (
    "ceilings: fastvq._cpu_testing, which measures them, is not part of this install; "
    "pip install -e . builds it, and so does FASTVQ_TESTING=1"
)


def processor_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return " ".join(line.partition(":")[2].split())
    return platform.processor() or platform.machine()


def commit() -> str:
    """The commit of the checkout this file lies in, with + where tracked files differ from it."""
    here = Path(__file__).parent
    try:
        run = subprocess.run(
            ["git", "describe", "--always", "--dirty=+", "--abbrev=12"], cwd=here, capture_output=True, text=True
        )
    except OSError:
        return "unknown"
    return run.stdout.strip() if run.returncode == 0 else "unknown"


def describe_machine() -> str:
    isa = fastvq.build_info()["cpu"]["isa"]
    n_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    held = [f"{name}={os.environ[name]}" for name in VARIABLES if name in os.environ]
    return "; ".join([f"{processor_name()}, {n_cores} cores, {platform.system()}, fastvq runs {isa}", *held])


def describe_versions() -> str:
    found = [f"fastvq {fastvq.__version__}", f"python {platform.python_version()}"]
    for name in PACKAGES:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return "; ".join(found)


class Ceilings:
    """Float32 FMA rate of each instruction set, measured beside the competitors: neighbours move it by the minute.

    ``probe()`` once a round; ``gflops(isa)`` is the median over the probes so far, of all threads together. None where
    ``fastvq._cpu_testing`` is absent.
    """

    @staticmethod
    def unavailable() -> str | None:
        """Why there are no ceilings, or None."""
        return NO_CEILINGS if importlib.util.find_spec("fastvq._cpu_testing") is None else None

    def __init__(self, n_threads: int, isas: Sequence[str]) -> None:
        self._n_threads = n_threads
        if self.unavailable():
            isas = ()
        else:
            self._peak = importlib.import_module("fastvq._cpu_testing").peak_gflops
        self._measured: dict[str, list[float]] = {isa: [] for isa in isas if isa in ISAS}

    def probe(self) -> None:
        with ThreadPoolExecutor(self._n_threads) as pool:
            for isa, measured in self._measured.items():
                number = ISAS.index(isa)
                rates = pool.map(lambda _: self._peak(number, PROBE_MILLISECONDS), range(self._n_threads))  # noqa: B023
                measured.append(sum(rates))

    def gflops(self, isa: str) -> float | None:
        measured = self._measured.get(isa)
        return statistics.median(measured) if measured else None

    def strongest(self) -> float | None:
        rates = [rate for rate in map(self.gflops, self._measured) if rate is not None]
        return max(rates, default=None)


def available_mib() -> float | None:
    """Memory that can be had without swapping, None where the system does not tell."""
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        return None
    line = next((line for line in meminfo.read_text().splitlines() if line.startswith("MemAvailable:")), None)
    return None if line is None else int(line.split()[1]) / 1024


def read_bandwidth(n_mib: int = 256, n_repeats: int = 5) -> float:
    """GB/s at which the threads torch is held to sum an array that no cache holds, best of a few."""
    data = torch.ones(n_mib * 2**18)
    best = min(_seconds(data.sum) for _ in range(n_repeats))
    return data.nbytes / best / 1e9


def _seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
