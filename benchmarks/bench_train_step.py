"""A quantizer's whole training step: lookup, gather, estimator, loss, statistics, update, backward.

    python benchmarks/bench_train_step.py

Indices of the first step are compared with the exact ones first. Writes train_step.csv and train_step.png to ./out
(--out DIR).
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Sequence

import torch

from fastvq.ops import nearest
from harness import Row
from learning.measure import measure, parse, run
from learning.providers import RESIDUAL_STEPS, STEPS, exact_levels

SHAPE, QUICK_SHAPE = (65536, 1024, 64), (4096, 512, 64)
# levels, N, K, D; a step of the peer's takes a quarter of a minute at the full size
RESIDUAL, FULL_RESIDUAL, QUICK_RESIDUAL = (8, 8192, 1024, 128), (8, 32768, 1024, 128), (3, 1024, 128, 32)


def differing(indices: torch.Tensor, expected: torch.Tensor) -> tuple[int, int]:
    return int((indices != expected).sum()), expected.numel()


def case(title: str, n_threads: int, levels: int, shape: tuple[int, int, int], seconds: float) -> list[Row]:
    n_vectors, n_codes, dim = shape
    generator = torch.Generator().manual_seed(2)
    x, gradient = torch.randn(2, n_vectors, dim, generator=generator)
    if levels == 1:
        codes = torch.randn(n_codes, dim, generator=generator)
        learners, expected = STEPS, nearest(x, codes)
    else:
        codes = torch.randn(levels, n_codes, dim, generator=generator) * 0.8 ** torch.arange(levels)[:, None, None]
        learners, expected = RESIDUAL_STEPS, exact_levels(x, codes)
    sizes = "x".join(map(str, shape if levels == 1 else (levels, *shape)))
    check = functools.partial(differing, expected=expected)
    return measure(title, sizes, n_threads, learners, (x, gradient, codes), check, seconds)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse("training steps of quantizers; about 3 minutes without arguments", arguments)
    shape = QUICK_SHAPE if options.quick else SHAPE
    levels, *sizes = QUICK_RESIDUAL if options.quick else FULL_RESIDUAL if options.full else RESIDUAL
    n_cores = os.cpu_count() or 1
    cases = []
    for n_threads in dict.fromkeys((1, n_cores)):
        threads = "1 thread" if n_threads == 1 else f"{n_threads} threads"
        title = "N {}, K {}, D {}, ".format(*shape) + threads
        cases.append((title, functools.partial(case, title, n_threads, 1, shape, 1 if options.quick else 10)))
    title = "residual: {} levels, N {}, K {}, D {}, 1 thread".format(levels, *sizes)
    residual = functools.partial(case, title, 1, levels, tuple(sizes), 1 if options.quick else 10)
    cases.append((title, residual))
    return run("train_step", options, cases, [f"{s.name}: {s.setting}" for s in (*STEPS, *RESIDUAL_STEPS)])


if __name__ == "__main__":
    sys.exit(main())
