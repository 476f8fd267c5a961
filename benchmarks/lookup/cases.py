"""What bench_quantize.py measures: shapes, data and the sweeps behind its plots."""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

import fastvq
from harness import photographs

SHAPES = (
    (65536, 1024, 64),
    (65536, 1024, 256),
    (16384, 8192, 256),
    (65536, 16384, 8),
    (4096, 512, 64),
    (256, 512, 64),
)
QUICK_SHAPES = ((4096, 512, 64), (1021, 127, 31), (256, 512, 64))
PHOTOGRAPH_CODES = {"4x4x3": (1024, 4096), "8x8": (512,)}
PICTURE_CODES = (16, 64, 256, 1024, 4096)
QUICK_CODES = (16, 64)
SWEEP_CENTRE = {"N": 4096, "K": 1024, "D": 64}
SWEEPS = {
    "N": (64, 256, 1024, 4096, 16384, 65536),
    "K": (16, 64, 256, 1024, 4096, 16384),
    "D": (4, 8, 16, 32, 64, 128, 256, 512),
}
QUICK_SWEEPS = {"N": (64, 512, 4096), "K": (16, 128, 1024), "D": (4, 32, 256)}
THREADS_SHAPE = (16384, 1024, 64)
KMEANS_ITERATIONS = 12
SEED = 20170


@dataclass(frozen=True)
class Case:
    data: str  # "gaussian" or "photographs 4x4x3"
    n_vectors: int
    n_codes: int
    dim: int
    n_threads: int = 1
    sweep: str = ""  # "N", "K", "D" or "threads": a point of that plot only

    @property
    def shape(self) -> str:
        return f"{self.n_vectors}x{self.n_codes}x{self.dim}"

    @property
    def title(self) -> str:
        threads = "1 thread" if self.n_threads == 1 else f"{self.n_threads} threads"
        return f"{self.data}: N {self.n_vectors}, K {self.n_codes}, D {self.dim}, {threads}"

    def make(self) -> tuple[Tensor, Tensor]:
        """x [N, D] and codebook [K, D], float32, the same at every call."""
        if self.data != "gaussian":
            kind = self.data.split()[1]
            return photograph_vectors(kind), photograph_codebook(kind, self.n_codes)
        generator = torch.Generator().manual_seed(SEED + self.n_vectors * 31 + self.n_codes * 17 + self.dim)
        x = torch.randn(self.n_vectors, self.dim, generator=generator)
        return x, torch.randn(self.n_codes, self.dim, generator=generator)


@functools.cache
def photograph_vectors(kind: str) -> Tensor:
    """Patches [N, D] in an order that is drawn once, so that the first rows are no single picture."""
    patches = photographs.patches(kind)
    return torch.from_numpy(patches[np.random.default_rng(SEED).permutation(len(patches))])


@functools.cache
def photograph_codebook(kind: str, n_codes: int) -> Tensor:
    """[K, D], trained on the patches by k-means."""
    generator = torch.Generator().manual_seed(SEED)
    # A random start: k-means++ would take longer for these many codes than everything that is measured on them.
    return fastvq.kmeans(
        photograph_vectors(kind), n_codes, init="random", n_iter=KMEANS_ITERATIONS, generator=generator
    ).codebook


def gaussian_cases(shapes: Sequence[tuple[int, int, int]] = SHAPES, n_threads: int = 1) -> list[Case]:
    return [Case("gaussian", *shape, n_threads) for shape in shapes]


def photograph_cases(n_threads: int = 1, quick: bool = False) -> list[Case]:
    cases = []
    for kind, codes in PHOTOGRAPH_CODES.items():
        n_vectors, dim = photograph_vectors(kind).shape
        for n_codes in QUICK_CODES[:1] if quick else codes:
            cases.append(Case(f"photographs {kind}", n_vectors, n_codes, dim, n_threads))
    return cases


def sweep_cases(n_threads: int = 1, quick: bool = False) -> list[Case]:
    cases = []
    for axis, values in (QUICK_SWEEPS if quick else SWEEPS).items():
        for value in values:
            sizes = {**SWEEP_CENTRE, axis: value}
            cases.append(Case("gaussian", sizes["N"], sizes["K"], sizes["D"], n_threads, axis))
    return cases


def thread_cases(n_cores: int) -> list[Case]:
    """One shape on 1, 2, 4 ... threads, and on as many as there are cores."""
    counts = sorted({n_cores, *(1 << i for i in range(n_cores.bit_length()) if 1 << i <= n_cores)})
    return [Case("gaussian", *THREADS_SHAPE, n, "threads") for n in counts]


def chosen_cases(
    *,
    shapes: Sequence[tuple[int, int, int]] | None,
    data: Sequence[str],
    threads: Sequence[int],
    quick: bool,
    full: bool,
) -> list[Case]:
    """The cases of a run. ``shapes`` given replaces the Gaussian ones and leaves the sweeps out.

    Unless threads are named, everything runs on one, and the first shape on all of them as well (all shapes, in full).
    """
    gaussian = shapes or (QUICK_SHAPES if quick else SHAPES)
    n_cores = os.cpu_count() or 1
    cases = []
    for n_threads in threads or (1,):
        if "gaussian" in data:
            cases += gaussian_cases(gaussian, n_threads)
        if "photographs" in data:
            cases += photograph_cases(n_threads, quick)
    if "gaussian" in data and not threads and n_cores > 1:
        cases += gaussian_cases(gaussian if full else gaussian[:1], n_cores)
    if "gaussian" in data and shapes is None:
        cases += sweep_cases((threads or (1,))[0], quick)
        if not threads and n_cores > 1:
            cases += thread_cases(n_cores)
    return cases
