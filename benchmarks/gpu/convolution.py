"""Masked convolution and cached sampling on a card, against cuDNN and against recomputing."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from conv.masked import CASES, QUICK, Case, cropped, dense, inputs, one_crop
from conv.sampling import recompute
from fastvq.models import PixelCNN
from fastvq.ops import gated_masked_conv2d, masked_conv2d
from gpu.card import read_ceilings
from gpu.lookup import ours, under
from gpu.timing import captured, rows_of, timed
from harness import Row

CHECKED_MAP = (5, 3, 6)
CHECKED_IDS = 5 * 3 * 6
PEERS = {"dense": dense, "cropped": cropped, "one crop": one_crop}


def convolutions(device: torch.device, out: Path, rehearse: bool) -> list[Row]:
    """Forward, forward and backward, and the gated form; peers channels-last, which is cuDNN's faster layout."""
    rows = []
    for dtype in (torch.bfloat16, torch.float32):
        for case in QUICK if rehearse else CASES:
            for kind in ("forward", "forward+backward", "gated"):
                rows += _one(device, out, case, kind, dtype, 0.1 if rehearse else 0.3)
    return rows


def _one(device: torch.device, out: Path, case: Case, kind: str, dtype: torch.dtype, seconds: float) -> list[Row]:
    x, weight, bias, grad = (t.to(device, dtype) for t in inputs(case))
    x, weight, grad = (t.contiguous(memory_format=torch.channels_last) for t in (x, weight, grad))
    ways = {f"fastvq {b}": (b, None) for b in ours(device)} | {name: (None, f) for name, f in PEERS.items()}
    calls, notes, off = {}, {}, {}
    expected = F.conv2d(x.double(), weight.double(), bias.double(), padding=case.kernel // 2)
    scale = F.conv2d(x.double().abs(), weight.double().abs(), bias.double().abs(), padding=case.kernel // 2)
    if kind == "gated":
        a, b = expected.chunk(2, 1)
        expected, scale = a.tanh() * b.sigmoid(), scale.chunk(2, 1)[0] + scale.chunk(2, 1)[1] + 1
    # A float32 sum of n products, and the output's own rounding. cuDNN's tf32, where it takes it, is beyond this.
    n = case.c_in * case.kernel**2
    bound = 2.0**-24 * (n + 16) * 1.01 * scale + torch.finfo(dtype).eps / 2 * expected.abs()
    for name, (backend, peer) in ways.items():
        call = _call(kind, backend, peer, x, weight, bias, grad)
        result = call()
        output = result if isinstance(result, Tensor) else None
        if output is not None:
            off[name] = int(((output.double() - expected).abs() > bound).sum())
        calls[name], notes[name] = captured(call, device)
    times = timed(calls, device, seconds)
    passes = 3 if kind == "forward+backward" else 1
    found = rows_of(
        f"masked convolution, {kind}", case.shape, str(dtype).removeprefix("torch."), times, notes, next(iter(calls)),
        passes * case.flop, read_ceilings(out).bf16 if dtype == torch.bfloat16 else 0.0,
    )  # fmt: skip
    for row in found:
        row.differing, row.compared = off.get(row.provider), expected.numel()
    return found


def _call(kind, backend, peer, x, weight, bias, grad):  # type: ignore[no-untyped-def]
    def plain() -> Tensor:
        return peer(x, weight, bias) if backend is None else masked_conv2d(x, weight, bias, mask="B", backend=backend)

    def gated() -> Tensor:
        if backend is not None:
            return gated_masked_conv2d(x, weight, bias, mask="B", backend=backend)
        a, b = peer(x, weight, bias).chunk(2, 1)
        return a.tanh() * b.sigmoid()

    def backward() -> tuple[Tensor, ...]:
        leaves = [t.detach().requires_grad_() for t in (x, weight, bias)]
        if backend is None:
            return torch.autograd.grad(peer(*leaves), leaves, grad)
        return torch.autograd.grad(masked_conv2d(*leaves, mask="B", backend=backend), leaves, grad)

    return {"forward": plain, "gated": gated, "forward+backward": backward}[kind]


def sampling(device: torch.device, out: Path, rehearse: bool) -> list[Row]:
    """A whole map, every position once, against the network anew for each position: eager, and as one graph each."""
    side, layers, channels, codes = (4, 2, 8, 16) if rehearse else (32, 15, 128, 512)
    torch.manual_seed(0)
    model = PixelCNN(codes, channels, layers).to(device).eval()
    rows = []
    for batch in (2, 1) if rehearse else (16, 1):
        rows += _sampled(model, batch, side, device, 0.1 if rehearse else 2.0)
    differing = {f"fastvq {b}, cached": _differing(model, b, device) for b in ours(device)}
    for row in rows:
        if row.provider in differing:
            row.differing, row.compared = differing[row.provider], CHECKED_IDS
            row.note = f"{(row.p50_ms or 0) * 1e3 / side**2:.0f} us a position"
    return rows


@torch.no_grad()
def _sampled(model: PixelCNN, batch: int, side: int, device: torch.device, seconds: float) -> list[Row]:
    ids = torch.randint(model.n_codes, (batch, side, side), device=device)
    calls = {f"fastvq {b}, cached": under(b, lambda: model.sample((batch, side, side))) for b in ours(device)}
    calls["one forward pass"] = lambda: model(ids)
    graphed, note = captured(lambda: model(ids), device)
    calls["recompute a position, eager"] = lambda: recompute(model, ids, side // 2, side // 2, rows_only=False)
    calls["recompute a position, graph"] = graphed
    times = timed(calls, device, seconds)
    # A position's time stands for the whole map's: there are side * side of them.
    for name in ("recompute a position, eager", "recompute a position, graph"):
        times[name].calls = [t * side * side for t in times[name].calls]
        times[name].rounds = [t * side * side for t in times[name].rounds]
    notes = {"recompute a position, graph": note}
    shape = f"{batch}x{side}x{side}, {len(model.layers)} layers"
    return rows_of("sampling", shape, "float32", times, notes, next(iter(calls)))


def _differing(model: PixelCNN, backend: str, device: torch.device) -> int:
    """Ids of a small map that are not those of the same uniforms through the whole network, position by position."""
    draws = []
    for name, cached in ((backend, True), ("reference", False)):
        generator = torch.Generator(device).manual_seed(1)
        draws.append(under(name, lambda g=generator, c=cached: model.sample(CHECKED_MAP, generator=g, cached=c))())  # type: ignore[misc]
    return int((draws[0] != draws[1]).sum())
