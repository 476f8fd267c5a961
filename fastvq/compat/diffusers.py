"""diffusers: ``VectorQuantizer`` of ``VQModel``."""

from __future__ import annotations

from fastvq.compat._exports import subclasses_of
from fastvq.compat._target import Target, needs
from fastvq.compat.taming import FastImageQuantizer

__all__ = ["TARGETS"]

TARGETS = (
    Target(
        peer="diffusers",
        name="VectorQuantizer",
        modules=r"diffusers\.models\.(autoencoders\.vae|vae)",
        fast=FastImageQuantizer,
        seams=("forward", "remap_to_used"),
        attributes=("remap",),
        unfit=needs(embedding__weight="2", vq_embed_dim="", beta="", legacy="", sane_index_shape=""),
        importable=("diffusers.models.autoencoders.vae",),
        distribution="diffusers",
        tested="0.42",
    ),
)

__getattr__ = subclasses_of(__name__, {"VectorQuantizer": "diffusers.models.autoencoders.vae"})
