"""The kernels' public face: torch ops, each with a plain-torch reference and a CPU kernel beside it."""

from fastvq.ops.nearest import nearest

__all__ = ["nearest"]
