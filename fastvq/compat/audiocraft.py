"""audiocraft: the same codebook as encodec's, in a module of its own."""

from __future__ import annotations

from fastvq.compat._exports import subclasses_of
from fastvq.compat.encodec import TARGETS

__getattr__ = subclasses_of(
    __name__,
    {
        "EuclideanCodebook": "audiocraft.quantization.core_vq",
        "VectorQuantization": "audiocraft.quantization.core_vq",
        "ResidualVectorQuantization": "audiocraft.quantization.core_vq",
        "ResidualVectorQuantizer": "audiocraft.quantization.vq",
    },
    TARGETS,
)
