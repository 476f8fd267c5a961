"""Statistics and the quantizer's whole training step on a card, against torch's ways and vector-quantize-pytorch."""

from __future__ import annotations

from pathlib import Path

import torch

from gpu.card import read_ceilings
from gpu.lookup import ours, under
from gpu.timing import captured, rows_of, timed
from harness import Row
from learning.providers import STATISTICS, fastvq_step, index_add, peer_step, torch_step
from lookup.providers import needs

SHAPES = ((1 << 20, 1024, 64, False), (1 << 20, 1024, 64, True), (65536, 8192, 256, False), (1 << 18, 16384, 8, False))
REHEARSED = ((130, 65, 16, False), (130, 65, 16, True))
MOST_ONE_HOT = 1 << 31


def statistics(device: torch.device, out: Path, rehearse: bool) -> list[Row]:
    """Sums and counts; the ceiling is one read of x."""
    rows = []
    for n, k, d, skewed in REHEARSED if rehearse else SHAPES:
        g = torch.Generator(device).manual_seed(1)
        x = torch.randn(n, d, generator=g, device=device)
        indices = torch.randint(k, (n,), generator=g, device=device)
        if skewed:  # nine vectors of ten in one code
            indices = torch.where(torch.rand(n, generator=g, device=device) < 0.9, 0, indices)
        expected = torch.zeros(k, d, dtype=torch.float64, device=device).index_add_(0, indices, x.double())
        bound = 2**-24 * expected.abs() + 2**-40 * n
        calls, notes, off = {}, {}, {}
        for learner in STATISTICS:
            if learner.name == "one-hot" and n * k > MOST_ONE_HOT:
                continue
            call = learner.prepare(x, indices, k)
            for backend in ours(device) if learner.ours else [None]:
                name = learner.name if backend is None else f"fastvq {backend}"
                timed_call = call if backend is None else under(backend, call)
                result = timed_call()
                if isinstance(result, tuple):
                    off[name] = int(((result[0].double() - expected).abs() > bound).sum())
                calls[name], notes[name] = captured(timed_call, device)
        times = timed(calls, device, 0.1 if rehearse else 0.8)
        found = rows_of(
            "statistics", f"{n}x{k}x{d}" + (", 90 % in one code" if skewed else ""), "float32", times, notes,
            next(iter(calls)), float(x.nbytes), read_ceilings(out).read,
        )  # fmt: skip
        for row in found:
            row.differing, row.compared = off.get(row.provider), k * d
        rows += found
    return rows


def training_step(device: torch.device, out: Path, rehearse: bool) -> list[Row]:
    """Lookup, gather, estimator, loss, statistics, update and backward."""
    n, k, d = (130, 65, 16) if rehearse else (1 << 20, 1024, 64)
    g = torch.Generator(device).manual_seed(2)
    x, gradient = (torch.randn(n, d, generator=g, device=device) for _ in range(2))
    codebook = torch.randn(k, d, generator=g, device=device)
    with device:
        calls = {f"fastvq {b}": under(b, fastvq_step(x, gradient, codebook)) for b in ours(device)}
        calls["tuned torch"] = torch_step(index_add)(x, gradient, codebook)
        if n * k <= MOST_ONE_HOT and needs("vector_quantize_pytorch")() is None:
            calls["vq-pytorch"] = peer_step(x, gradient, codebook)
        times = timed(calls, device, 0.1 if rehearse else 1.5)
    return rows_of("training step", f"{n}x{k}x{d}", "float32", times, {}, next(iter(calls)))
