"""The kernels' public face: torch ops, each with a plain-torch reference and a CPU kernel beside it."""

from fastvq.ops.masked_conv import gated_masked_conv2d, masked_conv2d
from fastvq.ops.nearest import PackedCodebook, nearest, pack_codebook
from fastvq.ops.pixelcnn import PixelCNNState, pixelcnn_start, pixelcnn_step
from fastvq.ops.pixelcnn.replay import PixelCNNSteps
from fastvq.ops.quantize import Quantized, quantize
from fastvq.ops.residual import ResidualQuantized, residual_quantize
from fastvq.ops.statistics import code_statistics, ema_update_, replace_dead_codes_
from fastvq.ops.step import VQStep, vq_step

__all__ = [
    "PackedCodebook",
    "PixelCNNState",
    "PixelCNNSteps",
    "Quantized",
    "ResidualQuantized",
    "VQStep",
    "code_statistics",
    "ema_update_",
    "gated_masked_conv2d",
    "masked_conv2d",
    "nearest",
    "pack_codebook",
    "pixelcnn_start",
    "pixelcnn_step",
    "quantize",
    "replace_dead_codes_",
    "residual_quantize",
    "vq_step",
]
