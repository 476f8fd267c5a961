"""Sampling ids from a PixelCNN."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from fastvq._checks import check_generator, check_indices, check_integer, check_number, check_sizes
from fastvq.backends import triton as triton_backend
from fastvq.ops import DRAWING_BACKENDS, PixelCNNState, PixelCNNSteps, pixelcnn_draw_
from fastvq.ops.pixelcnn.replay import WIDEST_CHOICE

__all__ = ["Choice", "Progress", "sample", "sample_ids"]

OP = "fastvq.models.PixelCNN.sample"
_CHOICE = "fastvq.ops.pixelcnn.triton_choice"


# Called with (positions done, positions in all) while a map is drawn. An exception that it raises ends the drawing.
Progress = Callable[[int, int], object]


class Choice(NamedTuple):
    """How an id is chosen from logits; the arguments of ``PixelCNN.sample``."""

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None


class Model(Protocol):
    """The members of ``PixelCNN`` that the sampler uses."""

    n_codes: int
    n_classes: int | None
    embedding: nn.Embedding

    def sampler_state(
        self, shape: tuple[int, int, int], labels: Tensor | None, condition: Tensor | None
    ) -> PixelCNNState: ...

    def __call__(self, ids: Tensor, labels: Tensor | None, condition: Tensor | None) -> Tensor: ...


def sample_ids(
    logits: Tensor,  # [B, K]
    uniforms: Tensor,  # [B] float64
    choice: Choice,
) -> Tensor:  # [B] int64
    """The first id whose cumulative probability exceeds u times the total, in float64.

    Ids that ``top_k`` and ``top_p`` exclude get probability zero and are never chosen.
    """
    if choice.temperature == 0:
        return logits.argmax(dim=1)
    probabilities = torch.softmax(logits.double() / choice.temperature, dim=1)
    if choice.top_k is not None or choice.top_p is not None:
        ordered, order = probabilities.sort(dim=1, descending=True, stable=True)
        if choice.top_k is not None:
            ordered[:, choice.top_k :] = 0
        if choice.top_p is not None:
            preceding = ordered.cumsum(1) - ordered  # total of the likelier ids
            ordered = torch.where(preceding < choice.top_p * ordered.sum(1, keepdim=True), ordered, 0)
        probabilities = torch.zeros_like(probabilities).scatter_(1, order, ordered)
    cumulative = probabilities.cumsum(1)
    total = cumulative[:, -1:]
    # Keep the threshold below the total: rounding must not pick an id after the last one with positive probability.
    threshold = torch.minimum(uniforms[:, None] * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(cumulative, threshold, right=True)[:, 0]


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
    model: Model, shape: tuple[int, int, int], labels: Tensor | None, known: Tensor | None, keep: Tensor | None,
    choice: Choice,
) -> None:  # fmt: skip
    check_sizes(OP, "shape", shape)
    if len(shape) != 3 or min(shape) < 1:
        raise ValueError(f"{OP}: shape must be (B, h, w), each >= 1, got {tuple(shape)}")
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
    any_mask = mask.any(0).cpu()  # [h, w]: positions where at least one image needs an id
    last = int(any_mask.flatten().nonzero().max()) if any_mask.any() else -1

    with torch.autocast(device.type, enabled=False), _bar(last + 1, progress) as advance:

        def draw(
            logits: Tensor,  # [B, K]
            position: Tensor,  # [1]
        ) -> None:
            u, here, current = (t.flatten(1).index_select(1, position)[:, 0] for t in (uniforms, mask, ids))
            new = torch.where(here, sample_ids(logits, u, choice), current)
            ids.flatten(1).index_copy_(1, position, new[:, None])

        def draw_in_one_launch(logits: Tensor, position: Tensor) -> None:
            triton_backend.lazy_function(_CHOICE, "choose_")(logits, uniforms, mask, ids, position, *choice)

        state = model.sampler_state(shape, labels, condition) if cached else None
        if state is not None and state.backend in DRAWING_BACKENDS:
            per_launch = shape[2] if progress else max(last + 1, 1)  # a progress bar advances after each launch
            for at in range(0, last + 1, per_launch):
                count = min(per_launch, last + 1 - at)
                pixelcnn_draw_(state, ids, uniforms, mask, at, count, **choice._asdict())
                if progress:
                    ids[0, 0, 0].item()  # waits for the launch
                advance(count)
            return ids
        step = None
        if state is not None:
            one_launch = state.backend == "triton" and model.n_codes <= WIDEST_CHOICE
            step = PixelCNNSteps(state, ids, draw_in_one_launch if one_launch else draw)
        for at, is_drawn in enumerate(any_mask.flatten()[: last + 1].tolist()):
            if step is not None:
                step(is_drawn)
            elif is_drawn:
                i, j = divmod(at, shape[2])
                draw(model(ids, labels, condition)[:, :, i, j], torch.tensor([at], device=device))
            advance()
    return ids


@contextmanager
def _bar(total: int, progress: bool | Progress) -> Iterator[Callable[..., object]]:
    """Yields ``advance(n=1)``, which a loop calls after n more positions."""
    if not progress:
        yield lambda n=1: None
        return
    if callable(progress):
        done = 0

        def advance(n: int = 1) -> None:
            nonlocal done
            done += n
            progress(done, total)

        yield advance
        return
    try:
        from rich.console import Console
        from rich.progress import Progress
    except ImportError:
        raise ImportError(f"{OP}: progress=True needs the package rich; install it or pass progress=False") from None
    with Progress(console=Console(stderr=True)) as bar:
        task = bar.add_task("sampling", total=total)
        yield lambda n=1: bar.advance(task, n)
