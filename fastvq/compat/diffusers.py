"""diffusers: ``VectorQuantizer`` of ``VQModel``."""

from __future__ import annotations

from fastvq.compat._exports import subclasses_of
from fastvq.compat._target import PatchTarget, require
from fastvq.compat.taming import FastImageQuantizer

__all__ = ["TARGETS"]

TARGETS = (
    PatchTarget(
        peer="diffusers",
        name="VectorQuantizer",
        modules=r"diffusers\.models\.(autoencoders\.vae|vae)",
        fast=FastImageQuantizer,
        replaced_methods=("forward", "remap_to_used"),
        attributes=("remap",),
        reject=require(embedding__weight="2", vq_embed_dim="", beta="", legacy="", sane_index_shape=""),
        importable=("diffusers.models.autoencoders.vae",),
        distribution="diffusers",
        tested="0.42",
    ),
)

__getattr__ = subclasses_of(__name__, {"VectorQuantizer": "diffusers.models.autoencoders.vae"}, TARGETS)
