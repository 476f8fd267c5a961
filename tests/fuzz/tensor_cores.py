"""Adversarial dot products on models of the matrix instructions of ten GPU generations, against the lookup's bound.

The package ``mmasim`` models matrix instructions to the bit, on a CPU. The lookup's filter trusts that a chain of such
instructions returns the sum of ``width`` products of 16-bit operands within

    gamma(width) (sum max(|a_i|, s) max(|b_i|, s) + |start|) + (2 width + 2) 2^-126

of the exact sum. The sum leaves out products that are zero; s is the least normal number of the operands' type, because
units align a product by the exponents of its operands, and give a subnormal number that of s. ``start`` is the
accumulator's first value. The last term covers what a unit flushes to zero. ``worst_ratio`` searches for the product
that uses the largest share of this bound.
"""

from __future__ import annotations

import importlib.util
import os
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor

REPOSITORY = Path(__file__).parents[2]
WIDTHS = (16, 32, 48, 64, 112, 272)
BATCH = 4096  # products of one width that are evaluated together
KEPT = 64  # worst products of a width, which the next batch of that width varies

# What a product on this architecture is computed with. mma.sync: csrc/cuda, and what Triton makes of ``tl.dot`` there;
# wgmma and tcgen05.mma: ``tl.dot`` on Hopper and on the large Blackwell; mfma: what ``tl.dot`` would be on AMD, where
# the package runs its reference today. Turing and Volta have smaller shapes and no bfloat16.
INSTRUCTIONS: dict[str, dict[str, str]] = {
    "mma.sync fp16": {
        "Volta": "m8n8k4.f32.f16.f16.f32",
        "Turing": "m16n8k8.f32.f16.f16.f32",
        **dict.fromkeys(("Ampere", "Ada Lovelace", "Hopper", "Blackwell", "RTX Blackwell"), "m16n8k16.f32.f16.f16.f32"),
    },
    "mma.sync bf16": dict.fromkeys(
        ("Ampere", "Ada Lovelace", "Hopper", "Blackwell", "RTX Blackwell"), "m16n8k16.f32.bf16.bf16.f32"
    ),
    "wgmma fp16": {"Hopper": "m64n128k16.f32.f16.f16"},
    "wgmma bf16": {"Hopper": "m64n128k16.f32.bf16.bf16"},
    "tcgen05.mma fp16": {"Blackwell": "m128n128k16.kind::f16.f32.f16.f16"},
    "tcgen05.mma bf16": {"Blackwell": "m128n128k16.kind::f16.f32.bf16.bf16"},
    "mfma fp16": {"CDNA1": "f32_32x32x8f16", "CDNA2": "f32_32x32x8f16", "CDNA3": "f32_32x32x8_f16"},
    "mfma bf16": {"CDNA1": "f32_32x32x4bf16", "CDNA2": "f32_32x32x8bf16_1k", "CDNA3": "f32_32x32x8_bf16"},
}


class Instruction(NamedTuple):
    generation: str
    dtype: torch.dtype  # of the operands
    flushes: bool  # whether the unit takes subnormal operands for zero
    evaluate: Callable[[Tensor, Tensor, Tensor], Tensor]  # [n, width], [n, width], [n] -> [n] float32
    arithmetic: str  # kind and parameters of the model: equal for instructions that compute the same


class Worst(NamedTuple):
    ratio: float  # largest |result - exact| / bound
    n_products: int
    example: str


def missing() -> str | None:
    """Why the instructions cannot be modelled here, or None."""
    if importlib.util.find_spec("mmasim") is None:
        return "models matrix instructions with mmasim, which is absent: pip install '.[tensor-cores]'"
    return None


