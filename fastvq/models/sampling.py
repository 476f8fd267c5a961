"""Sampling ids from a PixelCNN."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Protocol

import torch
from torch import Tensor, nn

from fastvq._checks import LARGEST, check_generator, check_indices, check_integer, check_number, check_sizes
from fastvq.ops import PixelCNNState
from fastvq.ops.pixelcnn.choice import Choice, Progress, sample_ids
from fastvq.ops.pixelcnn.sampler import PositionSampler, Sampler, sampler_of

__all__ = ["Choice", "Progress", "sample", "sample_ids"]

OP = "fastvq.models.PixelCNN.sample"


class Model(Protocol):
    """The members of ``PixelCNN`` that the sampler uses."""

    n_codes: int
    n_classes: int | None
    embedding: nn.Embedding

    def sampler_state(
        self, shape: tuple[int, int, int], labels: Tensor | None, condition: Tensor | None
    ) -> PixelCNNState: ...

    def __call__(self, ids: Tensor, labels: Tensor | None, condition: Tensor | None) -> Tensor: ...


def check_labels(op: str, labels: object, batch: int, n_classes: int) -> None:
    """Raises unless labels are int64 [B], each a class of the model."""
    if not isinstance(labels, Tensor):
        raise TypeError(
            f"{op}: labels must be int64 [{batch}], one a picture, got {type(labels).__name__}; "
            "for one class, torch.full((B,), label)"
        )
    if labels.shape != (batch,) or labels.dtype != torch.int64:
        raise ValueError(f"{op}: labels must be int64 [{batch}], got {labels.dtype} {list(labels.shape)}")
    check_indices(op, "labels", labels, 0, n_classes)


def _check(
    model: Model,
    shape: tuple[int, int, int],
    labels: Tensor | None,
    known: Tensor | None,
    keep: Tensor | None,
    choice: Choice,
) -> None:
    check_sizes(OP, "shape", shape)
    if len(shape) != 3 or min(shape) < 1:
        raise ValueError(f"{OP}: shape must be (B, h, w), each >= 1, got {tuple(shape)}")
    if math.prod(map(int, shape)) > LARGEST // 8:  # bytes of the ids
        raise ValueError(f"{OP}: shape must leave the ids below 2^63 bytes, got {tuple(shape)}")
    if labels is not None and model.n_classes is not None:
        check_labels(OP, labels, shape[0], model.n_classes)
    for name, number in (("temperature", choice.temperature), ("top_p", choice.top_p)):
        if name == "temperature" or number is not None:
            check_number(OP, name, number)
    if choice.top_k is not None:
        check_integer(OP, "top_k", choice.top_k)
    if not choice.temperature >= 0:
        raise ValueError(f"{OP}: temperature must be >= 0, got {choice.temperature}")
    if choice.top_k is not None and choice.top_k < 1:
        raise ValueError(f"{OP}: top_k must be >= 1 or None, got {choice.top_k}")
    if choice.top_p is not None and not 0 < choice.top_p <= 1:
        raise ValueError(f"{OP}: top_p must lie in (0, 1] or be None, got {choice.top_p}")
    if keep is not None and known is None:
        raise ValueError(f"{OP}: keep says which positions stay as known, and known is None; pass it")
    for name, given, dtype in (("known", known, torch.int64), ("keep", keep, torch.bool)):
        if given is not None and not isinstance(given, Tensor):
            raise TypeError(f"{OP}: {name} must be {dtype} {list(shape)}, got {type(given).__name__}")
        if given is not None and (given.shape != tuple(shape) or given.dtype != dtype):
            raise ValueError(f"{OP}: {name} must be {dtype} {list(shape)}, got {given.dtype} {list(given.shape)}")
    if known is not None and keep is not None:
        kept = known[keep]
        if kept.numel() and not 0 <= int(kept.min()) <= int(kept.max()) < model.n_codes:
            raise ValueError(f"{OP}: known must hold ids in [0, {model.n_codes}) where keep is True, got others")


@torch.no_grad()
def sample(
    model: Model,
    shape: tuple[int, int, int],  # B, h, w
    labels: Tensor | None,  # [B]
    condition: Tensor | None,  # [B, condition_channels, h / s, w / s]
    known: Tensor | None,  # [B, h, w] int64
    keep: Tensor | None,  # [B, h, w] bool
    choice: Choice,
    generator: torch.Generator | None,
    cached: bool,
    progress: bool | Progress,
) -> Tensor:  # [B, h, w] int64
    """See ``PixelCNN.sample``."""
    _check(model, shape, labels, known, keep, choice)
    check_generator(OP, generator)
    if not isinstance(progress, bool) and not callable(progress):
        raise TypeError(f"{OP}: progress must be a bool or a function of (done, total), got {type(progress).__name__}")
    shape = (shape[0], shape[1], shape[2])
    device = model.embedding.weight.device
    uniforms = torch.rand(shape, generator=generator, dtype=torch.float64, device=device)
    ids = torch.zeros(shape, dtype=torch.int64, device=device)
    if known is not None and keep is not None:
        ids = torch.where(keep.to(device), known.to(device), ids).contiguous()
    # [B, h, w] bool: True where an id is sampled
    mask = torch.ones(shape, dtype=torch.bool, device=device) if keep is None else ~keep.to(device).contiguous()

    sampler: Sampler
    if cached:
        sampler = sampler_of(model.sampler_state(shape, labels, condition))
    else:
        sampler = PositionSampler(partial(_Recomputed, model, labels, condition))
    with torch.autocast(device.type, enabled=False), _bar(progress) as follow:
        sampler.run(ids, uniforms, mask, choice, follow)
    return ids


class _Recomputed:
    """As ``PixelCNNSteps``, with the whole network at every position that is used."""

    def __init__(
        self,
        model: Model,
        labels: Tensor | None,
        condition: Tensor | None,
        ids: Tensor,
        use: Callable[[Tensor, Tensor], None],
    ) -> None:
        self.logits, self.ids, self.use = partial(model, ids, labels, condition), ids, use
        self.n_done = 0

    def __call__(self, wanted: bool = True) -> None:
        if wanted:
            row, column = divmod(self.n_done, self.ids.shape[2])
            self.use(self.logits()[:, :, row, column], torch.tensor([self.n_done], device=self.ids.device))
        self.n_done += 1


@contextmanager
def _bar(progress: bool | Progress) -> Iterator[Progress | None]:
    """Yields the function of (done, total) that a sampler calls, or None."""
    if not progress or callable(progress):
        yield progress or None
        return
    try:
        from rich.console import Console
        from rich.progress import Progress as Bar
    except ImportError:
        raise ImportError(f"{OP}: progress=True needs the package rich; install it or pass progress=False") from None
    with Bar(console=Console(stderr=True)) as bar:
        task = bar.add_task("sampling", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
