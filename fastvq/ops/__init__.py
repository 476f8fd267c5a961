"""The kernels' public face: torch ops, each with a plain-torch reference and a CPU kernel beside it."""

from fastvq.ops.ema import code_statistics, ema_update_, replace_dead_codes_
from fastvq.ops.nearest import nearest
from fastvq.ops.quantize import Quantized, quantize

__all__ = ["Quantized", "code_statistics", "ema_update_", "nearest", "quantize", "replace_dead_codes_"]
