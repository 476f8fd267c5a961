"""A codebook that learns: its update, replacement of dead codes, the k-means start, several processes."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastvq import _kmeans, distributed
from fastvq._checks import check_integer, check_number, check_option, check_weight
from fastvq._options import Estimator, Metric, Precision
from fastvq.nn._compiled_start import number_module
from fastvq.nn._learning import Group, QuantizerStatistics, learn
from fastvq.nn._state import CodebookState
from fastvq.nn._usage import CodeUsage, count_codes, usage_of
from fastvq.ops import ema_update_, nearest
from fastvq.ops.nearest import METRICS, PRECISIONS
from fastvq.ops.quantize import ESTIMATORS
from fastvq.ops.statistics.common import choose_rows

__all__ = ["CodeUsage", "LearnedCodebook", "update_codebooks"]

KMEANS_ITERATIONS = 10


class LearnedCodebook(CodebookState):
    """Buffers [*lead, K, D] of a quantizer, and how they learn. A base class, not a module to use alone.

    ``lead`` is () or one dimension of heads or levels, each with its own codebook. The buffers stay float32 when
    the module is cast. ``codebook`` is a parameter if ``learnable``. ``initialised`` becomes 1 when k-means has run; it
    is 1 from the start without ``kmeans_init``.
    """

    def __init__(
        self,
        owner: str,
        lead: tuple[int, ...],
        n_codes: int,
        code_dim: int,
        *,
        decay: float,
        eps: float,
        metric: Metric,
        estimator: Estimator,
        commitment_weight: float,
        learnable: bool,
        kmeans_init: bool,
        dead_code_threshold: float | None,
        update: str,
        sync: str,
        group: dist.ProcessGroup | None,
        precision: Precision,
    ) -> None:
        for name, number in (("decay", decay), ("eps", eps)):
            check_number(owner, name, number)
        check_weight(owner, "commitment_weight", commitment_weight)
        if dead_code_threshold is not None:
            check_number(owner, "dead_code_threshold", dead_code_threshold)
        for name, value in (("n_codes", n_codes), ("code_dim", code_dim)):
            check_integer(owner, name, value)
            if value < 1:
                raise ValueError(f"{owner}: {name} must be at least 1, got {value}")
        if not 0 <= decay <= 1:
            raise ValueError(f"{owner}: decay must be in [0, 1], got {decay}; 0.99 keeps 99 % of the old average")
        if not eps >= 0:
            raise ValueError(f"{owner}: eps must be 0 or more, got {eps}")
        if dead_code_threshold is not None and not dead_code_threshold > 0:
            raise ValueError(f"{owner}: dead_code_threshold must be above 0 or None, got {dead_code_threshold}")
        check_option(owner, "metric", metric, METRICS)
        check_option(owner, "estimator", estimator, ESTIMATORS)
        check_option(owner, "update", update, ("forward", "manual"))
        check_option(owner, "sync", sync, ("auto", "none"))
        check_option(owner, "precision", precision, PRECISIONS)
        super().__init__(
            owner,
            lead,
            n_codes,
            code_dim,
            metric=metric,
            learnable=learnable,
            kmeans_init=kmeans_init,
            dead_code_threshold=dead_code_threshold,
            update=update,
        )
        self.decay, self.eps, self.estimator = decay, eps, estimator
        self.commitment_weight, self.sync, self.precision = commitment_weight, sync, precision
        self.group_of_ranks = Group(owner, group, sync)
        self._number = number_module(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        if not {"_counts", "_last_read"} <= state.keys():
            raise ValueError(
                f"fastvq.nn.{type(self).__name__}: a whole module that was pickled by another version cannot be read; "
                "save its state_dict() there and use load_state_dict"
            )
        super().__setstate__(state)
        self._number = number_module(self)

    # ---- the codes that a lookup uses

    def _codes(self) -> Tensor:
        """The codes of this forward. A copy if this forward updates the codebook in place, so that backward sees
        the old values."""
        recomputed = _inside_backward() and self._before_update is not None
        if not self.learnable:
            if recomputed:
                assert self._before_update is not None
                return self._before_update
            if self.training and self.update == "forward" and not self.frozen:
                self._before_update = self.codebook.clone()
                return self._before_update
            return self.codebook
        codes = self.codebook
        if self.frozen_mask is not None:
            codes = torch.where(self.frozen_mask[..., None] != 0, codes.detach(), codes)
        if self.training and self.update == "forward" and not self.frozen and self.dead_code_threshold is not None:
            codes = codes.clone()
            if recomputed:
                assert self._before_update is not None
                with torch.no_grad():
                    codes.copy_(self._before_update)
            elif not _inside_backward():
                self._before_update = codes.detach()
        return nn.functional.normalize(codes, dim=-1) if self.metric == "cosine" else codes

    def _inference_codes(self) -> Tensor:
        """The codes for ``encode`` and ``decode``."""
        codes = self.codebook
        if self.learnable:
            return nn.functional.normalize(codes, dim=-1) if self.metric == "cosine" else codes
        if codes.dtype != torch.float32:
            self._restore_float32()
        return self.codebook

    def _learns(self) -> bool:
        return self.training and not self.frozen and not _inside_backward()

    def _prepare(self, vectors: Tensor) -> Tensor:
        """The vectors that are looked up: scaled to unit length for cosine."""
        if self.metric != "cosine":
            return vectors
        wide = vectors if vectors.dtype == torch.float64 else vectors.float()
        return nn.functional.normalize(wide, dim=-1)

    # ---- learning

    @torch.no_grad()
    def _record(
        self,
        sums: Tensor | None,  # [*lead, K, D]
        counts: Tensor,  # [*lead, K]
        rows: Tensor,  # [*lead, n, D] the vectors; some replace dead codes
        mask: Tensor | None,  # [*lead, n] bool
    ) -> None:
        """Learns from the statistics of a training forward at once, or stores them for ``update_codebooks``."""
        replacements = None if self.dead_code_threshold is None else self._replacements(rows.detach(), mask)
        if self.update == "forward":
            learn([(self, sums, counts, replacements)])
            return
        self.pending_counts.add_(counts)
        if sums is not None:
            self.pending_sums.add_(sums)
        if replacements is not None:
            self.pending_rows.copy_(torch.where(replacements.isfinite(), replacements, self.pending_rows))

    def _replacements(self, rows: Tensor, mask: Tensor | None) -> Tensor:
        """[*lead, K, D]: random rows for dead codes. Slots of other ranks, and slots without a usable row, are NaN."""
        if self.lead:
            masks = [None] * len(rows) if mask is None else mask
            return torch.stack([self._replacements_of_head(r, m) for r, m in zip(rows, masks, strict=True)])
        return self._replacements_of_head(rows, mask)

    def _replacements_of_head(self, rows: Tensor, mask: Tensor | None) -> Tensor:
        world, me = self.group_of_ranks.world, self.group_of_ranks.rank
        slots = torch.arange(me, self.n_codes, world, device=rows.device)
        replacements = torch.full((self.n_codes, self.code_dim), torch.nan, dtype=torch.float32, device=rows.device)
        if len(rows) == 0:
            return replacements
        usable = torch.ones(len(rows), dtype=torch.bool, device=rows.device) if mask is None else mask
        n_slots = torch.full((), len(slots), dtype=torch.int64, device=rows.device)
        draw = torch.arange(len(slots), device=rows.device)
        uniforms = torch.rand(len(slots), dtype=torch.float32, device=rows.device)
        chosen = choose_rows(usable, draw, n_slots, uniforms)
        rows_or_nan = torch.where(usable[chosen][:, None], rows[chosen].float(), torch.nan)
        return replacements.index_copy(0, slots, rows_or_nan)

    @torch.no_grad()
    def _learning_step(
        self, sums: Tensor | None, counts: Tensor, replacements: Tensor | None, uniforms: Tensor | None
    ) -> None:
        """One learning step, from the statistics of all ranks."""
        # Without a usable vector the averages do not decay.
        any_vector = counts.sum(dim=-1, keepdim=True) > 0
        self._counts.copy_(torch.where(any_vector, counts, self._counts))
        codebook, buffers = self.codebook.detach(), [self.codebook.detach(), self.cluster_size]
        if not self.learnable:
            buffers.append(self.embed_sum)
        old_values = None if self.frozen_mask is None else [b.clone() for b in buffers]
        if self.learnable:
            # Only the sizes: the optimizer updates the codes.
            size = torch.lerp(self.cluster_size, counts.to(self.cluster_size.dtype), 1 - self.decay)
            self.cluster_size.copy_(torch.where(any_vector, size, self.cluster_size))
        else:
            assert sums is not None
            ema_update_(codebook, self.embed_sum, self.cluster_size, sums, counts, decay=self.decay, eps=self.eps)
            if self.metric == "cosine":
                # Codes that did not learn keep their bits; normalising them again would change the last ones.
                unit = nn.functional.normalize(codebook, dim=-1)
                codebook.copy_(torch.where(any_vector[..., None], unit, codebook))
        if replacements is not None and uniforms is not None:
            self._replace_dead(codebook, replacements, uniforms)
        if old_values is not None and self.frozen_mask is not None:
            frozen = self.frozen_mask != 0
            for buffer, old in zip(buffers, old_values, strict=True):
                buffer.copy_(torch.where(frozen if buffer.dim() == frozen.dim() else frozen[..., None], old, buffer))

    def _replace_dead(self, codebook: Tensor, replacements: Tensor, uniforms: Tensor) -> None:
        """Replaces dead codes by rows of the batch."""
        assert self.dead_code_threshold is not None
        arguments = (self.cluster_size, replacements, uniforms, self.dead_code_threshold, None)
        if not self.learnable:
            torch.ops.fastvq.replace_dead_codes_(codebook, self.embed_sum, *arguments)
            return
        # The parameter may have another dtype than float32: write back only the elements that changed.
        codes = codebook.float()
        replaced = codes.clone()
        torch.ops.fastvq.replace_dead_codes_(replaced, torch.zeros_like(codes), *arguments)
        codebook.copy_(torch.where(replaced == codes, codebook, replaced.to(codebook.dtype)))

    @torch.no_grad()
    def _kmeans_start(self, rows: Tensor, mask: Tensor | None, residual: bool = False) -> None:
        """Starts the codebook by k-means on the first batch of all ranks. ``residual``: each level on the residuals of
        the levels before.

        If no rank has a usable vector for some head or level, this batch starts nothing and the next one will.
        """
        embed_sum = None if self.learnable else self.embed_sum
        buffers = self.codebook.detach(), self.cluster_size, embed_sum, self.initialised
        if torch.compiler.is_compiling():
            torch.ops.fastvq.start_codebook_(*buffers, rows, mask, residual, self._number)
        elif self._fit_kmeans(*buffers, rows, mask, residual):
            self._known_initialised = True

    @torch.no_grad()
    def _fit_kmeans(
        self,
        codebook: Tensor,
        cluster_size: Tensor,
        embed_sum: Tensor | None,
        initialised: Tensor,
        rows: Tensor,
        mask: Tensor | None,
        residual: bool,
    ) -> bool:
        """Runs k-means and writes its result to the buffers. Returns False if some head has no usable vector."""
        if mask is not None:
            rows = torch.where(mask[..., None], rows.float(), torch.nan)  # k-means skips vectors with NaN
        group = self.group_of_ranks
        together = group.world > 1
        add = partial(distributed.all_reduce_packed, group=group.group)
        join = partial(distributed.gather_rows, group=group.group)
        collective = _kmeans.Collective(add, join) if together else None
        seed = torch.randint(2**31, ()).to(rows.device)
        if together:
            seed = add([seed if group.rank == 0 else seed * 0])[0]
        generator = torch.Generator().manual_seed(int(seed))
        results: list[_kmeans.KMeans] = []
        rest = rows.float()
        for i in range(self.lead[0] if self.lead else 1):
            vectors = rest if residual or not self.lead else rest[i]
            result = _kmeans.fit(
                partial(_one_batch, vectors.reshape(-1, self.code_dim)),
                self.n_codes,
                n_iter=KMEANS_ITERATIONS,
                metric="cosine" if self.metric == "cosine" else "euclidean",
                generator=generator,
                collective=collective,
            )
            if result is None:
                return False
            results.append(result)
            if residual:
                rest = rest - result.codebook[nearest(rest, result.codebook, metric=self.metric)]
        codes = torch.stack([r.codebook for r in results]).view_as(codebook).float()
        sizes = torch.stack([r.counts for r in results]).view_as(cluster_size).clamp(min=1).float()
        if self.frozen_mask is not None:
            frozen = self.frozen_mask != 0
            codes = torch.where(frozen[..., None], codebook.float(), codes)
            sizes = torch.where(frozen, cluster_size, sizes)
        codebook.copy_(codes)
        cluster_size.copy_(sizes)
        if embed_sum is not None:
            embed_sum.copy_(codebook * cluster_size[..., None])
        initialised.fill_(1)
        return True

    # ---- use of the codes

    def usage(self, *, total: bool = False, all_ranks: bool = False) -> CodeUsage:
        """The use of the codes. Costs a pass over K counts, not over the vectors.

        Args:
            total: count all forwards since ``track_usage()`` or ``reset_usage()``, in training and in eval, instead of
                the last training step.
            all_ranks: with ``total``, add up the counts of all ranks; every rank must call it. The counts of the last
                training step are those of all ranks already, if the module synchronises.

        Raises:
            ValueError: ``total`` without ``track_usage()`` before, ``all_ranks`` without ``total``.
        """
        name = f"{self.owner}.usage"
        if not total:
            if all_ranks:
                raise ValueError(f"{name}: all_ranks needs total=True; a training step's counts are summed already")
            return usage_of(self.counts)
        if self._total_counts is None:
            raise ValueError(f"{name}: total=True needs counts; call track_usage() before the forwards to be counted")
        self._move_statistics()
        counts = self._total_counts
        if all_ranks:
            counts = distributed.all_reduce_packed([counts], self.group_of_ranks.group)[0]
        return usage_of(counts)

    def track_usage(self, on: bool = True) -> None:
        """Starts counting the codes of every forward, in training and in eval, from zero; ``on=False`` stops it.

        Each rank counts its own vectors, so nothing is sent in eval. Counting costs one pass over the indices.
        """
        self._total_counts = torch.zeros_like(self.counts) if on else None

    def reset_usage(self) -> None:
        """Sets the counts of ``usage(total=True)`` to zero."""
        if self._total_counts is not None:
            self._total_counts.zero_()

    def _count(
        self,
        counts: Tensor | None,  # [*lead, K], known if the forward learns
        indices: Tensor,  # [*lead, ...] int64
        vectors: Tensor,  # [*lead, ..., D], or [..., D] for all levels
    ) -> None:
        if self._total_counts is None or _inside_backward():
            return
        with torch.no_grad():  # not around the whole: an exported graph cannot hold such a region with nothing in it
            if counts is None:
                usable = vectors.isfinite().all(dim=-1)
                if self.lead:
                    counts = count_codes(indices, usable.expand(indices.shape), self.n_codes)
                else:
                    counts = count_codes(indices[None], usable.expand(indices.shape)[None], self.n_codes)[0]
            self._total_counts.add_(counts)


def _one_batch(rows: Tensor) -> tuple[Tensor]:
    return (rows,)


def _inside_backward() -> bool:
    """Whether this forward runs inside a backward, as activation checkpointing does to recompute activations."""
    if torch.compiler.is_compiling():  # checkpoints are part of the graph then, and side effects do not run again
        return False
    return torch._C._current_graph_task_id() != -1


@torch.no_grad()
def update_codebooks(model: nn.Module) -> None:
    """Makes every quantizer of ``model`` with ``update="manual"`` learn from the statistics of its forwards.

    Call it after ``optimizer.step()``, once for any number of micro-batches, on every rank. The statistics of all
    quantizers go through one all-reduce (one for each process group). Quantizers that are in eval mode, frozen, or have
    no statistics do not change.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"fastvq.nn.update_codebooks: model must be a torch.nn.Module, got {type(model).__name__}")
    modules = [
        m
        for m in model.modules()
        if isinstance(m, LearnedCodebook) and m.update == "manual" and m.training and not m.frozen
    ]
    statistics: list[QuantizerStatistics] = []
    for m in modules:
        m._restore_float32()
        rows = None if m.dead_code_threshold is None else m.pending_rows
        statistics.append((m, None if m.learnable else m.pending_sums, m.pending_counts, rows))
    learn(statistics)
    for m in modules:
        m.pending_sums.zero_()
        m.pending_counts.zero_()
        m.pending_rows.fill_(torch.nan)
