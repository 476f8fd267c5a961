"""moshi (Mimi): ``EuclideanCodebook`` and ``ResidualVectorQuantization`` of its ``core_vq``.

The codebook's averages come from scatter_add and need no N x K matrix, so only the lookup is replaced.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastvq.compat._exports import subclasses_of
from fastvq.compat._lookup import nearest
from fastvq.compat._residual import FastResidual
from fastvq.compat._target import PatchedModule, PatchTarget, peer_module, require

__all__ = ["TARGETS", "FastEuclideanCodebook", "FastResidualVectorQuantization"]


class FastEuclideanCodebook(PatchedModule):
    """The lookup without the N x K distances; expiry, averages and the cached codebook stay the peer's."""

    def _quantize(self, x: Tensor) -> Tensor:  # [N, D] -> [N]
        return nearest(x, self.embedding)


class FastResidualVectorQuantization(FastResidual):
    """All levels in one pass where nothing is learnt; in training each level changes what the next one sees."""

    codes = "embedding"

    def encode(self, x: Tensor, n_q: int | None = None) -> Tensor:  # [B, D, T] -> [Q, B, T]
        """As the peer's."""
        done = self._at_once(x, n_q or len(self.layers))
        if done is None:
            theirs: Any = super()
            return theirs.encode(x, n_q)
        return done[1]

    def forward(self, x: Tensor, n_q: int | None = None) -> Any:
        """As the peer's: (quantized [B, D, T], codes [Q, B, T], losses [Q], metrics), which are none in eval."""
        done = self._at_once(x, n_q or len(self.layers), forward=True)
        if done is None:
            return super().forward(x, n_q)
        quantized, indices = done
        result = peer_module(self, "ResidualVectorQuantization")._VQForwardResult
        return result(quantized, indices, torch.zeros(len(indices), device=x.device), {})


COMMON: dict[str, Any] = {
    "peer": "moshi",
    "modules": r"moshi\.quantization\.core_vq",
    "importable": ("moshi.quantization.core_vq",),
    "distribution": "moshi",
    "tested": "0.2",
}
TARGETS = (
    PatchTarget(
        name="EuclideanCodebook",
        fast=FastEuclideanCodebook,
        replaced_methods=("_quantize",),
        attributes=("embedding",),
        reject=require(embedding_sum="2", cluster_usage="1", _initialized="", epsilon=""),
        **COMMON,
    ),
    PatchTarget(
        name="ResidualVectorQuantization",
        fast=FastResidualVectorQuantization,
        replaced_methods=("encode", "forward"),
        helpers=("_VQForwardResult",),
        reject=require(layers="", codebook_offset=""),
        **COMMON,
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
    TARGETS,
)
