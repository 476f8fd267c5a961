"""Speed of the reference model: a training step and the drawing of id maps, against the reference backend and peers."""

from __future__ import annotations

import os
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
from model.peers import dense_prior, peer_autoencoder

__all__ = ["drawings", "training_steps"]

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


@dataclass(frozen=True)
class Drawing:
    """New pictures from a model and a prior a level."""

    name: str
    make: Callable[[], Autoencoder]
    side: int  # of the pictures
    n: int  # pictures at once
    channels: int  # of the priors
    layers: int
    at_least: float | None  # how many times as fast as dense and uncached
    whole: bool = True  # whole runs of the dense priors; else one forward, times the positions


DRAWINGS = (
    Drawing("digits, 7x7 map, K=256, prior of 48 channels, 5 layers, 16 pictures",
            lambda: VQVAE(1, 64, 256, 16, 4), 28, 16, 48, 5, 15),
    Drawing("photographs 64x64, 8x8 then 16x16 map, K=512, priors of 64 channels, 8 layers, 4 pictures",
            lambda: VQVAE2(3, 64, 512, 32, 4), 64, 4, 64, 8, None),
    Drawing("photographs 128x128, 32x32 map, K=512, prior of 64 channels, 8 layers, 4 pictures",
            lambda: VQVAE(3, 64, 512, 32, 4), 128, 4, 64, 8, 200, whole=False),
)  # fmt: skip


def training_steps(report: Report, *, threads: int, seconds: float) -> None:
    with thread_count(threads):
        for case in CASES:
            _training_step(case, report, threads, seconds)


def drawings(report: Report, *, threads: int, seconds: float) -> None:
    with thread_count(threads):
        for case in DRAWINGS:
            _drawing(case, report, threads, seconds)


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
    report(f"training step, {case.name}: milliseconds", times["fastvq"].quantile(0.5) * 1e3, note=_conditions(threads))
    report(f"training step, {case.name}: quantizers' share", statistics.median(shares), "<=", 0.10,
           note="forward, backward and update of all quantizers")  # fmt: skip
    for name in list(models)[1:]:
        report(f"training step, {case.name}: {name} over fastvq", paired_ratio(times[name], times["fastvq"]))


@torch.no_grad()
def _drawing(case: Drawing, report: Report, threads: int, seconds: float) -> None:
    torch.manual_seed(0)
    model = case.make().eval()
    shapes = model.map_shapes(case.side, case.side)
    priors = [
        Prior(k, case.channels, case.layers, 10, shape=shapes[level],
              above=[(model.n_codes[i], 1 << (level - i)) for i in range(level)]).eval()
        for level, k in enumerate(model.n_codes)
    ]  # fmt: skip
    peer, dense = peer_autoencoder(model).eval(), [dense_prior(prior).eval() for prior in priors]
    labels = torch.arange(case.n) % 10
    maps = [torch.randint(k, (case.n, *shape)) for k, shape in zip(model.n_codes, shapes, strict=True)]
    for level, (ours, theirs) in enumerate(zip(priors, dense, strict=True)):
        expected = ours(maps[level], labels, maps[:level])
        difference, scale = (expected - theirs(maps[level], labels, maps[:level])).abs().max(), expected.abs().max()
        if difference > 1e-4 * scale:
            raise RuntimeError(f"the dense network differs by {difference:.2g} of {scale:.2g}: it is not the same one")

    def fast() -> None:
        model.generate(case.n, labels, priors=priors, generator=torch.Generator().manual_seed(0))

    def by_reference() -> None:
        with fastvq.use_backend("reference"):
            fast()

    def uncached() -> None:
        peer.generate(case.n, labels, priors=dense, cached=False, generator=torch.Generator().manual_seed(0))

    def forward() -> None:
        dense[-1](maps[-1], labels, maps[:-1])

    rivals = {"reference backend": by_reference, "dense, uncached": uncached if case.whole else forward}
    times = interleave({name: _call(run) for name, run in {"fastvq": fast, **rivals}.items()}, seconds=seconds,
                       min_rounds=3)  # fmt: skip
    # The uncached sampler runs the network once a position and does little else.
    scaled = 1 if case.whole else maps[-1][0].numel()
    ratio = paired_ratio(times["dense, uncached"], times["fastvq"], scaled)
    bound = () if case.at_least is None else (">=", case.at_least)
    report(f"generate, {case.name}: milliseconds", times["fastvq"].quantile(0.5) * 1e3, note=_conditions(threads))
    report(f"generate, {case.name}: dense and uncached over fastvq", ratio, *bound,
           note="whole runs of both" if case.whole
           else "of theirs one forward of the network, times the positions, and no decoding")  # fmt: skip
    by_rule = paired_ratio(times["reference backend"], times["fastvq"])
    report(f"generate, {case.name}: reference backend over fastvq", by_rule, note="cached, too; whole runs of both")


def _conditions(threads: int) -> str:
    """Ratios are taken within rounds and bear a busy machine; milliseconds do not."""
    return f"{threads} threads; load of the machine {os.getloadavg()[0]:.1f}"


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
