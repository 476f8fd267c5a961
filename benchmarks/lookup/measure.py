"""One case, every provider: indices are compared first, then those that may be timed are timed side by side."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from harness import (
    Call,
    Ceilings,
    PeakMemory,
    Row,
    count_differing,
    interleave,
    nearest_float64,
    paired_ratio,
    thread_count,
)
from harness.machine import available_mib
from harness.timing import environment
from lookup.cases import SEED, Case
from lookup.providers import Lookup, Provider

# The strongest providers are timed at full size: scaling up a few vectors would multiply a call's fixed costs.
HEADLINE = ("cdist", "faiss")
PILOT_VECTORS = 512
PILOT_CALLS = 3
# A slow provider is timed on at least this many vectors: smaller products run at another speed than those of full size.
LEAST_VECTORS = 1024
# A call that takes at most 1 / ENOUGH of its time is timed at full size, so that its figure needs no scaling.
ENOUGH = 0.6
MEMORY_SHARE = 0.5  # of what the machine has free


@dataclass(frozen=True)
class Budget:
    """How much a case may take."""

    call_seconds: float  # a call that would take longer is timed on fewer vectors
    headline_seconds: float  # the same for those that a comparison is quoted against
    seconds: float  # for all rounds of a case together, beyond the least number of rounds
    min_rounds: int = 3
    n_checked: int | None = 4096  # sampled rows whose indices are compared; None: all


DEFAULT = Budget(call_seconds=0.12, headline_seconds=1.0, seconds=3)
SWEEP = Budget(call_seconds=0.05, headline_seconds=0.2, seconds=0.5)
QUICK = Budget(call_seconds=0.03, headline_seconds=0.03, seconds=0.2)
FULL = Budget(call_seconds=float("inf"), headline_seconds=float("inf"), seconds=30, min_rounds=5, n_checked=None)


@dataclass
class Contender:
    provider: Provider
    row: Row
    lookup: Lookup
    x: Tensor  # [rows timed, D]
    seconds: float  # of one call

    @property
    def scale(self) -> float:
        return 1 / self.row.subset


@dataclass(frozen=True)
class Sample:
    """The vectors whose right indices are known, and all vectors with those first."""

    positions: np.ndarray  # [S] sorted
    expected: np.ndarray  # [S]
    sample_first: Tensor  # [N, D]

    @classmethod
    def draw(cls, x: Tensor, codebook: Tensor, n_checked: int | None) -> Sample:
        order = np.random.default_rng(SEED).permutation(len(x))
        positions = np.sort(order[:n_checked])
        expected = nearest_float64(x[positions].numpy(), codebook.numpy())
        if n_checked is None or n_checked >= len(x):
            return cls(positions, expected, x)
        return cls(positions, expected, x[np.concatenate([positions, order[n_checked:]])])


def seconds_of(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def set_up(provider: Provider, case: Case, x: Tensor, codebook: Tensor, sample: Sample, limit: float) -> Contender:
    """Warm a provider up, choose how many vectors fit ``limit`` seconds, measure its memory, compare its indices."""
    row = Row(case.title, case.shape, case.data, case.n_threads, provider.name)
    n_vectors = len(x)
    x, sample_first = x.to(provider.input_dtype), sample.sample_first.to(provider.input_dtype)
    pilot = x[:PILOT_VECTORS]
    # What a first call ever costs (thread pools, compilation, library buffers) is not what a call costs.
    provider.prepare(codebook[:16])(x[:16])
    lookup = provider.prepare(codebook)
    if provider.compiles:
        lookup(pilot)
    with PeakMemory() as memory:
        pilot_seconds = min(seconds_of(lambda: lookup(pilot)) for _ in range(PILOT_CALLS))
        n_timed = vectors_to_time(n_vectors, len(pilot), pilot_seconds, memory.so_far(), limit)
        timed = x if n_timed == n_vectors else sample_first[:n_timed]
        start = time.perf_counter()
        indices = lookup(timed)
        seconds = time.perf_counter() - start
    found = np.asarray(indices, np.int64)
    found = found[sample.positions] if n_timed == n_vectors else found[: len(sample.positions)]
    row.subset = n_timed / n_vectors
    row.extra_mib, row.memory_method = memory.mib, memory.method
    row.compared = len(found)
    row.differing = count_differing(found, sample.expected[: len(found)])
    if provider.rescored is not None:
        row.rescored = provider.rescored(timed, codebook)
    return Contender(provider, row, lookup, timed, min(seconds, pilot_seconds * n_timed / len(pilot)))


def vectors_to_time(n_vectors: int, n_pilot: int, pilot_seconds: float, pilot_mib: float | None, limit: float) -> int:
    share = min(1.0, limit / (pilot_seconds * n_vectors / n_pilot))
    free = available_mib()
    if pilot_mib and free is not None:
        share = min(share, MEMORY_SHARE * free / (pilot_mib * n_vectors / n_pilot))
    if share > ENOUGH:
        return n_vectors
    return min(n_vectors, max(LEAST_VECTORS, int(share * n_vectors) // LEAST_VECTORS * LEAST_VECTORS))


def measure(case: Case, providers: Sequence[Provider], budget: Budget) -> list[Row]:
    """A row for each provider. No time is taken of one of ours that has a wrong index, or of one that fails."""
    gc.collect()  # between cases: a collection inside one would release memory that a call is measured against
    x, codebook = case.make()
    contenders, rows = [], []
    with thread_count(case.n_threads), torch.no_grad():
        sample = Sample.draw(x, codebook, budget.n_checked)
        base = next((p for p in providers if p.ours), None)
        for provider in providers:
            quoted = provider is base or provider.name in HEADLINE
            limit = budget.headline_seconds if quoted else budget.call_seconds
            try:
                with environment(provider.environment):
                    contender = set_up(provider, case, x, codebook, sample, limit)
            except Exception as error:  # a peer may raise anything, and the others must still be compared
                note = f"failed: {type(error).__name__}: {error}".splitlines()[0]
                rows.append(Row(case.title, case.shape, case.data, case.n_threads, provider.name, note=note))
                continue
            rows.append(contender.row)
            if provider.ours and contender.row.differing:
                contender.row.note = "WRONG INDICES, not timed"
                continue
            contenders.append(contender)
        time_side_by_side(case, contenders, budget)
    return rows


def time_side_by_side(case: Case, contenders: Sequence[Contender], budget: Budget) -> None:
    calls = {
        c.provider.name: Call(lambda c=c: c.lookup(c.x), c.seconds, c.provider.environment)  # type: ignore[misc]
        for c in contenders
    }
    ceilings = Ceilings(case.n_threads, [c.provider.isa for c in contenders if c.provider.isa])
    measured = interleave(calls, seconds=budget.seconds, min_rounds=budget.min_rounds, probe=ceilings.probe)
    base = next((c for c in contenders if c.provider.ours), None)
    for c in contenders:
        times, row = measured[c.provider.name], c.row
        row.calls = len(times.calls)
        row.p20_ms, row.p50_ms, row.p80_ms = (1e3 * c.scale * times.quantile(q) for q in (0.2, 0.5, 0.8))
        row.cores = times.cores
        row.gflops = 2e-6 * case.n_vectors * case.n_codes * case.dim / row.p50_ms
        row.ceiling_gflops = ceilings.gflops(c.provider.isa) if c.provider.isa else ceilings.strongest()
        if row.ceiling_gflops:
            row.ceiling_share = row.gflops / row.ceiling_gflops
        if base is not None:
            row.ratio = paired_ratio(times, measured[base.provider.name], c.scale / base.scale)
        if row.subset < 1:
            row.note = f"timed on {len(c.x)} vectors"
