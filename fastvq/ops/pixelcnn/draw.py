"""Ids of many positions of the sampler, by a kernel that draws them itself."""

from __future__ import annotations

import torch
from torch import Tensor

from fastvq.ops.pixelcnn import PixelCNNState, check_ids, cuda

__all__ = ["DRAWING_BACKENDS", "pixelcnn_draw_"]

OP = "fastvq.ops.pixelcnn_draw_"
DRAWING_BACKENDS = ("cuda",)  # of the others a caller draws from the logits of each position


def pixelcnn_draw_(
    state: PixelCNNState,
    ids: Tensor,  # [B, H, W] int64, contiguous; changed
    uniforms: Tensor,  # [B, H, W] float64, contiguous
    wanted: Tensor,  # [B, H, W] bool, contiguous
    first: int = 0,
    count: int | None = None,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
) -> None:
    """Draws the ids of ``count`` positions from ``first`` on, in raster order, each from those before it: one launch.

    At a position, with the logits l of ``pixelcnn_step`` and w_k = exp(l_k / T - max l / T),

    .. math::
        id = \\min \\{k : w_k > 0,\\ w_0 + .. + w_k > u \\textstyle\\sum_j w_j\\}

    in float64; T = 0: the lowest id of the largest logit. ``top_k`` leaves the k largest w (ties: lower ids first), and
    then ``top_p`` each before which, largest first, less than p of the sum lies; other w become 0. Where a logit is
    NaN the id is 0. An image whose ``wanted`` is False at a position keeps the id that it has there. Nothing is random
    here: u comes with the call, and sums have one order, so equal uniforms give equal ids in any batch. Nothing waits
    for the device.

    Calls go on where the last one ended, as those of ``pixelcnn_step``; ``count`` None goes to the end of the map.

    Raises:
        ValueError: tensors that do not fit the state, positions outside the map, a backend that has no such kernel.
    """
    check_ids(OP, state, ids)
    for name, given, dtype in (
        ("ids", ids, torch.int64), ("uniforms", uniforms, torch.float64), ("wanted", wanted, torch.bool),
    ):  # fmt: skip
        if given.shape != ids.shape or given.dtype != dtype or given.device != ids.device or not given.is_contiguous():
            raise ValueError(
                f"{OP}: {name} must be {dtype} {list(ids.shape)}, contiguous, on {ids.device}, got {given.dtype} "
                f"{list(given.shape)} with strides {list(given.stride())} on {given.device}"
            )
    n = ids[0].numel()
    count = n - first if count is None else count
    if not (0 <= first <= n and 0 <= count <= n - first):
        raise ValueError(f"{OP}: positions must lie in 0 .. {n}, got {count} from {first} on")
    if state.backend not in DRAWING_BACKENDS:
        raise ValueError(
            f"{OP}: state must be of a backend that draws ids itself, {' or '.join(DRAWING_BACKENDS)}, got "
            f"{state.backend}; draw from the logits of fastvq.ops.PixelCNNSteps"
        )
    cuda.draw(
        ids, state.weights, state.cache, state.condition, state.kernel_sizes, uniforms, wanted, first, count,
        temperature, top_k, top_p,
    )  # fmt: skip
