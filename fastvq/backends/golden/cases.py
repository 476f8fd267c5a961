"""Lookups whose nearest codes are hard to tell apart: what ``gate.check_lookup`` runs on a card without a record.

They have the width, the dtypes, the metric and, as far as the reference can afford it, the number of codes of the call
that asked, because kernels are compiled for each of these: what is checked is what will run.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["Configuration", "cases", "configuration", "widened"]

WORK = 1 << 22  # elements of a codebook, and products of a row, a code and a dimension, that the reference goes through
ROWS = range(8, 65)  # as many as WORK allows
FLOAT32: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}  # whatever torch's defaults are
USED = 512  # dimensions that are not zero: the reference takes them one by one


class Configuration(NamedTuple):
    """What a lookup's kernels are compiled for."""

    metric: str
    precision: str
    x: torch.dtype
    codebook: torch.dtype
    dim: int
    n_codes: int
    others: tuple[Any, ...]  # what else an op's kernels are compiled for

    def key(self) -> tuple[Any, ...]:
        """Codebooks within a power of two share an answer, as they share a way through the kernels."""
        return self._replace(n_codes=(self.n_codes * self.dim - 1).bit_length())


def configuration(x: Tensor, codebook: Tensor, metric: str, precision: str, *others: Any) -> Configuration:
    """That of the call on x [..., D] and codebook [..., K, D].

    Above WORK elements fewer codes stand for all, a multiple of 16 where the call's number is one, as Triton compiles
    for that too. Two things the call may then still compile anew: a filter that counts more blocks of codes, and
    whatever reads operands that are not contiguous.
    """
    n_codes, dim = codebook.shape[-2:]
    most = max(16, WORK // dim // 16 * 16)
    if n_codes > most:
        n_codes = most - (n_codes % 16 != 0)
    return Configuration(metric, precision, x.dtype, codebook.dtype, dim, n_codes, others)


def widened(t: Tensor, dim: int) -> Tensor:
    """``t`` [n, USED at most] at its full width, zeros evenly between: they change no distance by a bit."""
    if t.shape[1] == dim:
        return t
    out = t.new_zeros(len(t), dim)
    out[:, torch.arange(1, t.shape[1] + 1, device=t.device) * dim // t.shape[1] - 1] = t
    return out


def cases(c: Configuration) -> Iterator[tuple[str, Tensor, Tensor]]:
    """(name, x [N, D], codebook [K, D]) on the CPU, D no wider than USED: each way out of the filter.

    precision="fast" promises nothing of near-ties: one case, of codes that no rounding confuses.
    """
    g = torch.Generator("cpu").manual_seed(0)
    dim, n_codes = min(c.dim, USED), c.n_codes
    n = min(max(WORK // (n_codes * dim), ROWS[0]), ROWS[-1])
    if c.precision == "fast":
        far = torch.zeros(n_codes, dim, **FLOAT32)
        k = torch.arange(min(n_codes, 2 * dim), device="cpu")
        far[k, k // 2] = 1.0 - 2.0 * (k % 2)
        yield (
            "codes far apart",
            3 * far[k[torch.randint(len(k), (n,), generator=g, device="cpu")]].to(c.x),
            far.to(c.codebook),
        )
        return
    x, codebook = (torch.randn(m, dim, generator=g, dtype=torch.float64, device="cpu") for m in (n, n_codes))
    rows, codes = x.to(c.x), codebook.to(c.codebook)
    yield "gaussian", rows, codes
    offset = 16.0 if min(c.x.itemsize, c.codebook.itemsize) == 2 else 1e3  # 16 bits hold little beside a larger one
    yield "a shared offset", (x + offset).to(c.x), (codebook + offset).to(c.codebook)
    yield "a collapsed codebook", rows, (codebook / 1000).to(c.codebook)
    yield "pairs of codes", rows, codes[: (n_codes + 1) // 2].repeat(2, 1)[:n_codes]
    yield "equal codes", rows, codes[:1].repeat(n_codes, 1)
    near = codes[: (n_codes + 7) // 8].repeat(8, 1)[:n_codes]
    bits = near.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[near.itemsize])
    bits += torch.randint(0, 2, near.shape, generator=g, device="cpu")
    yield "codes one bit apart", rows, near
    # Operands half a step off the grid of bfloat16, then of float16, all on one side: half the bound would lose the
    # first code.
    part = max(1, dim // 3)
    for half in (2.0**-8, 2.0**-11):
        low, high = 1 + half, 1 + 3 * half
        row, two = (torch.zeros(*shape, **FLOAT32) for shape in ((dim,), (n_codes, dim)))
        two += torch.arange(n_codes, device="cpu")[:, None] % 70
        two[:2] = 0
        row[:part], row[part : 2 * part] = low, high
        two[0, :part] = low
        two[1:2, part : 2 * part] = high
        two[1:2, 2 * part : 2 * part + 1] = (1.117 * part * (high**2 - low**2)) ** 0.5
        yield "every rounding one way", row.repeat(3, 1).to(c.x), two.to(c.codebook)
