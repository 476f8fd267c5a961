"""Exact lookup and residual quantization against what a GPU's user has today."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

import fastvq
from fastvq.backends.registry import BACKENDS
from fastvq.ops import nearest, residual_quantize
from gpu.card import lookup_seconds, read_ceilings
from gpu.timing import captured, rows_of, timed
from harness import Row, count_differing, nearest_float64
from lookup.providers import cdist_argmin, compiled, needs, prepare_vector_quantize

SHAPES = ((1 << 20, 1024, 64), (1 << 20, 8192, 256), (1 << 18, 16384, 8), (65536, 512, 64))
REHEARSED = ((130, 65, 16),)
RESIDUAL = (300_000, 8, 1024, 128)
CHECKED = 2048  # rows compared with float64
MOST_CHECKED = 1 << 30  # products of that comparison, which a processor makes
MOST_SCORES = 1 << 28  # scores that a way that writes them may hold at once


def ours(device: torch.device) -> list[str]:
    """The kernel backends that take this device's tensors."""
    names = [b.name for b in BACKENDS.values() if b.name != "reference" and b.unavailable() is None]
    return [n for n in names if (n == "cpu") != (device.type == "cuda")]


def under(backend: str, call: Callable[[], object]) -> Callable[[], object]:
    """``call`` with every op of it served by ``backend``."""

    def run() -> object:
        with fastvq.use_backend(backend):
            return call()

    return run


