"""One map of ids sampled in each of the ways that are compared."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from fastvq.models import PixelCNN
from fastvq.models.sampling import Choice, sample_ids
from harness import Row, Times, thread_count

__all__ = ["measure", "recompute", "samples_agree"]


def seconds_of(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def recompute(model: PixelCNN, ids: Tensor, i: int, j: int, rows_only: bool) -> Tensor:
    """One position the plain way; with ``rows_only`` from the rows that it needs."""
    top = max(0, i - model.reach) if rows_only else 0
    bottom = i + 1 if rows_only else ids.shape[1]
    logits = model(ids[:, top:bottom])[:, :, i - top, j]
    return sample_ids(logits, torch.full((ids.shape[0],), 0.5, dtype=torch.float64, device=ids.device), Choice())


def measure(model: PixelCNN, batch: int, side: int, rounds: int, threads: int) -> list[Row]:
    ids = torch.randint(0, model.n_codes, (batch, side, side), generator=torch.Generator().manual_seed(0))
    # A quarter of the way down to the last row, as the rows that are needed grow downwards.
    positions = [(side * k // 4, side // 2) for k in (1, 2, 3)]
    laps: dict[str, list[float]] = {}
    with thread_count(threads), torch.no_grad():
        model(ids[:, :2])
        for _ in range(rounds):
            once = {
                "one forward": seconds_of(lambda: model(ids)),
                "fastvq cached": seconds_of(lambda: model.sample((batch, side, side))),
            }
            for name, rows_only in (("full recompute", False), ("rows recompute", True)):
                each = [seconds_of(lambda p=p, r=rows_only: recompute(model, ids, *p, r)) for p in positions]
                once[name] = statistics.mean(each) * side * side
            for name, t in once.items():
                laps.setdefault(name, []).append(t)
    base = laps["fastvq cached"]
    rows = []
    for name, seconds in laps.items():
        lap = Times(calls=seconds)
        rows.append(
            Row(
                "sample a map", f"{batch}x{side}x{side}", f"{model.n_codes} codes", threads, name,
                subset=len(positions) / side**2 if "recompute" in name else 1.0, calls=len(seconds),
                p20_ms=lap.quantile(0.2) * 1e3, p50_ms=lap.quantile(0.5) * 1e3, p80_ms=lap.quantile(0.8) * 1e3,
                ratio=statistics.median(a / b for a, b in zip(seconds, base, strict=True)),
            )
        )  # fmt: skip
    return rows


def samples_agree(model: PixelCNN) -> bool:
    cached, uncached = (
        model.sample((2, 6, 6), generator=torch.Generator().manual_seed(1), cached=c) for c in (True, False)
    )
    return torch.equal(cached, uncached)