def load(name: str) -> list[Instruction]:
    """The models of one instruction, one a generation."""
    import ninja

    # mmasim compiles a helper for float64 when it is imported. In a folder made for this process: the shared one keeps
    # a lock when a process is killed while it compiles.
    changes = {
        "TORCH_EXTENSIONS_DIR": tempfile.mkdtemp(prefix="mmasim"),
        "PATH": os.pathsep.join([ninja.BIN_DIR, os.environ.get("PATH", "")]),
    }
    with mock.patch.dict(os.environ, changes):
        from mmasim import amd, nv_ptx
    models: dict[str, Any] = {"mma.sync": nv_ptx.MMA, "wgmma": nv_ptx.WGMMA, "tcgen05.mma": nv_ptx.TCGen05MMA}
    kind, operand = name.split()
    dtype = torch.float16 if operand == "fp16" else torch.bfloat16
    model = models.get(kind, amd.MFMA)
    instructions = []
    for generation, shape in INSTRUCTIONS[name].items():
        modelled = model(generation, shape)
        arithmetic = modelled.arithmetic_op
        same = f"{type(arithmetic).__name__} {sorted(vars(arithmetic).items())} {dtype}"
        instructions.append(Instruction(generation, dtype, generation == "CDNA2", modelled.dpa, same))
    return instructions


def gamma_of_cuda_sources() -> Callable[[int], float]:
    """The same number as csrc/cuda/pack.cu computes it, read from the source."""
    found = re.search(r"gamma = \(([\d.]+) \* width \+ ([\d.]+)\) \* 0x1p-(\d+)", _text("csrc/cuda/pack.cu"))
    assert found, "csrc/cuda/pack.cu has no gamma of the known form: bring this test up to date"
    slope, offset, bits = float(found[1]), float(found[2]), int(found[3])
    return lambda width: (slope * width + offset) * 2.0**-bits


def _text(path: str) -> str:
    return (REPOSITORY / path).read_text(encoding="utf-8")


