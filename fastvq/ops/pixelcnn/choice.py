"""The choice of an id from logits, in torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Choice", "Progress", "sample_ids"]

# Called with (positions done, positions in all) while a map is drawn. An exception that it raises ends the drawing.
Progress = Callable[[int, int], object]


class Choice(NamedTuple):
    """How an id is chosen from logits; the arguments of ``PixelCNN.sample``."""

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None


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
