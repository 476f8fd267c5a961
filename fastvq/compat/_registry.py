"""Every class that ``fastvq.patch`` knows."""

from __future__ import annotations

from fastvq.compat import (
    diffusers,
    encodec,
    moshi,
    rosinality,
    taming,
    transformers,
    unixpickle,
    var,
    vector_quantize_pytorch,
)
from fastvq.compat._target import PatchTarget

__all__ = ["TARGETS"]

PEERS = (vector_quantize_pytorch, encodec, moshi, transformers, diffusers, taming, var, rosinality, unixpickle)
TARGETS: tuple[PatchTarget, ...] = tuple(target for peer in PEERS for target in peer.TARGETS)