def chunked(function: Callable[[Tensor, Tensor], Tensor], x: Tensor, codebook: Tensor) -> Tensor:
    rows = max(1, MOST_SCORES // len(codebook))
    return torch.cat([function(part, codebook) for part in x.split(rows)])


def flash_kmeans(x: Tensor, codebook: Tensor) -> Callable[[], Tensor]:
    from flash_kmeans.assign_euclid_triton import euclid_assign_triton

    square = x.float().square().sum(1)[None]  # it asks for them; they are made outside the time
    return lambda: euclid_assign_triton(x[None], codebook[None], square)[0]


def faiss_gpu(x: Tensor, codebook: Tensor) -> Callable[[], Tensor]:
    import faiss
    import faiss.contrib.torch_utils

    resources = faiss.StandardGpuResources()
    return lambda: faiss.knn_gpu(resources, x.float(), codebook.float(), 1)[1][:, 0]


def cuvs(x: Tensor, codebook: Tensor) -> Callable[[], Tensor]:
    from cuvs.cluster.kmeans import KMeansParams, predict

    parameters = KMeansParams(n_clusters=len(codebook))
    return lambda: torch.as_tensor(predict(parameters, x.float(), codebook.float())[0], device=x.device)


def vector_quantize(x: Tensor, codebook: Tensor) -> Callable[[], Tensor]:
    with x.device:
        lookup = prepare_vector_quantize(codebook.float())
    rows = max(1, MOST_SCORES // len(codebook))
    return lambda: torch.cat([lookup(part) for part in x.float().split(rows)])


PEERS: dict[str, tuple[str | None, Callable[[Tensor, Tensor], Callable[[], Tensor]]]] = {
    "flash-kmeans": ("flash_kmeans", flash_kmeans),
    "compiled cdist": (None, lambda x, c: functools.partial(chunked, compiled(cdist_argmin), x, c)),
    "cdist": (None, lambda x, c: functools.partial(chunked, cdist_argmin, x.float(), c.float())),
    "faiss-gpu": ("faiss", faiss_gpu),  # faiss-cpu has the same name, and fails
    "cuVS": ("cuvs", cuvs),
    "vq-pytorch": ("vector_quantize_pytorch", vector_quantize),
}


def lookups(device: torch.device, out: Path, rehearse: bool) -> list[Row]:
    rows = []
    for shape in REHEARSED if rehearse else SHAPES:
        for dtype in (torch.bfloat16, torch.float32):
            rows += one_shape(device, out, shape, dtype, 0.1 if rehearse else 1.5)
    return rows


def one_shape(
    device: torch.device, out: Path, shape: tuple[int, int, int], dtype: torch.dtype, seconds: float
) -> list[Row]:
    n, k, d = shape
    g = torch.Generator(device).manual_seed(0)
    x = torch.randn(n, d, generator=g, device=device).to(dtype)
    codebook = torch.randn(k, d, generator=g, device=device).to(dtype)
    checked = torch.randperm(n, generator=g, device=device)[: min(CHECKED, MOST_CHECKED // (k * d))]
    expected = nearest_float64(x[checked].double().cpu().numpy(), codebook.double().cpu().numpy())
    makers = {f"fastvq {name}": (None, functools.partial(_ours, name)) for name in ours(device)} | PEERS
    calls, notes, differing, first = {}, {}, {}, None
    for name, (package, make) in makers.items():
        missing = needs(package)() if package else None
        if missing:
            continue
        try:
            call = make(x, codebook)
            found = torch.as_tensor(call()).long()
            differing[name] = count_differing(found[checked].cpu().numpy(), expected)
            if name.startswith("fastvq"):  # our backends against each other: all rows
                first = found if first is None else first
                differing[name] += int((found != first).sum())
            calls[name], notes[name] = captured(call, device)
        except Exception as error:  # one peer that cannot run here must not take the others with it
            notes[name] = f"failed: {type(error).__name__}: {str(error)[:120]}"
    times = timed(calls, device, seconds)
    base = next((name for name in calls if name.startswith("fastvq")), "cdist")
    ceiling = 2.0 * n * k * d / lookup_seconds(n, k, d, x.element_size(), read_ceilings(out))
    label, data = "x".join(map(str, shape)), str(dtype).removeprefix("torch.")
    found_rows = rows_of("lookup", label, data, times, notes, base, 2.0 * n * k * d, ceiling)
    for row in found_rows:
        row.differing, row.compared = differing[row.provider], len(checked)
    failed = [Row("lookup", label, data, 0, name, note=notes[name]) for name in notes if name not in times]
    return found_rows + failed


def _ours(backend: str, x: Tensor, codebook: Tensor) -> Callable[[], Tensor]:
    return lambda: nearest(x, codebook, backend=backend)


def residuals(device: torch.device, out: Path, rehearse: bool) -> list[Row]:
    """All levels in one call against a loop of lookups, the codes gathered and taken away in torch."""
    n, q, k, d = (130, 2, 65, 16) if rehearse else RESIDUAL
    g = torch.Generator(device).manual_seed(0)
    x, codebooks = torch.randn(n, d, generator=g, device=device), torch.randn(q, k, d, generator=g, device=device)
    codebooks *= 0.7 ** torch.arange(q, device=device)[:, None, None]

    def loop(backend: str) -> Tensor:
        left, found = x, []
        for level in codebooks:
            found.append(nearest(left, level, backend=backend))
            left = left - level[found[-1]]
        return torch.stack(found, -1)

    def whole(backend: str) -> Tensor:
        return residual_quantize(x, codebooks, backend=backend).indices

    calls, notes, expected, off = {}, {}, None, {}
    for backend in ours(device):
        for name, run in (("residual_quantize", whole), ("loop of nearest", loop)):
            label = f"fastvq {backend}, {name}"
            call = functools.partial(run, backend)
            indices = call()
            expected = indices if expected is None else expected
            off[label] = int((indices != expected).any(-1).sum())
            calls[label], notes[label] = captured(call, device)
    times = timed(calls, device, 0.1 if rehearse else 1.5)
    limit = q * lookup_seconds(n, k, d, 4, read_ceilings(out))
    rows = rows_of(
        "residual", f"{n}x{q}x{k}x{d}", "float32", times, notes, next(iter(calls), ""), 2.0 * n * q * k * d,
        2.0 * n * q * k * d / limit,
    )  # fmt: skip
    for row in rows:
        row.differing, row.compared = off[row.provider], n
    return rows
