"""Modules made of the ops."""

from fastvq.nn.masked_conv import GatedMaskedConv2d, MaskedConv2d

__all__ = ["GatedMaskedConv2d", "MaskedConv2d"]
