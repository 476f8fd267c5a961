"""Timing on a card by events, competitors in turn; on a CPU, in a rehearsal, by the clock."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

import torch

from harness import Row, Times, paired_ratio

WARM_UP = 3
MOST_ROUNDS = 40
FLUSH_BYTES = 256 << 20  # more than any card's L2: a round starts with nothing of the last one in it


def timed(calls: Mapping[str, Callable[[], object]], device: torch.device, seconds: float) -> dict[str, Times]:
    """Each call once a round, in turn, until ``seconds`` are over (three rounds at least); all are warmed up first."""
    for call in calls.values():
        for _ in range(WARM_UP):
            call()
    times = {name: Times() for name in calls}
    on_card = device.type == "cuda"
    flush = torch.empty(FLUSH_BYTES if on_card else 0, dtype=torch.uint8, device=device)
    end = time.perf_counter() + seconds
    for done in range(MOST_ROUNDS):
        if done >= 3 and time.perf_counter() > end:
            break
        for name, call in calls.items():
            flush.zero_()
            lap = _lap_on_card(call, device) if on_card else _lap(call)
            times[name].calls.append(lap)
            times[name].rounds.append(lap)
    return times


def _lap(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _lap_on_card(call: Callable[[], object], device: torch.device) -> float:
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    first.record()
    call()
    last.record()
    torch.cuda.synchronize(device)
    return first.elapsed_time(last) / 1e3


def captured(call: Callable[[], object], device: torch.device) -> tuple[Callable[[], object], str]:
    """The call as one CUDA graph, so that a short kernel is not timed by its launch; itself and why where it cannot."""
    if device.type != "cuda":
        return call, "no graph on a CPU"
    try:
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP):
                call()
        torch.cuda.current_stream(device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
    except Exception as error:  # a peer that waits for the device cannot be captured; it is then timed as it is called
        torch.cuda.synchronize(device)
        return call, f"launched one by one: {type(error).__name__}"
    return graph.replay, "one CUDA graph"


def rows_of(
    case: str, shape: str, data: str, times: Mapping[str, Times], notes: Mapping[str, str], base: str,
    work: float = 0.0, ceiling: float = 0.0,
) -> list[Row]:  # fmt: skip
    """A row a competitor; ``work`` in operations, ``ceiling`` in operations a second at the limit of the case."""
    rows = []
    for name, lap in times.items():
        median = statistics.median(lap.calls)
        rows.append(
            Row(
                case, shape, data, 0, name, calls=len(lap.calls),
                p20_ms=lap.quantile(0.2) * 1e3, p50_ms=median * 1e3, p80_ms=lap.quantile(0.8) * 1e3,
                gflops=work / median / 1e9 if work else None,
                ceiling_gflops=ceiling / 1e9 if ceiling else None,
                ceiling_share=work / median / ceiling if work and ceiling else None,
                ratio=paired_ratio(lap, times[base]) if base in times else None,
                note=notes.get(name, ""),
            )
        )  # fmt: skip
    return rows
