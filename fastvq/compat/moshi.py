"""moshi (Mimi): ``EuclideanCodebook`` of its ``core_vq``.

Its averages come from scatter_add and need no N x K matrix, so only the lookup is replaced.
"""

from __future__ import annotations

from torch import Tensor

from fastvq.compat._exports import subclasses_of
from fastvq.compat._lookup import nearest
from fastvq.compat._target import Fast, Target, needs

__all__ = ["TARGETS", "FastEuclideanCodebook"]


class FastEuclideanCodebook(Fast):
    """The lookup without the N x K distances; expiry, averages and the cached codebook stay the peer's."""

    def _quantize(self, x: Tensor) -> Tensor:  # [N, D] -> [N]
        return nearest(x, self.embedding)


TARGETS = (
    Target(
        peer="moshi",
        name="EuclideanCodebook",
        modules=r"moshi\.quantization\.core_vq",
        fast=FastEuclideanCodebook,
        seams=("_quantize",),
        unfit=needs(embedding_sum="2", cluster_usage="1", _initialized="", epsilon=""),
        importable=("moshi.quantization.core_vq",),
        distribution="moshi",
        tested="0.2",
    ),
)

__getattr__ = subclasses_of(
    __name__,
    {
        "EuclideanCodebook": "moshi.quantization.core_vq",
        "VectorQuantization": "moshi.quantization.core_vq",
        "ResidualVectorQuantization": "moshi.quantization.core_vq",
        "ResidualVectorQuantizer": "moshi.quantization.vq",
        "SplitResidualVectorQuantizer": "moshi.quantization.vq",
    },
)
