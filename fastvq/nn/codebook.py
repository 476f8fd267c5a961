"""A codebook that learns: its buffers, their update, dead codes, the k-means start, several processes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastvq import _kmeans, distributed
from fastvq._checks import check_option
from fastvq.ops import ema_update_, nearest
from fastvq.ops.ema.reference import choose_rows
from fastvq.ops.nearest import METRICS, PRECISIONS
from fastvq.ops.quantize import ESTIMATORS

__all__ = ["CodeUsage", "LearnedCodebook", "update_codebooks"]

KMEANS_ITERATIONS = 10


class CodeUsage(NamedTuple):
    """How the codes were used in the last training step, over all ranks where it was synchronised."""

    perplexity: Tensor  # [...] exp of the entropy of the counts: 1 (one code) ... K (all alike)
    used: Tensor  # [...] int64, codes with at least one vector
    counts: Tensor  # [..., K] int64


class LearnedCodebook(nn.Module):
    """Buffers [*lead, K, D] of a quantizer and everything that changes them. Not a module to use by itself.

    ``lead`` is () or one dimension of heads or levels, each with a codebook of its own. The buffers are float32
    whatever the module is cast to; ``codebook`` is a parameter where ``learnable``. ``initialised`` turns true once
    k-means has run, or at once without it.
    """

    codebook: Tensor
    embed_sum: Tensor
    cluster_size: Tensor
    initialised: Tensor
    counts: Tensor
    pending_sums: Tensor
    pending_counts: Tensor
    pending_rows: Tensor

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
        precision: str,
    ) -> None:
        super().__init__()
        for name, value in (("n_codes", n_codes), ("code_dim", code_dim)):
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
        self.lead, self.n_codes, self.code_dim = lead, n_codes, code_dim
        self.decay, self.eps, self.metric, self.estimator = decay, eps, metric, estimator
        self.commitment_weight, self.learnable = commitment_weight, learnable
        self.dead_code_threshold, self.update, self.sync, self.precision = dead_code_threshold, update, sync, precision
        self.frozen = False

        start = torch.randn(*lead, n_codes, code_dim)
        if metric == "cosine":
            start = nn.functional.normalize(start, dim=-1)
        # A size that no threshold calls dead, so that the first step does not replace the whole start.
        size = max(1.0, dead_code_threshold or 0.0)
        if learnable:
            self.codebook = nn.Parameter(start)
        else:
            self.register_buffer("codebook", start)
            self.register_buffer("embed_sum", start * size)
        self.register_buffer("cluster_size", torch.full((*lead, n_codes), size))
        self.register_buffer("initialised", torch.tensor(not kmeans_init))
        self.register_buffer("counts", torch.zeros(*lead, n_codes, dtype=torch.int64), persistent=False)
        self._waits_for_kmeans = kmeans_init  # what `initialised` says, without asking the device at every forward
        self._before_update: Tensor | None = None
        if update == "manual":
            zeros = torch.zeros(*lead, n_codes, code_dim)
            self.register_buffer("pending_sums", zeros, persistent=False)
            self.register_buffer("pending_counts", torch.zeros_like(self.counts), persistent=False)
            self.register_buffer("pending_rows", torch.full_like(zeros, torch.nan), persistent=False)

    # ---- what holds float32, and what is kept

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LearnedCodebook:
        """Moves follow; a change of dtype does not reach the buffers: averages in 16 bits would stop moving."""
        held = {name: b for name, b in self._buffers.items() if b is not None and b.is_floating_point()}
        super()._apply(fn, recurse)
        for name, before in held.items():
            after = self._buffers[name]
            if after is not None and after.dtype != before.dtype:
                self._buffers[name] = before.to(after.device)
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_before_update": None}

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._waits_for_kmeans = not bool(self.initialised)

    def freeze(self, frozen: bool = True) -> None:
        """A frozen quantizer does not learn in training either: no update, no k-means, no gradient to a parameter."""
        self.frozen = frozen
        if self.learnable:
            self.codebook.requires_grad_(not frozen)

    # ---- the codebook as lookups see it

    def _codes(self) -> Tensor:
        """The codes for this forward; for the backward's sake not the tensor that the update will write to."""
        if self.learnable:
            codes = self.codebook
            return nn.functional.normalize(codes, dim=-1) if self.metric == "cosine" else codes
        if _inside_backward() and self._before_update is not None:
            return self._before_update
        if self.training and self.update == "forward" and not self.frozen:
            self._before_update = self.codebook.clone()
            return self._before_update
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
        """Takes in what a training forward found: at once, or for ``update_codebooks``."""
        spare = None if self.dead_code_threshold is None else self._candidates(rows.detach(), mask)
        if self.update == "forward":
            _step([(self, sums, counts, spare)])
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
        world, me = (distributed.world_size(), distributed.rank()) if self.sync == "auto" else (1, 0)
        slots = torch.arange(me, self.n_codes, world, device=rows.device)
        share = torch.full((self.n_codes, self.code_dim), torch.nan, device=rows.device)
        if len(rows) == 0:
            return share
        usable = torch.ones(len(rows), dtype=torch.bool, device=rows.device) if mask is None else mask
        n_slots = torch.full((), len(slots), dtype=torch.int64, device=rows.device)
        draw = torch.arange(len(slots), device=rows.device)
        chosen = choose_rows(usable, draw, n_slots, torch.rand(len(slots), device=rows.device))
        found = torch.where(usable[chosen][:, None], rows[chosen].float(), torch.nan)
        return share.index_copy(0, slots, found)

    @torch.no_grad()
    def _advance(self, sums: Tensor | None, counts: Tensor, spare: Tensor | None, uniforms: Tensor | None) -> None:
        """One step of learning, from statistics of all ranks."""
        # Without a usable vector nothing is learned, and nothing forgotten.
        any_vector = counts.sum(dim=-1, keepdim=True) > 0
        self.counts.copy_(torch.where(any_vector, counts, self.counts))
        codebook = self.codebook.detach()
        if self.learnable:
            # Sizes only: the codes follow their gradient.
            size = torch.lerp(self.cluster_size, counts.to(self.cluster_size.dtype), 1 - self.decay)
            self.cluster_size.copy_(torch.where(any_vector, size, self.cluster_size))
            embed_sum = torch.zeros_like(codebook)
        else:
            assert sums is not None
            embed_sum = self.embed_sum
            ema_update_(codebook, embed_sum, self.cluster_size, sums, counts, decay=self.decay, eps=self.eps)
            if self.metric == "cosine":
                # Not where nothing was learned: normalising again moves last bits.
                unit = nn.functional.normalize(codebook, dim=-1)
                codebook.copy_(torch.where(any_vector[..., None], unit, codebook))
        if spare is not None and uniforms is not None:
            assert self.dead_code_threshold is not None
            torch.ops.fastvq.replace_dead_codes_(
                codebook, embed_sum, self.cluster_size, spare, uniforms, self.dead_code_threshold, None
            )

    @torch.compiler.disable
    @torch.no_grad()
    def _start_from(self, rows: Tensor, mask: Tensor | None, residual: bool = False) -> None:
        """k-means on the first batch, over all ranks together; ``residual``: each level on what the last left over."""
        if mask is not None:
            rows = torch.where(mask[..., None], rows.float(), torch.nan)  # k-means leaves such vectors out
        together = self.sync == "auto" and distributed.world_size() > 1
        collective = _kmeans.Collective(distributed.all_reduce_packed, distributed.gather_rows) if together else None
        seed = torch.randint(2**31, ()).to(rows.device)
        if together:
            seed = distributed.all_reduce_packed([seed if distributed.rank() == 0 else seed * 0])[0]
        generator = torch.Generator().manual_seed(int(seed))
        codebook = self.codebook.detach()
        many = [codebook] if not self.lead else list(codebook)
        left = rows.float()
        for i, out in enumerate(many):
            vectors = left if residual or not self.lead else left[i]
            result = _kmeans.fit(
                partial(_one_batch, vectors.reshape(-1, self.code_dim)), self.n_codes, n_iter=KMEANS_ITERATIONS,
                metric="cosine" if self.metric == "cosine" else "euclidean", generator=generator, collective=collective,
            )  # fmt: skip
            out.copy_(result.codebook)
            size = result.counts.clamp(min=1).to(torch.float32)
            (self.cluster_size[i] if self.lead else self.cluster_size).copy_(size)
            if residual:
                left = left - out[nearest(left, out, metric=self.metric)]
        if not self.learnable:
            self.embed_sum.copy_(self.codebook * self.cluster_size[..., None])
        self.initialised.fill_(True)
        self._waits_for_kmeans = False

    def usage(self) -> CodeUsage:
        """How the codes were used in the last training step; costs no pass over the vectors, only over K counts."""
        counts = self.counts
        share = counts.double() / counts.sum(dim=-1, keepdim=True).clamp(min=1)
        perplexity = torch.exp(torch.special.entr(share).sum(dim=-1)).float()
        return CodeUsage(perplexity, (counts > 0).sum(dim=-1), counts.clone())


