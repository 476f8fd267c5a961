"""encodec and audiocraft: ``EuclideanCodebook`` and ``ResidualVectorQuantization`` of their ``core_vq``.

``ResidualVectorQuantizer`` is made of them and stays the peer's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastvq.compat._exports import subclasses_of
from fastvq.compat._lookup import kmeans_lloyd, nearest, statistics
from fastvq.compat._residual import FastResidual
from fastvq.compat._target import PatchedModule, PatchTarget, peer_module, require

__all__ = ["TARGETS", "FastEuclideanCodebook", "FastResidualVectorQuantization"]


class FastEuclideanCodebook(PatchedModule):
    """Lookup, statistics and k-means without N x K matrices; expiry, averages and smoothing in the peer's order."""

    def quantize(self, x: Tensor) -> Tensor:  # [N, D] -> [N]
        return nearest(x, self.embed)

    def init_embed_(self, data: Tensor) -> None:  # [N, D]
        """The peer's k-means on the first batch, whose differences alone would take N x K x D."""
        if self.inited:
            return
        peer = peer_module(self, "EuclideanCodebook")
        samples = data.detach()
        embed, counts = kmeans_lloyd(samples, peer.sample_vectors(samples, self.codebook_size), self.kmeans_iters)
        self.embed.data.copy_(embed)
        self.embed_avg.data.copy_(embed)
        self.cluster_size.data.copy_(counts)
        self.inited.data.fill_(1)
        # All ranks go on from the first one's codebook, as in the peer.
        _shared(peer).broadcast_tensors(self.buffers())

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # [..., D] -> [..., D], [...]
        """As the peer's: the codes are those before the update, and expiry comes before the averages."""
        rows = self.preprocess(x)
        self.init_embed_(rows)
        chosen = self.quantize(rows)
        indices = self.postprocess_emb(chosen, x.shape)
        quantized = self.dequantize(indices)
        if self.training:
            self.expire_codes_(rows)
            peer = peer_module(self, "EuclideanCodebook")
            sums, counts = statistics(rows, chosen, self.codebook_size)
            peer.ema_inplace(self.cluster_size, counts, self.decay)
            peer.ema_inplace(self.embed_avg, sums, self.decay)
            share = peer.laplace_smoothing(self.cluster_size, self.codebook_size, self.epsilon)
            self.embed.data.copy_(self.embed_avg / (share * self.cluster_size.sum())[:, None])
        return quantized, indices


class FastResidualVectorQuantization(FastResidual):
    """All levels in one pass where nothing is learnt; in training each level changes what the next one sees."""

    def encode(self, x: Tensor, n_q: int | None = None) -> Tensor:  # [B, D, T] -> [Q, B, T]
        """As the peer's."""
        done = self._at_once(x, n_q or len(self.layers))
        if done is None:
            theirs: Any = super()
            return theirs.encode(x, n_q)
        return done[1]

    def forward(self, x: Tensor, n_q: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """As the peer's: (quantized [B, D, T], indices [Q, B, T], losses [Q, 1])."""
        done = self._at_once(x, n_q or len(self.layers), forward=True)
        if done is None:
            return super().forward(x, n_q)
        return *done, torch.zeros(len(done[1]), 1, device=x.device)


def _shared(peer: Any) -> Any:
    """The peer's module for several processes: encodec calls it ``distrib``, audiocraft takes it from flashy."""
    return getattr(peer, "distrib", None) or peer.flashy.distrib


CODEBOOK_METHODS = (
    "quantize",
    "init_embed_",
    "forward",
    "preprocess",
    "postprocess_emb",
    "dequantize",
    "expire_codes_",
)
HELPERS = ("ema_inplace", "laplace_smoothing", "sample_vectors")
PROCESSES = {"encodec": "distrib", "audiocraft": "flashy"}  # where a peer's file has its module for several processes
CODEBOOK_SHAPES = require(
    embed="2", embed_avg="2", cluster_size="1", inited="", decay="", epsilon="", threshold_ema_dead_code=""
)
TARGETS = tuple(
    PatchTarget(
        peer=peer,
        name=name,
        modules=rf"{peer}\.quantization\.core_vq",
        fast=fast,
        replaced_methods=methods,
        attributes=attributes,
        helpers=(*helpers, PROCESSES[peer]) if helpers else (),
        reject=reject,
        importable=(f"{peer}.quantization.core_vq",),
        distribution=peer,
        tested=tested,
    )
    for peer, tested in (("encodec", "0.1"), ("audiocraft", "1.4"))
    for name, fast, methods, reject, attributes, helpers in (
        (
            "EuclideanCodebook",
            FastEuclideanCodebook,
            CODEBOOK_METHODS,
            CODEBOOK_SHAPES,
            ("codebook_size", "kmeans_iters"),
            HELPERS,
        ),
        (
            "ResidualVectorQuantization",
            FastResidualVectorQuantization,
            ("encode", "forward"),
            require(layers=""),
            (),
            (),
        ),
    )
)

__getattr__ = subclasses_of(
    __name__,
    {
        "EuclideanCodebook": "encodec.quantization.core_vq",
        "VectorQuantization": "encodec.quantization.core_vq",
        "ResidualVectorQuantization": "encodec.quantization.core_vq",
        "ResidualVectorQuantizer": "encodec.quantization.vq",
    },
    TARGETS,
)
