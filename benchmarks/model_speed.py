"""Speed of the reference model: a training step and the drawing of id maps, against the reference backend and peers."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

import fastvq
from fastvq.models import VQVAE, VQVAE2, Prior
from fastvq.models.autoencoder import Autoencoder
from fastvq.nn import update_codebooks
from harness.timing import Call, interleave, paired_ratio, thread_count
from model_peers import dense_prior, peer_autoencoder

__all__ = ["speed"]

Report = Callable[..., None]
QUANTIZER = dict(kmeans_init=True, dead_code_threshold=1.0, decay=0.95, update="manual")


@dataclass(frozen=True)
class Case:
    """A configuration that a practitioner trains."""

    name: str
    make: Callable[[], Autoencoder]
    batch: tuple[int, int, int, int]  # [B, C, H, W]


CASES = (
    Case("digits 28x28, K=256, D=16, hidden 64, batch 32",
         lambda: VQVAE(1, 64, 256, 16, 4, **QUANTIZER), (32, 1, 28, 28)),
    Case("photographs 64x64, two levels, K=512, D=32, hidden 64, batch 16",
         lambda: VQVAE2(3, 64, 512, 32, 4, **QUANTIZER), (16, 3, 64, 64)),
)  # fmt: skip
# (name, side of the map, maps drawn at once, codes, channels, layers)
MAPS = (
    ("digits prior, 7x7 map, K=256, 48 channels, 5 layers, 16 maps", 7, 16, 256, 48, 5),
    ("photograph prior, 32x32 map, K=512, 64 channels, 8 layers, 4 maps", 32, 4, 512, 64, 8),
)


def speed(report: Report, *, threads: int, seconds: float) -> None:
    with thread_count(threads):
        for case in CASES:
            _training_step(case, report, threads, seconds)
        for case in MAPS:
            _drawing(*case, report, threads, seconds)


def _training_step(case: Case, report: Report, threads: int, seconds: float) -> None:
    torch.manual_seed(0)
    image = torch.rand(case.batch) * 2 - 1
    ours = case.make().train()
    ours(image)
    update_codebooks(ours)
    models: dict[str, tuple[Autoencoder, Any]] = {
        "fastvq": (ours, nullcontext),
        "reference backend": (case.make().train(), lambda: fastvq.use_backend("reference")),
        "vector-quantize-pytorch": (peer_autoencoder(ours).train(), nullcontext),
    }
    inside: list[float] = []
    calls = {name: _call(_step(model, image, within)) for name, (model, within) in models.items()}
    times = interleave(calls, seconds=seconds, min_rounds=7)
    with _clocked(ours, inside) as update:
        step = _step(ours, image, nullcontext, update)
        shares = []
        for _ in range(9):
            inside.clear()
            start = time.perf_counter()
            step()
            shares.append(sum(inside) / (time.perf_counter() - start))
    report(f"training step, {case.name}: milliseconds", times["fastvq"].quantile(0.5) * 1e3, note=f"{threads} threads")
    report(f"training step, {case.name}: quantizers' share", statistics.median(shares), "<=", 0.10,
           note="forward, backward and update of all quantizers")  # fmt: skip
    for name in list(models)[1:]:
        report(f"training step, {case.name}: {name} over fastvq", paired_ratio(times[name], times["fastvq"]))


def _drawing(
    name: str, side: int, batch: int, n_codes: int, channels: int, layers: int, report: Report, threads: int,
    seconds: float,
) -> None:  # fmt: skip
    torch.manual_seed(0)
    prior = Prior(n_codes, channels, layers, 10, shape=(side, side)).eval()
    dense = dense_prior(prior).eval()
    labels = torch.arange(batch) % 10
    ids = torch.randint(n_codes, (batch, side, side))
    with torch.no_grad():
        difference = (prior(ids, labels) - dense(ids, labels)).abs().max()
        scale = prior(ids, labels).abs().max()
    if difference > 1e-4 * scale:
        raise RuntimeError(f"the dense network differs by {difference:.2g} of {scale:.2g}: it is not the same one")

    def forward() -> None:
        with torch.no_grad():
            dense(ids, labels)

    def cached() -> None:
        prior.sample((batch, side, side), labels, generator=torch.Generator().manual_seed(0))

    def uncached() -> None:
        dense.sample((batch, side, side), labels, cached=False, generator=torch.Generator().manual_seed(0))

    long = side > 7

    def by_reference() -> None:
        with fastvq.use_backend("reference"):
            cached()

    calls = {"fastvq": _call(cached), "dense, uncached": _call(forward if long else uncached)}
    if not long:
        calls["reference backend"] = _call(by_reference)
    times = interleave(calls, seconds=seconds, min_rounds=3)
    # The uncached sampler runs the network once a position and does little else.
    scaled = side * side if long else 1
    ratio = paired_ratio(times["dense, uncached"], times["fastvq"], scaled)
    report(f"drawing, {name}: milliseconds", times["fastvq"].quantile(0.5) * 1e3, note=f"{threads} threads")
    report(f"drawing, {name}: dense and uncached over fastvq", ratio, ">=", 200 if long else 15,
           note="one forward of the dense network, times the positions" if long else "whole runs of both")  # fmt: skip
    if not long:
        reference = paired_ratio(times["reference backend"], times["fastvq"])
        report(f"drawing, {name}: reference backend over fastvq", reference, note="cached, too")


def _step(
    model: Autoencoder, image: torch.Tensor, within: Any, update: Callable[[nn.Module], None] = update_codebooks
) -> Callable[[], None]:
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4)

    def step() -> None:
        with within():
            model(image).loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            update(model)

    return step


def _call(run: Callable[[], None]) -> Call:
    run()
    start = time.perf_counter()
    run()
    return Call(run, time.perf_counter() - start)


@contextmanager
def _clocked(model: Autoencoder, inside: list[float]) -> Iterator[Callable[[nn.Module], None]]:
    """Adds to ``inside`` the seconds of each quantizer's forward and backward, and of the update that is yielded."""
    handles = []
    began: dict[int, float] = {}

    def enter(module: nn.Module, _: Any) -> None:
        began[id(module)] = time.perf_counter()

    def leave(module: nn.Module, _: Any, output: Any) -> None:
        inside.append(time.perf_counter() - began[id(module)])
        node = output.quantized.grad_fn
        while node is not None and "quantize" not in node.name().lower():
            node = node.next_functions[0][0] if node.next_functions else None
        if node is not None:
            handles.append(node.register_prehook(lambda grads: began.__setitem__(id(node), time.perf_counter())))
            handles.append(node.register_hook(lambda *_: inside.append(time.perf_counter() - began[id(node)])))

    for quantizer in model.quantizers:
        handles += [quantizer.register_forward_pre_hook(enter), quantizer.register_forward_hook(leave)]

    def update(module: nn.Module) -> None:
        start = time.perf_counter()
        update_codebooks(module)
        inside.append(time.perf_counter() - start)

    try:
        yield update
    finally:
        for handle in handles:
            handle.remove()