class _Adversary:
    """Draws operands [n, width] and starts [n] that matrix units sum badly."""

    def __init__(self, dtype: torch.dtype, flushes: bool, seed: int) -> None:
        self.dtype, self.flushes = dtype, flushes
        self.generator = torch.Generator().manual_seed(seed)
        # Mantissa bits, smallest and largest exponent that are drawn: products stay below 2^126, as the lookup demands.
        self.bits, self.low, self.high = (10, -14, 15) if dtype == torch.float16 else (7, -70, 50)

    def draw(self, n: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
        kinds = (self.gaussian, self.scattered, self.cut, self.cut, self.cut, self.cancelled, self.tiny)
        parts = [kind(-(-n // len(kinds)), width) for kind in kinds]
        a, b, start = (torch.cat(part)[:n] for part in zip(*parts, strict=True))
        return self.operands(a), self.operands(b), start.float()

    def vary(self, products: tuple[Tensor, ...], n: int) -> tuple[Tensor, Tensor, Tensor]:
        """Copies of the given products with some elements drawn anew and some moved in the last place."""
        copies = torch.arange(n) % len(products[0])
        a, b, start = (values[copies] for values in products)
        fresh_a, fresh_b, fresh_start = self.draw(n, a.shape[1])
        replaced = self.uniform(n, a.shape[1]) < self.uniform(n, 1) ** 3
        a, b = torch.where(replaced, fresh_a, a).double(), torch.where(replaced, fresh_b, b)
        moved = self.uniform(n, a.shape[1]) < 0.1 * self.uniform(n, 1)
        a = torch.where(moved, a * (1 - 2.0 ** -(self.bits + 1)), a)
        return self.operands(a), b, torch.where(self.uniform(n) < 0.1, fresh_start, start)

    def operands(self, values: Tensor) -> Tensor:
        largest = 60000.0 if self.dtype == torch.float16 else 2.0**60
        values = values.double().clamp(-largest, largest).to(self.dtype)
        if self.flushes:  # the bound holds for the operands as the unit sees them
            values = torch.where(values.abs() < torch.finfo(self.dtype).smallest_normal, 0.0, values)
        return values

    def uniform(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.generator, dtype=torch.float64)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64)

    def exponents(self, low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high + 1, shape, generator=self.generator).double()

    def gaussian(self, n: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
        return self.normal(n, width), self.normal(n, width), self.normal(n) * self.exponents(0, 1, n)

    def scattered(self, n: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
        """Exponents all over the range, or over a part of it."""
        spread = self.uniform(n, 1)
        a, b = (self.normal(n, width) * 2 ** (self.exponents(-24, 10, n, width) * spread).round() for _ in range(2))
        return a, b, self.normal(n) * 2 ** self.exponents(-24, 20, n)

    def cut(self, n: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
        """One large addend; the others, of one sign, end just below a unit of the bits that are kept beneath it."""
        almost_two = 2 - 2.0**-self.bits * self.exponents(1, 3, n, width)
        room = self.exponents(18, 27, n, 1) + (self.uniform(n, 1) < 0.3) * self.exponents(0, 3, n, width)
        top = self.exponents(-4, 12, n, 1) if self.dtype == torch.bfloat16 else self.exponents(6, 14, n, 1)
        beneath = top * 2 - room - 2  # exponent of a product of two numbers just below 2: 2 above its operands'
        a = almost_two * 2 ** (beneath / 2).ceil()
        b = (2 - 2.0**-self.bits * self.exponents(1, 3, n, 1)) * 2 ** (beneath / 2).floor()
        b = b.expand(n, width) * torch.where(self.uniform(n, 1) < 0.5, -1.0, 1.0)
        leads = torch.arange(width) == (self.uniform(n, 1) ** 2 * width).floor()
        in_start = self.uniform(n, 1) < 0.5
        large = (1 + self.uniform(n, 1) * self.exponents(0, 1, n, 1)) * 2**top
        a = torch.where(leads & ~in_start, large, a)
        b = torch.where(leads & ~in_start, 2**top, b)
        sign = torch.where(self.uniform(n) < 0.5, -1.0, 1.0)
        return a, b, torch.where(in_start[:, 0], sign * (large * 2**top)[:, 0], 0.0)

    def cancelled(self, n: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
        """The second half of the products takes away what the first half added."""
        a, b, start = self.scattered(n, width)
        half = width // 2
        a[:, half:], b[:, half:] = -a[:, :half], b[:, :half]
        return a, b * (1 + self.normal(n, width) * 2.0 ** -self.exponents(4, 30, n, 1)), start * 0

    def tiny(self, n: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
        """Subnormal and least normal operands, next to some that are large."""
        scales = [2.0 ** (self.low + self.exponents(-10, 6, n, width)) for _ in range(2)]
        large = 2.0 ** (self.exponents(0, 14, n, 1) * self.exponents(0, 1, n, 1))
        b = torch.where(self.uniform(n, width) < self.uniform(n, 1), large, scales[1])
        return (
            self.normal(n, width) * scales[0],
            self.normal(n, width) * b,
            self.normal(n) * 2.0 ** -self.exponents(0, 60, n),
        )


def worst_ratio(instruction: Instruction, n_products: int, gamma: Callable[[int], float], seed: int = 0) -> Worst:
    """The largest share of the bound that any of ``n_products`` adversarial products uses."""
    adversary = _Adversary(instruction.dtype, instruction.flushes, seed)
    worst, done, batch = Worst(0.0, 0, "none"), 0, 0
    kept: dict[int, tuple[Tensor, ...]] = {}  # of each width: a, b, start and ratio of the worst products
    least = torch.finfo(instruction.dtype).smallest_normal
    batch_size = min(BATCH, -(-n_products // (4 * len(WIDTHS))))
    while done < n_products:
        width = WIDTHS[batch % len(WIDTHS)]
        n = min(batch_size, n_products - done)
        a, b, start = adversary.vary(kept[width][:3], n) if width in kept and batch % 4 else adversary.draw(n, width)
        products = a.double() * b.double()  # exact: at most 22 bits
        exact = products.sum(dim=1) + start.double()
        sizes = torch.where(products == 0, 0.0, a.double().abs().clamp(min=least) * b.double().abs().clamp(min=least))
        bound = gamma(width) * (sizes.sum(dim=1) + start.double().abs()) + (2 * width + 2) * 2.0**-126
        result = instruction.evaluate(a, b, start)
        ratio = ((result.double() - exact).abs() / bound).nan_to_num(nan=torch.inf)
        row = int(ratio.argmax())
        if float(ratio[row]) > worst.ratio:
            operands = f"width {width}, a {a[row].tolist()}, b {b[row].tolist()}, start {float(start[row])!r}"
            worst = worst._replace(ratio=float(ratio[row]), example=f"{operands}: {float(result[row])!r}")
        pool: tuple[Tensor, ...] = (a, b, start, ratio)
        if width in kept:
            pool = tuple(torch.cat(pair) for pair in zip(pool, kept[width], strict=True))
        best = pool[3].topk(min(KEPT, len(pool[3]))).indices
        kept[width] = tuple(values[best] for values in pool)
        done, batch = done + n, batch + 1
    return worst._replace(n_products=done)
