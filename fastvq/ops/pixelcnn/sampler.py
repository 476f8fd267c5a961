"""The samplers of the backends, which draw the ids of whole maps."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from fastvq.backends import triton as triton_backend
from fastvq.ops.pixelcnn import cuda
from fastvq.ops.pixelcnn.choice import Choice, Progress, sample_ids
from fastvq.ops.pixelcnn.common import WIDEST_CHOICE
from fastvq.ops.pixelcnn.contract import check_map, positions_to_draw
from fastvq.ops.pixelcnn.replay import PixelCNNSteps, Use
from fastvq.ops.pixelcnn.state import PixelCNNState

__all__ = ["PositionSampler", "Sampler", "sampler_of"]

# Makes an object whose calls compute one position after another, as PixelCNNSteps of a state.
Steps = Callable[[Tensor, Use], Callable[[bool], None]]


class Sampler(Protocol):
    """Draws the ids of a map, position by position in raster order, each from the ids before it."""

    def run(
        self,
        ids: Tensor,  # [B, H, W] int64, contiguous; changed
        uniforms: Tensor,  # [B, H, W] float64, contiguous
        mask: Tensor,  # [B, H, W] bool, contiguous: True where an id is drawn, False where it stays
        choice: Choice,
        progress: Progress | None = None,
    ) -> None:
        """Draws ``ids`` as ``sample_ids`` does from the logits of each position.

        Nothing is random here: the uniforms come with the call, so equal uniforms give equal ids in any batch. It ends
        at the last position where an image draws. An exception that ``progress`` raises ends it earlier.

        Raises:
            ValueError: tensors of other shapes, dtypes or devices, or not contiguous.
        """


def sampler_of(state: PixelCNNState) -> Sampler:
    """The sampler of the backend that ``state`` was made for. It begins at the first position, and serves one run."""
    if state.backend == "cuda":
        return cuda.Sampler(state)
    if state.backend == "triton" and state.weights[0].shape[0] <= WIDEST_CHOICE:
        return TritonSampler(partial(PixelCNNSteps, state))
    return PositionSampler(partial(PixelCNNSteps, state))


class PositionSampler:
    """Computes the logits of one position after another, and chooses the ids in torch."""

    def __init__(self, steps: Steps) -> None:
        self.steps = steps

    def run(
        self, ids: Tensor, uniforms: Tensor, mask: Tensor, choice: Choice, progress: Progress | None = None
    ) -> None:
        check_map(ids, uniforms, mask)
        step = self.steps(ids, lambda logits, position: self.draw(logits, position, ids, uniforms, mask, choice))
        to_draw = positions_to_draw(mask)
        for done, is_drawn in enumerate(to_draw, 1):
            step(is_drawn)
            if progress is not None:
                progress(done, len(to_draw))

    def draw(
        self,
        logits: Tensor,  # [B, K]
        position: Tensor,  # [1] int64
        ids: Tensor,
        uniforms: Tensor,
        mask: Tensor,
        choice: Choice,
    ) -> None:
        u, here, current = (t.flatten(1).index_select(1, position)[:, 0] for t in (uniforms, mask, ids))
        new = torch.where(here, sample_ids(logits, u, choice), current)
        ids.flatten(1).index_copy_(1, position, new[:, None])


class TritonSampler(PositionSampler):
    """Chooses the ids in one launch, which a CUDA graph holds with the launches of its position."""

    def draw(
        self, logits: Tensor, position: Tensor, ids: Tensor, uniforms: Tensor, mask: Tensor, choice: Choice
    ) -> None:
        launch = triton_backend.lazy_function("fastvq.ops.pixelcnn.triton_choice", "sample_ids")
        launch(logits, uniforms, mask, ids, position, *choice)
