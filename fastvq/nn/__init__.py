"""Modules that put the ops into models."""

from fastvq.nn.codebook import CodeUsage, update_codebooks
from fastvq.nn.residual_vq import ResidualVQ
from fastvq.nn.vector_quantizer import GroupedVQ, VectorQuantizer

__all__ = ["CodeUsage", "GroupedVQ", "ResidualVQ", "VectorQuantizer", "update_codebooks"]
