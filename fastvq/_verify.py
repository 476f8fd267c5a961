"""``fastvq info --verify``: the recorded lookups by every backend and instruction set that this machine has."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from fastvq import ops
from fastvq._options import BackendName
from fastvq.backends import cpu as cpu_backend
from fastvq.backends import triton as triton_backend
from fastvq.backends.golden.record import Lookup, decode, digest, lookups, recorded
from fastvq.backends.registry import BACKENDS

__all__ = ["Verdict", "verify"]


class Verdict(NamedTuple):
    what: str  # a backend, and its instruction set
    indices: int  # how many were compared
    fault: str | None  # the first difference
    seconds: float


def verify() -> tuple[list[Verdict], dict[str, str]]:
    """A verdict for each way to look up, and why the other backends cannot run here."""
    record = recorded()
    calls = [(lookup, decode(record[lookup.name]["indices"])) for lookup in lookups()]
    foreign = [lookup.name for lookup, _ in calls if digest(lookup) != record[lookup.name]["inputs"]]
    if foreign:  # an index would say nothing
        fault = f"this machine makes other numbers from the counter, in {len(foreign)} lookups, the first {foreign[0]}"
        return [Verdict("inputs", 0, fault, 0.0)], {}
    missing = {name: reason for name, backend in BACKENDS.items() if (reason := backend.unavailable()) is not None}
    if "triton" not in missing and triton_backend.interpreting():
        missing["triton"] = "it runs in Triton's interpreter, which compiles nothing"
    return [_verdict(what, run, calls) for what, run in _ways(missing)], missing


ROWS_OF_REFERENCE = 16
Run = Callable[[Lookup], list[Tensor]]


def _ways(missing: dict[str, str]) -> Iterator[tuple[str, Run]]:
    """What to verify: its name, and how it looks up."""
    if "cpu" not in missing:
        for isa in cpu_backend.available_isas():
            yield f"cpu, {isa}", _on_cpu(isa)
    gpus: tuple[BackendName, ...] = ("triton", "cuda")
    for backend in gpus:
        if backend not in missing:
            for device in range(torch.cuda.device_count()):
                yield f"{backend}, {torch.cuda.get_device_name(device)}", _on_gpu(backend, device)
    yield "reference", _by_definition


def _on_cpu(isa: str) -> Run:
    """On one thread and on all, the codebook packed in the call and before it."""

    def run(c: Lookup) -> list[Tensor]:
        with _isa(isa):
            packed = ops.pack_codebook(c.codebook, metric=c.metric, backend="cpu")
            found = [ops.nearest(c.x, codes, metric=c.metric, backend="cpu") for codes in (c.codebook, packed)]
            with _threads(1):
                return [*found, ops.nearest(c.x, c.codebook, metric=c.metric, backend="cpu")]

    return run


def _on_gpu(backend: BackendName, device: int) -> Run:
    def run(c: Lookup) -> list[Tensor]:
        x, codebook = (t.to(f"cuda:{device}") for t in (c.x, c.codebook))
        return [ops.nearest(x, codebook, metric=c.metric, backend=backend).cpu()]

    return run


def _by_definition(c: Lookup) -> list[Tensor]:
    """A few rows: it is slow, and a row's index depends on no other row."""
    with _threads(1):
        return [ops.nearest(c.x[:ROWS_OF_REFERENCE], c.codebook, metric=c.metric, backend="reference")]


def _verdict(what: str, run: Run, calls: list[tuple[Lookup, Tensor]]) -> Verdict:
    start, compared, fault = time.perf_counter(), 0, None
    for lookup, expected in calls:
        try:
            results = run(lookup)
        except Exception as error:  # whatever a driver or a compiler raises: the answer is the same
            fault = f"{type(error).__name__}: {error}, in {lookup.name}"
            break
        compared += sum(r.numel() for r in results)
        wrong = next((r for r in results if not torch.equal(r, expected[: len(r)])), None)
        if wrong is not None:
            rows = (wrong != expected[: len(wrong)]).nonzero().flatten().tolist()
            first = f"row {rows[0]} got {wrong[rows[0]]}, recorded {expected[rows[0]]}"
            fault = f"{len(rows)} of {len(wrong)} indices differ in {lookup.name}: {first}"
            break
    return Verdict(what, compared, fault, time.perf_counter() - start)


@contextmanager
def _isa(name: str) -> Iterator[None]:
    before = os.environ.get("FASTVQ_CPU_ISA")
    os.environ["FASTVQ_CPU_ISA"] = name
    try:
        yield
    finally:
        if before is None:
            del os.environ["FASTVQ_CPU_ISA"]
        else:
            os.environ["FASTVQ_CPU_ISA"] = before


@contextmanager
def _threads(n: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)
