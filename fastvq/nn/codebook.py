"""A codebook that learns: its update, dead codes, the k-means start, several processes."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastvq import _kmeans, distributed
from fastvq._checks import check_integer, check_number, check_option
from fastvq.nn._compiled_start import enrol
from fastvq.nn._learning import Found, Group, learn
from fastvq.nn._state import CodebookState
from fastvq.nn._usage import CodeUsage, count_codes, usage_of
from fastvq.ops import ema_update_, nearest
from fastvq.ops.ema.reference import choose_rows
from fastvq.ops.nearest import METRICS, PRECISIONS
from fastvq.ops.quantize import ESTIMATORS

__all__ = ["CodeUsage", "LearnedCodebook", "update_codebooks"]

KMEANS_ITERATIONS = 10


class LearnedCodebook(CodebookState):
    """Buffers [*lead, K, D] of a quantizer and everything that changes them. Not a module to use alone.

    ``lead`` is () or one dimension of heads or levels, each with its own codebook. The buffers are float32 whatever
    the module is cast to; ``codebook`` is a parameter if ``learnable``. ``initialised`` turns 1 once k-means has run,
    or at once without it.
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
        metric: str,
        estimator: str,
        commitment_weight: float,
        learnable: bool,
        kmeans_init: bool,
        dead_code_threshold: float | None,
        update: str,
        sync: str,
        group: dist.ProcessGroup | None,
        precision: str,
    ) -> None:
        for name, number in (("decay", decay), ("eps", eps), ("commitment_weight", commitment_weight)):
            check_number(owner, name, number)
        if dead_code_threshold is not None:
            check_number(owner, "dead_code_threshold", dead_code_threshold)
        for name, value in (("n_codes", n_codes), ("code_dim", code_dim)):
            check_integer(owner, name, value)
            if value < 1:
                raise ValueError(f"{owner}: {name} must be at least 1, got {value}")
        if not 0 <= decay <= 1:
            raise ValueError(f"{owner}: decay must be in [0, 1], got {decay}; 0.99 keeps 99 % of the old average")
        if dead_code_threshold is not None and not dead_code_threshold > 0:
            raise ValueError(f"{owner}: dead_code_threshold must be above 0 or None, got {dead_code_threshold}")
        check_option(owner, "metric", metric, METRICS)
        check_option(owner, "estimator", estimator, ESTIMATORS)
        check_option(owner, "update", update, ("forward", "manual"))
        check_option(owner, "sync", sync, ("auto", "none"))
        check_option(owner, "precision", precision, PRECISIONS)
        super().__init__(
            owner, lead, n_codes, code_dim, metric=metric, learnable=learnable, kmeans_init=kmeans_init,
            dead_code_threshold=dead_code_threshold, update=update,
        )  # fmt: skip
        self.decay, self.eps, self.estimator = decay, eps, estimator
        self.commitment_weight, self.sync, self.precision = commitment_weight, sync, precision
        self.group_of_ranks = Group(owner, group, sync)
        self._number = enrol(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        if "_counts" not in state:
            raise ValueError(
                f"fastvq.nn.{type(self).__name__}: a whole module that was pickled by another version cannot be read; "
                "save its state_dict() there and use load_state_dict"
            )
        super().__setstate__(state)
        self._number = enrol(self)

    # ---- the codebook as lookups see it

    def _codes(self) -> Tensor:
        """The codes of this forward: a copy if an update will write to the codebook before the backward."""
        again = _inside_backward() and self._before_update is not None
        if not self.learnable:
            if again:
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
            if again:
                assert self._before_update is not None
                with torch.no_grad():
                    codes.copy_(self._before_update)
            elif not _inside_backward():
                self._before_update = codes.detach()
        return nn.functional.normalize(codes, dim=-1) if self.metric == "cosine" else codes

    def _stored(self) -> Tensor:
        """The codes for ``encode`` and ``decode``."""
        codes = self.codebook
        if self.learnable:
            return nn.functional.normalize(codes, dim=-1) if self.metric == "cosine" else codes
        if codes.dtype != torch.float32:
            self._settle()
        return self.codebook

    def _learns(self) -> bool:
        return self.training and not self.frozen and not _inside_backward()

    def _prepare(self, vectors: Tensor) -> Tensor:
        """Vectors as they are compared: of unit length for cosine."""
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
        rows: Tensor,  # [*lead, n, D] vectors that replace dead codes
        mask: Tensor | None,  # [*lead, n] bool
    ) -> None:
        """Takes in the statistics of a training forward: at once, or for ``update_codebooks``."""
        spare = None if self.dead_code_threshold is None else self._candidates(rows.detach(), mask)
        if self.update == "forward":
            learn([(self, sums, counts, spare)])
            return
        self.pending_counts.add_(counts)
        if sums is not None:
            self.pending_sums.add_(sums)
        if spare is not None:
            self.pending_rows.copy_(torch.where(spare.isfinite(), spare, self.pending_rows))

    def _candidates(self, rows: Tensor, mask: Tensor | None) -> Tensor:
        """[*lead, K, D]: random vectors, this rank's share of K, NaN elsewhere and where there are too few."""
        if self.lead:
            masks = [None] * len(rows) if mask is None else mask
            return torch.stack([self._share(r, m) for r, m in zip(rows, masks, strict=True)])
        return self._share(rows, mask)

    def _share(self, rows: Tensor, mask: Tensor | None) -> Tensor:
        world, me = self.group_of_ranks.world, self.group_of_ranks.rank
        slots = torch.arange(me, self.n_codes, world, device=rows.device)
        share = torch.full((self.n_codes, self.code_dim), torch.nan, dtype=torch.float32, device=rows.device)
        if len(rows) == 0:
            return share
        usable = torch.ones(len(rows), dtype=torch.bool, device=rows.device) if mask is None else mask
        n_slots = torch.full((), len(slots), dtype=torch.int64, device=rows.device)
        draw = torch.arange(len(slots), device=rows.device)
        uniforms = torch.rand(len(slots), dtype=torch.float32, device=rows.device)
        chosen = choose_rows(usable, draw, n_slots, uniforms)
        found = torch.where(usable[chosen][:, None], rows[chosen].float(), torch.nan)
        return share.index_copy(0, slots, found)

    @torch.no_grad()
    def _advance(self, sums: Tensor | None, counts: Tensor, spare: Tensor | None, uniforms: Tensor | None) -> None:
        """One step of learning, from statistics of all ranks."""
        # Without a usable vector nothing is learned, and nothing forgotten.
        any_vector = counts.sum(dim=-1, keepdim=True) > 0
        self._counts.copy_(torch.where(any_vector, counts, self._counts))
        codebook, buffers = self.codebook.detach(), [self.codebook.detach(), self.cluster_size]
        if not self.learnable:
            buffers.append(self.embed_sum)
        before = None if self.frozen_mask is None else [b.clone() for b in buffers]
        if self.learnable:
            # Sizes only: the codes follow their gradient.
            size = torch.lerp(self.cluster_size, counts.to(self.cluster_size.dtype), 1 - self.decay)
            self.cluster_size.copy_(torch.where(any_vector, size, self.cluster_size))
        else:
            assert sums is not None
            ema_update_(codebook, self.embed_sum, self.cluster_size, sums, counts, decay=self.decay, eps=self.eps)
            if self.metric == "cosine":
                # Not where nothing was learned: normalising again moves last bits.
                unit = nn.functional.normalize(codebook, dim=-1)
                codebook.copy_(torch.where(any_vector[..., None], unit, codebook))
        if spare is not None and uniforms is not None:
            self._replace(codebook, spare, uniforms)
        if before is not None and self.frozen_mask is not None:
            kept = self.frozen_mask != 0
            for now, then in zip(buffers, before, strict=True):
                now.copy_(torch.where(kept if now.dim() == kept.dim() else kept[..., None], then, now))

    def _replace(self, codebook: Tensor, spare: Tensor, uniforms: Tensor) -> None:
        """Gives dead codes vectors of the batch."""
        assert self.dead_code_threshold is not None
        arguments = (self.cluster_size, spare, uniforms, self.dead_code_threshold, None)
        if not self.learnable:
            torch.ops.fastvq.replace_dead_codes_(codebook, self.embed_sum, *arguments)
            return
        # A parameter may have another dtype than the sizes; only elements that changed are written back.
        codes = codebook.float()
        replaced = codes.clone()
        torch.ops.fastvq.replace_dead_codes_(replaced, torch.zeros_like(codes), *arguments)
        codebook.copy_(torch.where(replaced == codes, codebook, replaced.to(codebook.dtype)))

    @torch.no_grad()
    def _start_from(self, rows: Tensor, mask: Tensor | None, residual: bool = False) -> None:
        """k-means on the first batch, over all ranks together; ``residual``: each level on what the last left over.

        A batch without a usable vector (on any rank, for some head or level) starts nothing: the next batch will.
        """
        embed_sum = None if self.learnable else self.embed_sum
        buffers = self.codebook.detach(), self.cluster_size, embed_sum, self.initialised
        if torch.compiler.is_compiling():
            torch.ops.fastvq.start_codebook_(*buffers, rows, mask, residual, self._number)
        elif self._fit(*buffers, rows, mask, residual):
            self._known_initialised = True

    @torch.no_grad()
    def _fit(
        self, codebook: Tensor, cluster_size: Tensor, embed_sum: Tensor | None, initialised: Tensor, rows: Tensor,
        mask: Tensor | None, residual: bool,
    ) -> bool:  # fmt: skip
        """Writes what k-means finds to the buffers given; whether it found anything."""
        if mask is not None:
            rows = torch.where(mask[..., None], rows.float(), torch.nan)  # k-means leaves such vectors out
        group = self.group_of_ranks
        together = group.world > 1
        add = partial(distributed.all_reduce_packed, group=group.group)
        join = partial(distributed.gather_rows, group=group.group)
        collective = _kmeans.Collective(add, join) if together else None
        seed = torch.randint(2**31, ()).to(rows.device)
        if together:
            seed = add([seed if group.rank == 0 else seed * 0])[0]
        generator = torch.Generator().manual_seed(int(seed))
        found: list[_kmeans.KMeans] = []
        left = rows.float()
        for i in range(self.lead[0] if self.lead else 1):
            vectors = left if residual or not self.lead else left[i]
            result = _kmeans.fit(
                partial(_one_batch, vectors.reshape(-1, self.code_dim)), self.n_codes, n_iter=KMEANS_ITERATIONS,
                metric="cosine" if self.metric == "cosine" else "euclidean", generator=generator, collective=collective,
            )  # fmt: skip
            if result is None:
                return False
            found.append(result)
            if residual:
                left = left - result.codebook[nearest(left, result.codebook, metric=self.metric)]
        codes = torch.stack([f.codebook for f in found]).view_as(codebook).float()
        sizes = torch.stack([f.counts for f in found]).view_as(cluster_size).clamp(min=1).float()
        if self.frozen_mask is not None:
            kept = self.frozen_mask != 0
            codes = torch.where(kept[..., None], codebook.float(), codes)
            sizes = torch.where(kept, cluster_size, sizes)
        codebook.copy_(codes)
        cluster_size.copy_(sizes)
        if embed_sum is not None:
            embed_sum.copy_(codebook * cluster_size[..., None])
        initialised.fill_(1)
        return True

    # ---- how codes are used

    def usage(self, *, total: bool = False, all_ranks: bool = False) -> CodeUsage:
        """How the codes were used; costs no pass over the vectors, only over K counts.

        Args:
            total: over all forwards since ``track_usage()`` or ``reset_usage()``, in training and in eval, rather than
                in the last training step.
            all_ranks: with ``total``, the counts of all ranks added up; every rank has to call it. The counts of the
                last training step are those of all ranks anyway, where the module synchronises.

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
        self._place_statistics()
        counts = self._total_counts
        if all_ranks:
            counts = distributed.all_reduce_packed([counts], self.group_of_ranks.group)[0]
        return usage_of(counts)

    def track_usage(self, on: bool = True) -> None:
        """Starts to count the codes of every forward, in training and in eval, from zero; or stops.

        Each rank counts its own vectors, so nothing is sent in eval. Counting costs one pass over the indices.
        """
        self._total_counts = torch.zeros_like(self.counts) if on else None

    def reset_usage(self) -> None:
        """Sets the counts of ``usage(total=True)`` to zero."""
        if self._total_counts is not None:
            self._total_counts.zero_()

    def _count(
        self,
        counts: Tensor | None,  # [*lead, K] of a forward that learns
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
    """Is autograd running this forward, as activation checkpointing does to get activations back?"""
    if torch.compiler.is_compiling():  # there checkpoints are part of the graph, and recompute no side effects
        return False
    return torch._C._current_graph_task_id() != -1


@torch.no_grad()
def update_codebooks(model: nn.Module) -> None:
    """Lets every quantizer of ``model`` with ``update="manual"`` learn from what its forwards recorded.

    Call it after ``optimizer.step()``, once for any number of micro-batches, on every rank: statistics of all
    quantizers go through one all-reduce (one for each process group). Quantizers in eval mode, frozen, or that
    recorded nothing stay as they are.
    """
    modules = [
        m
        for m in model.modules()
        if isinstance(m, LearnedCodebook) and m.update == "manual" and m.training and not m.frozen
    ]
    found: list[Found] = []
    for m in modules:
        m._settle()
        spare = None if m.dead_code_threshold is None else m.pending_rows
        found.append((m, None if m.learnable else m.pending_sums, m.pending_counts, spare))
    learn(found)
    for m in modules:
        m.pending_sums.zero_()
        m.pending_counts.zero_()
        m.pending_rows.fill_(torch.nan)
