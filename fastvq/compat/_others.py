"""Quantizers that ``fastvq.patch`` has nothing to do with, so that its report can say so."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from torch import nn

from fastvq.compat._report import Skipped

__all__ = ["other_quantizers"]

ROUNDS = "it rounds every number to a few levels; there is no codebook to search, so it needs no patch"
SIGNS = "it takes the sign of every number; there is no codebook to search, so it needs no patch"
KINDS = (  # regular expression for the class's name, and why it is none of ours; the first that fits counts
    (r"FSQ|FiniteScalar|^FSP$|LatentQuantize$", ROUNDS),
    (r"LFQ|LookupFree|BSQ|BinarySpherical|BinaryMapper", SIGNS),
    (r"Gumbel", "it draws codes by scores that a layer computes, not by distance"),
    (r"VectorQuanti[sz]|Quanti[sz]er$|Codebook$|VQ$|SVQ|RVQ$", "fastvq does not know this class; it stays as it is"),
)
OURS = "it is fastvq's own, which needs no patch"


def other_quantizers(module: nn.Module, known: Sequence[str]) -> Iterator[Skipped]:
    """The outermost quantizers of ``module``, by their class's name, that neither hold nor lie in one of ``known``."""
    listed: list[str] = []
    for name, one in module.named_modules():
        reason = _reason(type(one))
        if reason is None or any(_inside(name, outer) or _inside(outer, name) for outer in known):
            continue
        if not any(_inside(name, outer) for outer in listed):
            listed.append(name)
            yield Skipped(name, f"{type(one).__module__}.{type(one).__qualname__}", reason)


def _reason(cls: type[nn.Module]) -> str | None:
    package = cls.__module__.partition(".")[0]
    if package == "torch":  # of another kind of quantization: numbers in fewer bits
        return None
    reason = next((why for pattern, why in KINDS if re.search(pattern, cls.__name__)), None)
    return OURS if reason is not None and package == "fastvq" else reason


def _inside(name: str, outer: str) -> bool:
    return not outer or name == outer or name.startswith(f"{outer}.")
