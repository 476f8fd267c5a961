"""Every class that ``fastvq.patch`` knows."""

from __future__ import annotations

from fastvq.compat import vector_quantize_pytorch
from fastvq.compat._target import Target

__all__ = ["TARGETS"]

TARGETS: tuple[Target, ...] = tuple(target for peer in (vector_quantize_pytorch,) for target in peer.TARGETS)
