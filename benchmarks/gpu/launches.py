"""Every op of one backend a few times, forward and backward: what the sanitizer and the profiler watch.

    python benchmarks/gpu/launches.py cuda [--large] [--device cpu]

Small sizes reach every kernel and every shape of a block; --large takes sizes that fill a card. The last line says what
ran and what the backend refused. Results are not looked at: the tests do that.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from torch import Tensor

import fastvq
from fastvq.models import PixelCNN
from fastvq.ops import (
    code_statistics,
    ema_update_,
    gated_masked_conv2d,
    masked_conv2d,
    nearest,
    quantize,
    residual_quantize,
)

WIDTHS = (600, 1100, 2100, 4097)  # of vectors: a block's shape of the CUDA lookup for each, and the scan alone


def random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def lookups(device: str, large: bool) -> None:
    for dtype in (torch.float32, torch.bfloat16) if large else (torch.float32, torch.float16, torch.float64):
        n, k, d = (1 << 18, 1024, 64) if large else (67, 70, 17)
        x, codebook = random(n, d).to(device, dtype), random(k, d).to(device, dtype)
        for metric in ("euclidean",) if large else ("euclidean", "dot", "cosine"):
            nearest(x, codebook, metric=metric)
    for d in () if large else WIDTHS:
        nearest(random(33, d).to(device), random(70, d).to(device))
    ties = random(1, 20).expand(600, 20).contiguous().to(device)
    nearest(ties[:40], ties)  # what no filter settles


def statistics(device: str, large: bool) -> None:
    for n, k, d in ((1 << 18, 1024, 64), (1 << 18, 65536, 64)) if large else ((131, 17, 33), (257, 3000, 65)):
        x, indices = random(n, d).to(device), (torch.arange(n) * 7 % k).to(device)
        for deterministic in (True, False):
            sums, counts = code_statistics(x, indices, k, deterministic=deterministic)
        ema_update_(random(k, d).to(device), sums.clone(), torch.ones(k, device=device), sums, counts, decay=0.9)


def convolutions(device: str, large: bool) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        b, c, out, side = (16, 64, 128, 32) if large else (2, 9, 22, 7)
        tensors = (random(b, c, side, side), random(out, c, 3, 3), random(out))
        leaves = [t.to(device, dtype).requires_grad_() for t in tensors]
        for op in (masked_conv2d, gated_masked_conv2d):
            op(*leaves, mask="B").sum().backward()


def sampler(device: str, large: bool) -> None:
    batch, side, layers, channels, codes = (16, 8, 15, 128, 512) if large else (6, 3, 2, 20, 150)
    torch.manual_seed(0)
    model = PixelCNN(codes, channels, layers, n_classes=3).to(device).eval()
    for count in (batch, 1):
        labels = torch.arange(count, device=device) % 3
        for options in ({}, {"top_k": 20, "top_p": 0.9}):
            model.sample((count, side, side), labels, **options)  # type: ignore[arg-type]


def quantizer(device: str, large: bool) -> None:
    n, k, d = (1 << 18, 1024, 64) if large else (67, 70, 17)
    x, codebook = random(n, d).to(device).requires_grad_(), random(k, d).to(device).requires_grad_()
    for estimator in ("straight_through", "rotation"):
        q = quantize(x, codebook, estimator=estimator)
        (q.quantized.sum() + q.commitment_loss + q.codebook_loss).backward()


def residual(device: str, large: bool) -> None:
    n, levels, k, d = (1 << 16, 8, 1024, 128) if large else (67, 3, 70, 17)
    residual_quantize(random(n, d).to(device), random(levels, k, d).to(device), statistics=True)


LAUNCHES: dict[str, Callable[[str, bool], None]] = {
    "nearest": lookups, "code_statistics, ema_update_": statistics, "masked_conv2d": convolutions, "sampler": sampler,
    "quantize": quantizer, "residual_quantize": residual,
}  # fmt: skip


def run(backend: str, device: str, large: bool) -> str:
    """All of it; a line that says what ran and what was refused."""
    refused = []
    for name, launch in LAUNCHES.items():
        with fastvq.use_backend(backend):
            try:
                launch(device, large)
            except ValueError as error:
                refused.append(f"{name} ({str(error)[:100]})")
    if device == "cuda":
        torch.cuda.synchronize()
    ran = len(LAUNCHES) - len(refused)
    return f"{ran} of {len(LAUNCHES)} ran" + ("" if not refused else "; refused: " + "; ".join(refused))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("backend")
    parser.add_argument("--large", action="store_true")
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args()
    print(run(options.backend, options.device, options.large))
