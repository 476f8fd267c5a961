"""Modules that use the ops: quantizers with learned codebooks, and masked convolutions."""

from fastvq.nn.codebook import CodeUsage, update_codebooks
from fastvq.nn.masked_conv import GatedMaskedConv2d, MaskedConv2d
from fastvq.nn.residual_vq import ResidualVQ
from fastvq.nn.vector_quantizer import GroupedVQ, VectorQuantizer

__all__ = [
    "CodeUsage",
    "GatedMaskedConv2d",
    "GroupedVQ",
    "MaskedConv2d",
    "ResidualVQ",
    "VectorQuantizer",
    "update_codebooks",
]
