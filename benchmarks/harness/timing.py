"""Interleaved timing: in every round each competitor runs once in turn, so that drift of the machine hits all alike."""

from __future__ import annotations

import gc
import math
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

# A round repeats a short call: one cold call would measure how long its competitors left the caches alone.
ROUND_SECONDS = 0.002
MAX_REPEATS = 20


@dataclass(frozen=True)
class Call:
    """One competitor: what to run, how long one run takes roughly, and the environment variables it runs under."""

    run: Callable[[], object]
    estimate: float  # seconds
    environment: Mapping[str, str] = field(default_factory=dict)

    @property
    def repeats(self) -> int:
        return max(1, min(MAX_REPEATS, int(ROUND_SECONDS / max(self.estimate, 1e-7))))


@dataclass
class Times:
    """Seconds of single calls, and the median of each round."""

    calls: list[float] = field(default_factory=list)
    rounds: list[float] = field(default_factory=list)
    cpu_seconds: float = 0.0
    wall_seconds: float = 0.0

    def quantile(self, share: float) -> float:
        """Linear interpolation between the two nearest sorted calls."""
        ordered = sorted(self.calls)
        position = share * (len(ordered) - 1)
        low = math.floor(position)
        high = min(low + 1, len(ordered) - 1)
        return ordered[low] + (position - low) * (ordered[high] - ordered[low])

    @property
    def cores(self) -> float:
        """Processor seconds per second: shows a competitor that took more threads than it was given."""
        return self.cpu_seconds / self.wall_seconds


@contextmanager
def environment(values: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextmanager
def thread_count(n_threads: int) -> Iterator[None]:
    """Hold torch, and what takes its number from torch, to ``n_threads``."""
    before = torch.get_num_threads()
    torch.set_num_threads(n_threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def timed(call: Call, times: Times) -> None:
    """One round of one competitor, added to ``times``."""
    with environment(call.environment):
        if call.repeats > 1:
            call.run()
        laps = []
        cpu_start = time.process_time()
        for _ in range(call.repeats):
            start = time.perf_counter()
            call.run()
            laps.append(time.perf_counter() - start)
        times.cpu_seconds += time.process_time() - cpu_start
    times.wall_seconds += sum(laps)
    times.calls += laps
    times.rounds.append(statistics.median(laps))


def interleave(
    calls: Mapping[str, Call],
    *,
    seconds: float,
    min_rounds: int = 3,
    max_rounds: int = 25,
    probe: Callable[[], None] | None = None,
) -> dict[str, Times]:
    """Time ``calls`` in rounds. Each gets an equal share of ``seconds``, but never fewer than ``min_rounds``.

    A slow competitor takes part in the first rounds only; the others go on, so a round's times always belong together
    (see ``paired_ratio``). ``probe`` runs once a round, for what must be measured beside the competitors. Everything
    has to be warm already.
    """
    share = seconds / max(1, len(calls))
    rounds = {
        name: max(min_rounds, min(max_rounds, int(share / max(call.estimate * call.repeats, 1e-7))))
        for name, call in calls.items()
    }
    times = {name: Times() for name in calls}
    collecting = gc.isenabled()
    gc.disable()
    try:
        for i in range(max(rounds.values(), default=0)):
            if probe is not None:
                probe()
            for name, call in calls.items():
                if i < rounds[name]:
                    timed(call, times[name])
    finally:
        if collecting:
            gc.enable()
    return times


def paired_ratio(times: Times, base: Times, scale: float = 1.0) -> float:
    """Median over the rounds both took part in of ``scale * times / base``: above 1 where ``base`` is faster."""
    return statistics.median(scale * a / b for a, b in zip(times.rounds, base.rounds, strict=False))
