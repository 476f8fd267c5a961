"""Vector quantization with a learned codebook, as a module."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from fastvq._checks import check_ids, check_integer
from fastvq.nn._projection import Projected
from fastvq.nn.codebook import LearnedCodebook
from fastvq.ops import Quantized, VQStep, nearest, quantize, vq_step

__all__ = ["GroupedVQ", "VectorQuantizer"]


class VectorQuantizer(Projected, LearnedCodebook):
    """Replaces vectors by their nearest codes, and learns the codes (van den Oord et al. 2017).

    In training each forward also updates the codebook, by the exponential moving average of ``fastvq.ops.ema_update_``.
    The update comes after the outputs: they hold the codes before it. With ``learnable=True`` the codebook is a
    parameter instead, trained by ``codebook_loss``. In eval no buffer changes.

    Args:
        dim: D, width of the input vectors.
        n_codes: K, the number of codes.
        decay, eps: of the moving average.
        metric: "euclidean", "cosine" (input and codes are kept at unit length) or "dot".
        estimator: gradient to the input: "straight_through", "rotation" or "none".
        commitment_weight: beta of the commitment loss.
        learnable: codes are a parameter; add ``codebook_loss`` to the loss.
        kmeans_init: the first training batch with a usable vector starts the codebook by k-means (over all ranks
            together). The buffer ``initialised`` records that it has happened, and is saved with the codes.
        dead_code_threshold: a code whose average number of vectors a step falls below it is replaced by a random vector
            of the batch.
        code_dim: width of the codes, D/heads unless given; where heads * code_dim is not D, linear layers
            ``project_in`` and ``project_out`` lie around the lookup (Yu et al. 2022).
        heads: number of parts that each vector is cut into; each part is quantized separately.
        separate_codebook_per_head: a codebook for each head, rather than one for all.
        channel_first: input is [B, D, ...] rather than [..., D]; it is read in place.
        update: "forward": in every forward. "manual": statistics add up until ``fastvq.nn.update_codebooks(model)``, so
            ``decode(indices)`` equals ``quantized`` through a whole step, and micro-batches count as one.
        sync: "auto": statistics are summed over the ranks of ``torch.distributed`` where there are several (one message
            a forward, or one for the whole model with ``update_codebooks``); "none": each rank learns separately.
        group: the processes that hold this quantizer, a group of ``torch.distributed``; None: all processes. Every rank
            of the group takes part in each message, so ranks without the quantizer must not be in it.
        precision: of the lookup, see ``fastvq.ops.nearest``.

    A forward that runs inside a backward (activation checkpointing) neither updates nor counts, and uses the codes of
    the last training forward. ``freeze()`` stops all learning, ``freeze_codes(mask)`` freezes single codes.
    ``set_codebook(codes, sizes)`` starts from given codes. ``usage()`` returns how many codes are used; with
    ``track_usage()``, over an epoch or a validation set.

    The buffers stay float32 when the module is cast, loaded or wrapped in another dtype. ``codebook`` is [K, code_dim],
    with separate heads [H, K, code_dim]. docs/what_happens_when.md describes each way of loading.

    Raises:
        ValueError: sizes or options that do not fit; the message names them.

    Example:
        >>> vq = VectorQuantizer(64, 512)
        >>> q = vq(torch.randn(8, 100, 64))
        >>> q.quantized.shape, q.indices.shape
        (torch.Size([8, 100, 64]), torch.Size([8, 100]))
    """

    def __init__(
        self,
        dim: int,
        n_codes: int,
        *,
        decay: float = 0.99,
        eps: float = 1e-5,
        metric: Literal["euclidean", "cosine", "dot"] = "euclidean",
        estimator: Literal["straight_through", "rotation", "none"] = "straight_through",
        commitment_weight: float = 0.25,
        learnable: bool = False,
        kmeans_init: bool = False,
        dead_code_threshold: float | None = None,
        code_dim: int | None = None,
        heads: int = 1,
        separate_codebook_per_head: bool = False,
        channel_first: bool = False,
        update: Literal["forward", "manual"] = "forward",
        sync: Literal["auto", "none"] = "auto",
        group: dist.ProcessGroup | None = None,
        precision: Literal["exact", "fast"] = "exact",
    ) -> None:
        name = f"fastvq.nn.{type(self).__name__}"
        for argument, value in (("dim", dim), ("heads", heads)):
            check_integer(name, argument, value)
        if dim < 1 or heads < 1:
            raise ValueError(f"{name}: dim and heads must be at least 1, got {dim} and {heads}")
        if code_dim is None:
            if dim % heads:
                raise ValueError(
                    f"{name}: dim must be a multiple of heads, got {dim} and {heads}; give code_dim for a projection"
                )
            code_dim = dim // heads
        super().__init__(
            name,
            (heads,) if separate_codebook_per_head and heads > 1 else (),
            n_codes,
            code_dim,
            decay=decay,
            eps=eps,
            metric=metric,
            estimator=estimator,
            commitment_weight=commitment_weight,
            learnable=learnable,
            kmeans_init=kmeans_init,
            dead_code_threshold=dead_code_threshold,
            update=update,
            sync=sync,
            group=group,
            precision=precision,
        )
        self.heads = heads
        self._add_projections(dim, heads * code_dim, channel_first)

    def forward(
        self,
        x: Tensor,  # [..., dim], or [B, dim, ...] with channel_first
        mask: Tensor | None = None,  # [...] or [B, ...] bool, True = a real vector
    ) -> Quantized:
        """``Quantized(quantized, indices, commitment_loss, codebook_loss)``.

        quantized has x's shape and dtype; indices [...], with several heads [..., heads]. A masked vector gives -1 and
        zeros.
        """
        self._restore_float32()
        vectors = self._vectors(x, mask)
        heads_mask = self._heads_mask(mask)
        learns = self._learns()
        if learns and self._needs_kmeans_start():
            self._kmeans_start(vectors.detach(), heads_mask)
        codes = self._codes()
        options: dict[str, Any] = {
            "metric": self.metric,
            "estimator": self.estimator,
            "mask": heads_mask,
            "beta": self.commitment_weight,
            "precision": self.precision,
        }
        q: Quantized | VQStep
        if learns:
            q = vq_step(vectors, codes, **options)
            self._count(q.counts, q.indices, vectors)
            self._learn(vectors.detach(), q, heads_mask)
        else:
            q = quantize(vectors, codes, **options)
            self._count(None, q.indices, vectors)
        quantized = self._from_codebook_space(self._heads_joined(q.quantized), mask, x.dtype)
        return Quantized(quantized, self._heads_last(q.indices), q.commitment_loss, q.codebook_loss)

    def encode(self, x: Tensor) -> Tensor:
        """Indices as ``forward`` returns them."""
        with torch.no_grad():
            codes = self._inference_codes()
            indices = nearest(self._vectors(x), codes, metric=self.metric, precision=self.precision)
        return self._heads_last(indices)

    def decode(
        self,
        indices: Tensor,  # [...], with several heads [..., heads]; any integer dtype
    ) -> Tensor:
        """The vectors that ``forward`` gives for these indices, laid out as its input; zeros for -1.

        Their dtype is the module's: the one it was made, loaded or cast in.

        Raises:
            ValueError: an index that is neither -1 nor a code (checked on a CPU, elsewhere under FASTVQ_CHECK=1),
                another number of heads.
            TypeError: indices that are not integers.
        """
        name = f"{self.owner}.decode"
        indices, all_real = check_ids(name, "indices", indices, -1, self.n_codes)
        if self.heads > 1 and (indices.dim() < 1 or indices.shape[-1] != self.heads):
            raise ValueError(f"{name}: indices must be [..., {self.heads}], one a head, got {list(indices.shape)}")
        codes, real = self._inference_codes(), None
        index = indices if all_real else indices.clamp(min=0)
        chosen = codes[torch.arange(self.heads, device=codes.device), index] if self.lead else codes[index]
        if not all_real:
            real = indices >= 0
            chosen = torch.where(real[..., None], chosen, 0)
            real = real.any(dim=-1) if self.heads > 1 else real
        if self.heads > 1:
            chosen = chosen.flatten(-2)
        return self._from_codebook_space(chosen, real, self._module_dtype)

    def extra_repr(self) -> str:
        return f"dim={self.dim}, n_codes={self.n_codes}, code_dim={self.code_dim}, heads={self.heads}, {self.metric}"

    def _vectors(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """x in the lookup's layout: [..., c]; [..., H, c] with a shared codebook; [H, ..., c] with separate ones."""
        vectors = self._to_codebook_space(x, mask)
        if self.heads > 1:
            vectors = vectors.unflatten(-1, (self.heads, self.code_dim))
            if self.lead:
                vectors = vectors.movedim(-2, 0)
        return self._prepare(vectors)

    def _heads_mask(self, mask: Tensor | None) -> Tensor | None:
        if mask is None or self.heads == 1:
            return mask
        return mask.expand(self.heads, *mask.shape) if self.lead else mask[..., None].expand(*mask.shape, self.heads)

    def _heads_last(self, indices: Tensor) -> Tensor:
        return indices.movedim(0, -1) if self.lead else indices

    def _heads_joined(self, quantized: Tensor) -> Tensor:
        if self.heads == 1:
            return quantized
        return (quantized.movedim(0, -2) if self.lead else quantized).flatten(-2)

    def _learn(self, vectors: Tensor, step: VQStep, mask: Tensor | None) -> None:
        rows = vectors.reshape(*self.lead, -1, self.code_dim)
        flat_mask = None if mask is None else mask.reshape(*self.lead, -1)
        self._record(None if self.learnable else step.sums, step.counts, rows, flat_mask)


class GroupedVQ(VectorQuantizer):
    """Cuts vectors into ``n_groups`` parts, each quantized by its own codebook (product quantization).

    A ``VectorQuantizer`` with ``n_groups`` heads and separate codebooks: indices are [..., n_groups]; all groups are
    looked up in one call and synchronised in one message. Further options are those of ``VectorQuantizer``.

    Raises:
        ValueError: dim is not a multiple of n_groups.

    Example:
        >>> vq = GroupedVQ(64, 256, n_groups=4)
        >>> vq(torch.randn(8, 100, 64)).indices.shape
        torch.Size([8, 100, 4])
    """

    def __init__(self, dim: int, n_codes: int, n_groups: int, **options: object) -> None:
        for name in ("heads", "separate_codebook_per_head"):
            if name in options:
                raise ValueError(f"fastvq.nn.GroupedVQ: {name} is set by n_groups; leave it out")
        check_integer("fastvq.nn.GroupedVQ", "n_groups", n_groups)
        super().__init__(dim, n_codes, heads=n_groups, separate_codebook_per_head=True, **options)  # type: ignore[arg-type]
