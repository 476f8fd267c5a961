"""Millions of lookups against float64, for minutes or hours: every index must be the definition's.

    python tests/soak_exact.py --lookups 1e8 --bound-rows 1e6 --near-ties 1e5

Three parts, each with its own argument (0 leaves it out):

- random and adversarial data, all metrics and dtypes, sizes drawn anew, against NumPy float64 in the contract's order;
- near-ties against Python's ``fractions``: the exact distances, where float64 separates them by more than it rounds;
- the filter's error bound over rows of every distribution: the largest |score - truth| / bound may not exceed 1.

Prints a line a part and instruction set; ends with status 1 at the first index or bound that is wrong.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from fractions import Fraction
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from fastvq.backends import cpu as cpu_backend
from fastvq.ops import nearest
from tests.ops.test_nearest_bound import use_of_bound
from tests.ops.test_nearest_kernel import lookup
from tests.support import oracle
from tests.support.cases import DTYPES, HARD, METRICS, generator
from tests.support.distributions import DISTRIBUTIONS

ROWS = 4000  # a batch


def fail(message: str) -> None:
    print(f"WRONG: {message}", file=sys.stderr)
    sys.exit(1)


def draw(options, g):
    return options[int(torch.randint(len(options), (), generator=g))]


def batch(seed: int):
    """x, codebook, metric and a name: a distribution or a hard case, sizes and dtypes at random."""
    g = generator(seed)
    metric = draw(METRICS, g)
    if seed % 8 == 0:
        name = draw(list(HARD), g)
        x, codebook = HARD[name](g)
    else:
        name = draw(list(DISTRIBUTIONS), g)
        k, d = (int(2 ** (torch.rand((), generator=g) * bits)) for bits in (8, 6))
        x, codebook = DISTRIBUTIONS[name](g, ROWS, k, d)
    return x.to(draw(DTYPES, g)), codebook.to(draw(DTYPES, g)), metric, name


def soak(n_lookups: int, isa: str, first_seed: int) -> None:
    start, done, seed = time.monotonic(), 0, first_seed
    while done < n_lookups:
        x, codebook, metric, name = batch(seed)
        wrong = (nearest(x, codebook, metric=metric, backend="cpu") != oracle.nearest(x, codebook, metric)).sum()
        if wrong:
            fail(f"{isa}, seed {seed} ({name}, {metric}, {list(x.shape)} x {list(codebook.shape)}): {int(wrong)} rows")
        done += len(x)
        seed += 1
    print(f"{isa}: {done} lookups, 0 wrong, {time.monotonic() - start:.0f} s", flush=True)


def exact_distance(row: list[float], code: list[float]) -> Fraction:
    return sum(((Fraction(v) - Fraction(c)) ** 2 for v, c in zip(row, code, strict=True)), Fraction(0))


def near_ties(n: int, isa: str, first_seed: int) -> None:
    """Rows near the middle of two codes: exact distances decide, but where float64 in the contract's order cannot."""
    start, exact, d = time.monotonic(), 0, 5
    for seed in range(first_seed, first_seed + (n + ROWS - 1) // ROWS):
        g = generator(seed)
        codebook = torch.randn(40, d, generator=g, dtype=torch.float64)
        a, b = torch.randint(40, (2, ROWS), generator=g)
        x = (codebook[a] + codebook[b]) / 2 + 1e-14 * torch.randn(ROWS, d, generator=g, dtype=torch.float64)
        got = nearest(x, codebook, backend="cpu")
        distances = oracle.distances(x.numpy(), codebook.numpy(), "euclidean")
        for i, (row, index) in enumerate(zip(x.tolist(), got.tolist(), strict=True)):
            # (D + 3) roundings of 2^-53 on either side; only codes within that of the least can be least.
            close = (distances[i] <= distances[i].min() * (1 + 4 * (d + 3) * 2.0**-53)).nonzero()[0].tolist()
            truth = {k: exact_distance(row, codebook[k].tolist()) for k in close}
            least = min(truth.values())
            if index not in truth:
                fail(f"{isa}, near-ties, seed {seed}, row {i}: {index} is no nearest code")
            if float(truth[index] - least) > 2 * (d + 3) * 2.0**-53 * float(least):
                fail(f"{isa}, near-ties, seed {seed}, row {i}: {index} is further than rounding explains")
            if index != int(distances[i].argmin()):
                fail(f"{isa}, near-ties, seed {seed}, row {i}: not the definition's index")
            exact += truth[index] == least
    print(f"{isa}: {n} near-ties, {exact} of the indices nearest in exact arithmetic, {time.monotonic() - start:.0f} s")


def bounds(n: int, isa: str, first_seed: int) -> None:
    print(f"{isa}: {'distribution':28} {'metric':10} largest |error|/bound   rows scored twice   by the definition")
    for name, make in DISTRIBUTIONS.items():
        for metric in METRICS:
            worst, done, rescored, scanned, seed = 0.0, 0, 0, 0, first_seed
            while done < n:
                g = generator(seed)
                x, codebook = make(g, min(n, 50_000), 64, draw((8, 16, 32, 64), g))
                used, _ = use_of_bound(x, codebook, metric, isa)
                if not used <= 1:
                    fail(f"{isa}, {name}, {metric}, seed {seed}: the error is {used:.4g} of its bound")
                counts = lookup(x, codebook, metric)[1:]
                worst, done, seed = max(worst, used), done + len(x), seed + 1
                rescored, scanned = rescored + counts[0], scanned + counts[1]
            print(
                f"{isa}: {name:28} {metric:10} {worst:17.3f} {rescored / done:19.1%} {scanned / done:19.1%}", flush=True
            )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lookups", type=float, default=1e6, help="default: 1e6")
    parser.add_argument("--near-ties", type=float, default=1e4, help="default: 1e4")
    parser.add_argument("--bound-rows", type=float, default=2e4, help="of each distribution and metric; default: 2e4")
    parser.add_argument("--isa", help="instruction sets, with commas between; default: all of this machine and build")
    parser.add_argument("--seed", type=int, default=1, help="the first of the seeds; default: 1")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for isa in options.isa.split(",") if options.isa else cpu_backend.available_isas():
        os.environ["FASTVQ_CPU_ISA"] = isa
        soak(int(options.lookups), isa, options.seed)
        near_ties(int(options.near_ties), isa, options.seed)
        if options.bound_rows:
            bounds(int(options.bound_rows), isa, options.seed)
    return 0


if __name__ == "__main__":
    sys.exit(main())
