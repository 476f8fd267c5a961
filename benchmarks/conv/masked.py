"""The cases of masked convolution: ours and torch's ways to do it, and the results that each is held to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_weight

from fastvq.ops import gated_masked_conv2d, masked_conv2d
from harness import Call, Row, interleave, paired_ratio, thread_count

__all__ = [
    "CASES",
    "PASSES",
    "PLAIN_WAYS",
    "PROVIDERS",
    "QUICK",
    "Case",
    "cropped",
    "dense",
    "inputs",
    "measure",
    "one_crop",
]

PASSES = ("forward", "forward+backward", "gated eval")


class Case(NamedTuple):
    batch: int
    c_in: int
    c_out: int
    side: int
    kernel: int
    dtype: torch.dtype = torch.float32

    @property
    def shape(self) -> str:
        return f"{self.batch}x{self.c_in}->{self.c_out} {self.side}x{self.side} {self.kernel}x{self.kernel}"

    @property
    def flop(self) -> float:
        return 2.0 * self.batch * self.side**2 * self.c_in * self.c_out * (self.kernel**2 // 2 + 1)


CASES = (
    Case(16, 64, 128, 32, 3),
    Case(16, 128, 256, 32, 3),
    Case(16, 128, 256, 32, 5),
    Case(16, 256, 512, 16, 3),
    Case(16, 64, 128, 32, 7),
)
QUICK = (Case(2, 16, 32, 16, 3),)

Convolution = Callable[[Tensor, Tensor, Tensor], Tensor]


def dense(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.conv2d(x, weight, bias, padding=weight.shape[2] // 2)


def cropped(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    p = weight.shape[2] // 2
    above = F.conv2d(F.pad(x, (p, p, p, 0)), weight[:, :, :p], bias)[:, :, : x.shape[2]]
    return above + F.conv2d(F.pad(x, (p, 0, 0, 0)), weight[:, :, p : p + 1, : p + 1])


def one_crop(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    p = weight.shape[2] // 2
    return F.conv2d(x, weight[:, :, : p + 1], bias, padding=p)[:, :, : x.shape[2]]


def ours(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return masked_conv2d(x, weight, bias, mask="B")


# Name, convolution, channels-last. The first three peers are the ways that a model's author would write.
PROVIDERS: tuple[tuple[str, Convolution, bool], ...] = (
    ("fastvq", ours, False),
    ("dense", dense, False),
    ("cropped", cropped, False),
    ("one crop", one_crop, False),
    ("fastvq channels-last", ours, True),
    ("dense channels-last", dense, True),
    ("cropped channels-last", cropped, True),
    ("one crop channels-last", one_crop, True),
)
PLAIN_WAYS = ("dense", "dense channels-last", "cropped")


def prepared(case: Case, convolution: Convolution, last: bool, kind: str) -> tuple[Callable[[], object], Tensor]:
    """What to time, and the output to compare: x, weight, bias as this provider keeps them."""
    x, weight, bias, grad = inputs(case)
    layout = torch.channels_last if last else torch.contiguous_format
    x, grad = (t.contiguous(memory_format=layout) for t in (x, grad))
    if convolution is not ours:
        weight = weight.contiguous(memory_format=layout)
    if kind == "gated eval":
        grad = grad[:, : case.c_out // 2]

        def gated() -> Tensor:
            with torch.no_grad():
                if convolution is ours:
                    return gated_masked_conv2d(x, weight, bias, mask="B")
                a, b = convolution(x, weight, bias).chunk(2, 1)
                return a.tanh() * b.sigmoid()

        return gated, gated()
    if kind == "forward":

        def forward() -> Tensor:
            with torch.no_grad():
                return convolution(x, weight, bias)

        return forward, forward()
    leaves = [t.requires_grad_() for t in (x, weight, bias)]

    def both() -> Sequence[Tensor]:
        return torch.autograd.grad(convolution(*leaves), leaves, grad)

    return both, both()[1].detach()


def inputs(case: Case) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(case.c_in * case.kernel)
    x = torch.randn(case.batch, case.c_in, case.side, case.side, generator=g)
    weight = torch.randn(case.c_out, case.c_in, case.kernel, case.kernel, generator=g) / case.kernel / case.c_in**0.5
    keep = torch.arange(case.kernel**2).view(case.kernel, case.kernel) <= case.kernel**2 // 2
    bias = torch.randn(case.c_out, generator=g)
    grad = torch.randn(case.batch, case.c_out, case.side, case.side, generator=g)
    return x.to(case.dtype), (weight * keep).to(case.dtype), bias.to(case.dtype), grad.to(case.dtype)


CHECKED = 8  # output channels whose weight gradient is compared


def expectation(case: Case, kind: str) -> tuple[Tensor, Tensor]:
    """The first image's output, or the first channels' weight gradient, in float64, and its error bound."""
    x, weight, bias, grad = (t.double() for t in inputs(case))
    n = case.c_in * case.kernel**2
    if kind == "forward+backward":
        p, n = case.kernel // 2, case.batch * case.side**2
        shape = (CHECKED, *weight.shape[1:])
        expected = conv2d_weight(x, shape, grad[:, :CHECKED], padding=p)
        magnitude = conv2d_weight(x.abs(), shape, grad[:, :CHECKED].abs(), padding=p)
    else:
        expected = dense(x[:1], weight, bias)
        magnitude = dense(x[:1].abs(), weight.abs(), bias.abs())
        if kind == "gated eval":
            a, b = expected.chunk(2, 1)
            expected = a.tanh() * b.sigmoid()
            magnitude = magnitude.chunk(2, 1)[0] + magnitude.chunk(2, 1)[1] / 4 + 1
    rounding = torch.finfo(case.dtype).eps / 2 * expected.abs() if case.dtype == torch.bfloat16 else 0.0
    return expected, 2.0**-24 * (n + 16) * 1.01 * magnitude + rounding


def count_off(case: Case, result: Tensor, kind: str, expected: Tensor, bound: Tensor) -> int:
    off = (result[: len(expected)].double() - expected).abs() > bound
    if kind == "forward+backward":  # what torch's ways compute for masked weights is not asked for
        off = off.flatten(2)[:, :, : case.kernel**2 // 2 + 1]
    return int(off.sum())


def measure(case: Case, kind: str, threads: int, seconds: float) -> list[Row]:
    with thread_count(threads):
        calls, checks = {}, {}
        expected, bound = expectation(case, kind)
        for name, convolution, last in PROVIDERS:
            run, result = prepared(case, convolution, last, kind)
            checks[name] = count_off(case, result, kind, expected, bound), expected.numel()
            calls[name] = Call(run, case.flop * (3 if kind == "forward+backward" else 1) / 5e10)
        times = interleave(calls, seconds=seconds, min_rounds=3, max_rounds=15)
    best = min((n for n in calls if n.startswith("fastvq")), key=lambda n: times[n].quantile(0.5))
    rows = []
    for name, t in times.items():
        flop = case.flop * (3 if kind == "forward+backward" else 1)
        off, compared = checks[name]
        wrong = off > 0 and name.startswith("fastvq")
        data = f"Gaussian {str(case.dtype).removeprefix('torch.')}"
        row = Row(kind, case.shape, data, threads, name, differing=off, compared=compared)
        if wrong:
            row.note = "outside the error bound: no time"
        else:
            row.calls, row.p20_ms, row.p50_ms, row.p80_ms = (
                len(t.calls),
                *(t.quantile(q) * 1e3 for q in (0.2, 0.5, 0.8)),
            )
            row.gflops = flop / t.quantile(0.5) / 1e9  # of the active taps
            row.ratio, row.cores = paired_ratio(t, times[best]), t.cores
        rows.append(row)
    return rows
