"""Residual vector quantization with learned codebooks, as a module."""

from __future__ import annotations

from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from fastvq._checks import check_ids, check_integer
from fastvq.nn._projection import Projected
from fastvq.nn.codebook import LearnedCodebook
from fastvq.ops import ResidualQuantized, residual_quantize

__all__ = ["ResidualVQ"]

OP = "fastvq.nn.ResidualVQ"


class ResidualVQ(Projected, LearnedCodebook):
    """Replaces vectors by sums of codes, one code a level (Zeghidour et al. 2021), and learns the codes.

    Learning, ``update``, ``sync``, ``group``, ``dead_code_threshold``, checkpointing, ``freeze()``, ``freeze_codes()``,
    ``set_codebook()``, ``usage()`` and buffers are as in ``VectorQuantizer``; all levels share one message. A dead
    code of a level is replaced by a residual that the levels before left.

    Args:
        dim, n_codes, n_levels: D, K, Q.
        shared_codebook: one codebook for all levels; statistics of all levels are added up.
        quantize_dropout: in training use only the first n levels, n drawn from 1 ... Q for each batch. The others give
            index -1 and no loss, and learn nothing from that batch.
        kmeans_init: starts each level by k-means on the residuals of the levels before; a shared codebook, on the
            vectors.
        others: as in ``VectorQuantizer``; metric "cosine" is refused, as residuals have no common length.

    Raises:
        ValueError: sizes or options that do not fit.

    Example:
        >>> q = ResidualVQ(64, 256, 4)(torch.randn(8, 100, 64))
        >>> q.quantized.shape, q.indices.shape, q.commitment_losses.shape
        (torch.Size([8, 100, 64]), torch.Size([8, 100, 4]), torch.Size([4]))
    """

    def __init__(
        self,
        dim: int,
        n_codes: int,
        n_levels: int,
        *,
        shared_codebook: bool = False,
        quantize_dropout: bool = False,
        decay: float = 0.99,
        eps: float = 1e-5,
        metric: Literal["euclidean", "dot"] = "euclidean",
        estimator: Literal["straight_through", "rotation", "none"] = "straight_through",
        commitment_weight: float = 0.25,
        learnable: bool = False,
        kmeans_init: bool = False,
        dead_code_threshold: float | None = None,
        code_dim: int | None = None,
        channel_first: bool = False,
        update: Literal["forward", "manual"] = "forward",
        sync: Literal["auto", "none"] = "auto",
        group: dist.ProcessGroup | None = None,
        precision: Literal["exact", "fast"] = "exact",
    ) -> None:
        for argument, value in (("dim", dim), ("n_levels", n_levels)):
            check_integer(OP, argument, value)
        if dim < 1 or n_levels < 1:
            raise ValueError(f"{OP}: dim and n_levels must be at least 1, got {dim} and {n_levels}")
        if metric == "cosine":
            raise ValueError(
                f"{OP}: metric must be 'euclidean' or 'dot', got 'cosine'; residuals have no common length"
            )
        super().__init__(
            OP,
            () if shared_codebook else (n_levels,),
            n_codes,
            dim if code_dim is None else code_dim,
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
        self.n_levels, self.shared_codebook, self.quantize_dropout = n_levels, shared_codebook, quantize_dropout
        self._add_projections(dim, self.code_dim, channel_first)

    def forward(
        self,
        x: Tensor,  # [..., dim], or [B, dim, ...] with channel_first
        mask: Tensor | None = None,  # [...] or [B, ...] bool, True = a real vector
    ) -> ResidualQuantized:
        """``ResidualQuantized(quantized, indices [..., Q], commitment_losses [Q], codebook_losses [Q], sums, counts)``.

        ``sums`` and ``counts`` are the statistics that the forward learned from; None in eval.
        """
        self._restore_float32()
        vectors = self._to_codebook_space(x, mask)
        learns = self._learns()
        if learns and self._needs_kmeans_start():
            self._kmeans_start(vectors.detach().reshape(-1, self.code_dim), _flat(mask), residual=True)
        n_used, used, levels = self.n_levels, None, self._levels(self._codes())
        if self.quantize_dropout and self.training:
            drawn = torch.randint(1, self.n_levels + 1, (), device="cpu")
            if torch.compiler.is_compiling():
                # No shape in a graph may depend on the drawn number. A level of zeros changes no residual and no sum.
                used = (torch.arange(self.n_levels, device="cpu") < drawn).to(levels.device)
                levels = torch.where(used[:, None, None], levels, 0)
            else:
                n_used = int(drawn)
        q = residual_quantize(
            vectors,
            levels,
            n_levels=n_used,
            metric=self.metric,
            estimator=self.estimator,
            mask=mask,
            beta=self.commitment_weight,
            statistics=learns,
            precision=self.precision,
        )
        if n_used < self.n_levels:
            q = self._pad(q, self.n_levels - n_used)
        if used is not None:
            q = self._without(q, used)
        counts = None if not learns or q.counts is None else q.counts
        self._count(
            counts.sum(dim=0) if counts is not None and self.shared_codebook else counts,
            q.indices.movedim(-1, 0),
            vectors,
        )
        if learns:
            self._learn(q, vectors.detach(), mask)
        return q._replace(quantized=self._from_codebook_space(q.quantized, mask, x.dtype))

    def encode(self, x: Tensor) -> Tensor:
        """Indices [..., Q] of all levels, as ``forward`` in eval returns them."""
        with torch.no_grad():
            levels = self._levels(self._inference_codes())
            return residual_quantize(
                self._to_codebook_space(x), levels, metric=self.metric, precision=self.precision
            ).indices

    def decode(
        self,
        indices: Tensor,  # [..., Q], or the first levels only; any integer dtype
    ) -> Tensor:
        """The vectors that ``forward`` gives for these indices; a level with -1 adds nothing.

        Their dtype is the module's: the one it was made, loaded or cast in.

        Raises:
            ValueError: an index that is neither -1 nor a code (checked on a CPU, elsewhere under FASTVQ_CHECK=1), more
                levels than Q.
            TypeError: indices that are not integers.
        """
        name = f"{self.owner}.decode"
        indices, all_real = check_ids(name, "indices", indices, -1, self.n_codes)
        if indices.dim() < 1 or indices.shape[-1] > self.n_levels:
            raise ValueError(
                f"{name}: indices must be [..., Q] with Q at most {self.n_levels} levels, got {list(indices.shape)}"
            )
        levels = self._levels(self._inference_codes())
        dtype = torch.float64 if torch.float64 in (levels.dtype, self._module_dtype) else torch.float32  # as forward
        total = torch.zeros(*indices.shape[:-1], self.code_dim, device=levels.device, dtype=dtype)
        for q in range(indices.shape[-1]):
            index = indices[..., q]
            if all_real:
                total = total + levels[q][index]
            else:
                total = total + torch.where((index >= 0)[..., None], levels[q][index.clamp(min=0)], 0)
        return self._from_codebook_space(total, None if all_real else (indices >= 0).any(dim=-1), self._module_dtype)

    def extra_repr(self) -> str:
        shared = ", shared codebook" if self.shared_codebook else ""
        return f"dim={self.dim}, n_codes={self.n_codes}, n_levels={self.n_levels}, code_dim={self.code_dim}{shared}"

    def _levels(self, codebook: Tensor) -> Tensor:  # [Q, K, c]
        return codebook.expand(self.n_levels, -1, -1) if self.shared_codebook else codebook

    def _pad(self, q: ResidualQuantized, n_missing: int) -> ResidualQuantized:
        def zeros(t: Tensor) -> Tensor:
            return torch.cat([t, t.new_zeros(n_missing, *t.shape[1:])])

        return ResidualQuantized(
            q.quantized,
            torch.cat([q.indices, q.indices.new_full((*q.indices.shape[:-1], n_missing), -1)], dim=-1),
            zeros(q.commitment_losses),
            zeros(q.codebook_losses),
            None if q.sums is None else zeros(q.sums),
            None if q.counts is None else zeros(q.counts),
        )

    def _without(
        self,
        q: ResidualQuantized,
        used: Tensor,  # [Q] bool
    ) -> ResidualQuantized:
        """Clears the results of unused levels: index -1, zeros elsewhere, as ``_pad`` does."""

        def of_used(t: Tensor) -> Tensor:
            return torch.where(used.view(-1, *[1] * (t.dim() - 1)), t, 0)

        return ResidualQuantized(
            q.quantized,
            torch.where(used, q.indices, -1),
            of_used(q.commitment_losses),
            of_used(q.codebook_losses),
            None if q.sums is None else of_used(q.sums),
            None if q.counts is None else of_used(q.counts),
        )

    def _learn(self, q: ResidualQuantized, vectors: Tensor, mask: Tensor | None) -> None:
        assert q.sums is not None and q.counts is not None
        rows, flat_mask = vectors.reshape(-1, self.code_dim), _flat(mask)
        if self.shared_codebook:
            self._record(None if self.learnable else q.sums.sum(dim=0), q.counts.sum(dim=0), rows, flat_mask)
            return
        if self.dead_code_threshold is None:
            residuals = rows.expand(self.n_levels, -1, -1)  # not read
        else:
            # The residuals that the levels quantized: Q times the memory of x, so only if dead codes may need them.
            residual, of_levels = rows.float(), []
            for codes, index in zip(self.codebook.detach(), q.indices.reshape(-1, self.n_levels).t(), strict=True):
                of_levels.append(residual)
                residual = residual - torch.where((index >= 0)[:, None], codes[index.clamp(min=0)], 0)
            residuals = torch.stack(of_levels)
        masks = None if flat_mask is None else flat_mask.expand(self.n_levels, -1)
        self._record(None if self.learnable else q.sums, q.counts, residuals, masks)


def _flat(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else mask.reshape(-1)
