"""The sampler's positions one after another, the number of the position on the device; on a GPU from CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastvq.backends import triton as triton_backend
from fastvq.ops.pixelcnn import pixelcnn_step
from fastvq.ops.pixelcnn.state import PixelCNNState, check_ids

__all__ = ["PixelCNNSteps", "Use"]

OP = "fastvq.ops.PixelCNNSteps"
_KERNELS = "fastvq.ops.pixelcnn.triton_ops"
Use = Callable[[Tensor, Tensor], None]  # called with logits [B, K] and the position [1]


class PixelCNNSteps:
    """``pixelcnn_step`` at one position after another, each followed by ``use(logits, position)`` where wanted.

    A call of the object does the next position in raster order, from (0, 0) on. ``use`` is given the logits [B, K] and
    the position's number, row * W + column, int64 [1] on the device. It must run without waiting for the device and
    change only what lies there: with the Triton backend on a GPU, the vertical stack of a row, a position, and a
    position that is used are each captured in one CUDA graph at their second time, and replayed from then on.

    Args:
        state: of ``pixelcnn_start``.
        ids: [B, H, W] int64, contiguous; read at every position, so ``use`` writes to it in place.

    Raises:
        ValueError: ids of another shape than the state's, or not contiguous; at a call as ``pixelcnn_step``.
    """

    def __init__(self, state: PixelCNNState, ids: Tensor, use: Use) -> None:
        check_ids(OP, state, ids)
        if not ids.is_contiguous():
            raise ValueError(f"{OP}: ids must be contiguous, got strides {ids.stride()}; use .contiguous()")
        self.state, self.ids, self.use = state, ids, use
        self.position = torch.zeros(1, dtype=torch.int64, device=ids.device)
        self.n_done = 0
        self.graphs: dict[str, torch.cuda.CUDAGraph | None] = {}

    def __call__(self, wanted: bool = True) -> None:
        row, column = divmod(self.n_done, self.ids.shape[2])
        if self.state.backend != "triton":
            logits = pixelcnn_step(self.state, self.ids, row, column)
            if wanted:
                self.use(logits, self.position)
            self.position += 1
        else:
            if column == 0:
                self._run("row", self._row)
            self._run("used" if wanted else "passed", self._used if wanted else self._passed)
        self.n_done += 1

    def _arguments(self) -> tuple[object, ...]:
        s = self.state
        return self.ids, s.weights, s.cache, s.condition, s.kernel_sizes, self.position

    def _row(self) -> None:
        triton_backend.lazy_function(_KERNELS, "vertical")(*self._arguments())

    def _passed(self) -> None:
        triton_backend.lazy_function(_KERNELS, "horizontal")(*self._arguments())
        self.position += 1

    def _used(self) -> None:
        self.use(triton_backend.lazy_function(_KERNELS, "horizontal")(*self._arguments()), self.position)
        self.position += 1

    def _run(self, name: str, piece: Callable[[], None]) -> None:
        if self.ids.device.type != "cuda" or name not in self.graphs:
            # The first time compiles what a capture must not.
            self.graphs[name] = None
            piece()
            return
        with torch.cuda.device(self.ids.device):
            if (graph := self.graphs[name]) is None:
                self.graphs[name] = graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):
                    piece()
            graph.replay()
