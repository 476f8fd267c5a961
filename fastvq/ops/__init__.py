"""The kernels' public face: torch ops, each with a plain-torch reference and a CPU kernel beside it."""

from fastvq.ops.nearest import nearest
from fastvq.ops.quantize import Quantized, quantize

__all__ = ["Quantized", "nearest", "quantize"]
