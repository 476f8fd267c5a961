"""Sums and counts per code, the kernel that EMA codebooks learn by, against the ways torch has.

    python benchmarks/bench_ema.py

Results are compared with float64 first. Writes ema.csv and ema.png to ./out (--out DIR).
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Sequence

import torch
from torch import Tensor

from harness import Row
from learning.measure import measure, parse, run
from learning.providers import STATISTICS

SHAPES = ((65536, 1024, 64), (65536, 1024, 256), (65536, 16384, 8), (4096, 512, 64))
LARGE = (1048576, 1024, 64)
QUICK = ((4096, 512, 64), (1021, 127, 31))
# A one-hot product above this many elements would take seconds and gigabytes.
MOST_ONE_HOT = 1 << 27


def judge(result: object, expected: Tensor, mass: Tensor, counts: Tensor) -> tuple[int, int]:
    """Sums off by more than one float32 rounding of the exact sum, and counts that differ."""
    sums, number = result  # type: ignore[misc]
    off = (sums.double() - expected).abs() > 2**-24 * expected.abs() + 2**-40 * mass
    return int(off.sum() + (number != counts).sum()), off.numel() + counts.numel()


def case(title: str, shape: tuple[int, int, int], n_threads: int, skewed: bool, seconds: float) -> list[Row]:
    n_vectors, n_codes, dim = shape
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n_vectors, dim, generator=generator)
    indices = torch.randint(n_codes, (n_vectors,), generator=generator)
    if skewed:  # nine vectors of ten in one code
        indices = torch.where(torch.rand(n_vectors, generator=generator) < 0.9, 0, indices)
    wide = x.double()
    expected, mass = (
        torch.zeros(n_codes, dim, dtype=torch.float64).index_add_(0, indices, t) for t in (wide, wide.abs())
    )
    learners = [s for s in STATISTICS if s.name != "one-hot" or n_vectors * n_codes <= MOST_ONE_HOT]
    check = functools.partial(judge, expected=expected, mass=mass, counts=torch.bincount(indices, minlength=n_codes))
    return measure(
        title, "x".join(map(str, shape)), n_threads, learners, (x, indices, n_codes), check, seconds
    )  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse("fastvq.ops.code_statistics against its peers; under a minute without arguments", arguments)
    shapes = QUICK if options.quick else (*SHAPES, LARGE)
    n_cores = os.cpu_count() or 1
    wanted = [(shape, 1, False) for shape in shapes] + [(shapes[0], 1, True)]
    if n_cores > 1:
        wanted += [(shape, n_cores, False) for shape in (shapes[:1] if not options.full else shapes)]
    cases = []
    for shape, n_threads, skewed in wanted:
        threads = "1 thread" if n_threads == 1 else f"{n_threads} threads"
        title = "N {}, K {}, D {}, ".format(*shape) + threads + (", 90 % in one code" if skewed else "")
        cases.append((title, functools.partial(case, title, shape, n_threads, skewed, 0.5 if options.quick else 4)))
    return run("ema", options, cases, [f"{s.name}: {s.setting}" for s in STATISTICS])


if __name__ == "__main__":
    sys.exit(main())