def _one_batch(rows: Tensor) -> tuple[Tensor]:
    return (rows,)


def _inside_backward() -> bool:
    """Is autograd running this forward, as activation checkpointing does to get activations back?"""
    if torch.compiler.is_compiling():  # there checkpoints are part of the graph, and recompute no side effects
        return False
    return torch._C._current_graph_task_id() != -1


# A quantizer, and what its forwards found: sums (None where it is learnable), counts, vectors for dead codes (or None).
Found = tuple[LearnedCodebook, Tensor | None, Tensor, Tensor | None]


def _step(found: list[Found]) -> None:
    """One step of learning for some quantizers: one message for all of them."""
    world, me = distributed.world_size(), distributed.rank()
    messages: list[list[Tensor | None]] = []
    for module, sums, counts, spare in found:
        uniforms = None if spare is None else torch.rand(counts.shape, device=counts.device)
        if spare is not None and uniforms is not None and module.sync == "auto" and world > 1:
            # Each rank fills its own slots, rank 0 draws for all: the sums then hold the same choice everywhere.
            slot = torch.arange(module.n_codes, device=spare.device) % world
            spare = torch.where((slot == me)[:, None], spare, 0)
            uniforms = uniforms if me == 0 else torch.zeros_like(uniforms)
        messages.append([sums, counts, spare, uniforms])
    together = [message for (module, *_), message in zip(found, messages, strict=True) if module.sync == "auto"]
    summed = iter(distributed.all_reduce_packed([t for message in together for t in message if t is not None]))
    for message in together:
        message[:] = [None if t is None else next(summed) for t in message]
    for (module, *_), (sums, number, spare, uniforms) in zip(found, messages, strict=True):
        assert number is not None
        module._advance(sums, number, spare, uniforms)


@torch.no_grad()
def update_codebooks(model: nn.Module) -> None:
    """Lets every quantizer of ``model`` with ``update="manual"`` learn from what its forwards recorded.

    Call it after ``optimizer.step()``, once for any number of micro-batches, on every rank: statistics of all
    quantizers go through one all-reduce. Quantizers in eval mode, frozen, or that recorded nothing stay as they are.
    """
    modules = [
        m
        for m in model.modules()
        if isinstance(m, LearnedCodebook) and m.update == "manual" and m.training and not m.frozen
    ]
    found: list[Found] = []
    for m in modules:
        spare = None if m.dead_code_threshold is None else m.pending_rows
        found.append((m, None if m.learnable else m.pending_sums, m.pending_counts, spare))
    _step(found)
    for m in modules:
        m.pending_sums.zero_()
        m.pending_counts.zero_()
        m.pending_rows.fill_(torch.nan)
