"""Sampling from a gated PixelCNN: one position a call, each computed once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastvq._checks import (
    check_backend_name,
    check_float,
    check_integer,
    check_option,
    check_same_device,
    check_sizes,
)
from fastvq.backends import cpu as cpu_backend
from fastvq.backends import triton as triton_backend
from fastvq.backends.registry import BACKENDS, Implementation, choose
from fastvq.ops._library import register, serialisable
from fastvq.ops.pixelcnn import cpu, cuda, reference
from fastvq.ops.pixelcnn.contract import check_condition, check_step

__all__ = ["PixelCNNState", "pixelcnn_start", "pixelcnn_step"]

OP = "fastvq.ops.pixelcnn_step"
START = "fastvq.ops.pixelcnn_start"


def _refuse_triton(weights: Sequence[Tensor], *_: Any) -> str | None:
    for w in weights:
        if (reason := triton_backend.why_unsupported(w)) is not None:
            return reason
        if w.dtype == torch.float64:
            return "it computes in float32, a weight is torch.float64"
    return None


def _prepare_triton(*arguments: Any) -> tuple[str, list[Tensor], Tensor]:
    from fastvq.ops.pixelcnn import triton_ops

    return "triton", *triton_ops.prepare(*arguments)


PREPARE = {
    "cpu": Implementation(lambda *a: ("cpu", *cpu.prepare(*a)), cpu.why_unsupported),
    "triton": Implementation(_prepare_triton, _refuse_triton),
    "cuda": Implementation(lambda *a: ("cuda", *cuda.prepare(*a)), cuda.why_unsupported),
    "reference": Implementation(lambda *a: ("reference", *reference.prepare(*a)), lambda *_: None),
}
STEP = {
    "cpu": cpu.step,
    "triton": triton_backend.lazy_function("fastvq.ops.pixelcnn.triton_ops", "step"),
    "cuda": cuda.step,
    "reference": reference.step,
}


@serialisable("ops.PixelCNNState")
class PixelCNNState(NamedTuple):
    """What ``pixelcnn_start`` makes and ``pixelcnn_step`` goes on with."""

    weights: list[Tensor]  # in the backend's own layout
    cache: Tensor  # activations that later positions read; the same size from the first position to the last
    condition: Tensor | None  # [layers, B, h, w, 4C]
    kernel_sizes: tuple[int, ...]
    shape: tuple[int, int, int]  # B, H, W
    isa: int
    backend: str


def pixelcnn_start(
    weights: Sequence[Tensor],  # [K, C], then per layer, then the head
    kernel_sizes: Sequence[int],
    shape: tuple[int, int, int],  # B, H, W
    *,
    condition: Tensor | None = None,  # [layers, B, h, w, 4C]
    backend: str | None = None,
) -> PixelCNNState:
    """Packs a gated PixelCNN's weights and makes the empty cache that ``pixelcnn_step`` works with.

    The network, with v and h the vertical and horizontal stacks, e the embedded ids, * masked convolution (square
    kernels for v, one row for h; the first layer does not see row i, respectively position j) and sums over layers l:

    .. math::
        v_l &= [l > 0]\\, v_{l-1} + gate(V_l * v_{l-1} + c^v_l), \\quad v_{-1} = h_{-1} = e \\\\
        g_l &= gate(H_l * h_{l-1} + L_l v_l + c^h_l), \\quad (r_l, s_l) = O_l g_l \\\\
        h_l &= [l > 0]\\, h_{l-1} + r_l, \\quad logits = W_2 \\, relu(W_1 \\, relu(\\textstyle\\sum_l s_l))

    with gate(a, b) = tanh(a) sigmoid(b) over the first and the last C channels.

    Args:
        weights: float tensors of one dtype: embedding [K, C]; for each layer V [2C, C, k, k], its bias [2C],
            L [2C, C, 1, 1], bias, H [2C, C, 1, k], bias, O [2C, C, 1, 1] (residual, then skip; the last layer: skip
            alone, [C, C, 1, 1]), bias; then W_1 [C, C, 1, 1], bias, W_2 [K, C, 1, 1], bias. The packed copy does not
            follow later changes.
        kernel_sizes: k of every layer, odd.
        shape: B, H, W of the id maps.
        condition: c^v (2C) and c^h (2C) of every layer and image, on a map that H and W are whole multiples of.
        backend: one of ``fastvq.build_info()["backends"]``; None takes the fastest that supports these weights.

    Raises:
        ValueError: kernel sizes, shapes or a condition that do not fit, a backend that cannot serve.
        TypeError: weights that are no floating-point tensors.
    """
    check_backend_name(START, backend)
    if isinstance(weights, Tensor) or not isinstance(weights, Sequence):
        raise TypeError(f"{START}: weights must be a sequence of tensors, got {type(weights).__name__}")
    for i, w in enumerate(weights):
        check_float(START, f"weights[{i}]", w)
    check_sizes(START, "kernel_sizes", kernel_sizes)
    check_sizes(START, "shape", shape)
    _check_shapes(weights, kernel_sizes, shape, condition)
    isa = cpu_backend.isa() if BACKENDS["cpu"].unavailable() is None else 0
    arguments = ([w.detach() for w in weights], tuple(kernel_sizes), *shape, isa)
    name, packed, cache = choose(START, PREPARE, backend, *arguments)(*arguments)
    if condition is not None:
        condition = condition.detach().to(weights[0].dtype).contiguous()
    return PixelCNNState(packed, cache, condition, tuple(kernel_sizes), shape, isa, name)


def _check_shapes(
    weights: Sequence[Tensor], kernel_sizes: Sequence[int], shape: tuple[int, int, int], condition: Tensor | None
) -> None:
    if not kernel_sizes or any(k < 1 or k % 2 == 0 for k in kernel_sizes):
        raise ValueError(f"{START}: kernel_sizes must be odd, one a layer, got {list(kernel_sizes)}")
    if len(shape) != 3 or min(shape) < 1:
        raise ValueError(f"{START}: shape must be B, H, W >= 1, got {list(shape)}")
    if not weights or weights[0].dim() != 2 or 0 in weights[0].shape:
        got = [list(w.shape) for w in weights[:1]]
        raise ValueError(f"{START}: weights[0] must be the embedding [K, C] with K, C >= 1, got {got}")
    n_codes, c = weights[0].shape
    expected: list[list[int]] = [[n_codes, c]]
    for i, k in enumerate(kernel_sizes):
        o = 2 * c if i + 1 < len(kernel_sizes) else c
        expected += [[2 * c, c, k, k], [2 * c], [2 * c, c, 1, 1], [2 * c], [2 * c, c, 1, k], [2 * c], [o, c, 1, 1], [o]]
    expected += [[c, c, 1, 1], [c], [n_codes, c, 1, 1], [n_codes]]
    got = [list(w.shape) for w in weights]
    if got != expected:
        wrong = next((i for i, (a, b) in enumerate(zip(got, expected, strict=False)) if a != b), len(expected))
        raise ValueError(
            f"{START}: weights must be {len(expected)} tensors for {len(kernel_sizes)} layers, got {len(got)}; the "
            f"first that does not fit is weights[{wrong}]; see the docstring for the order"
        )
    device, dtype = weights[0].device, weights[0].dtype
    for i, w in enumerate(weights):
        if w.device != device or w.dtype != dtype:
            raise ValueError(
                f"{START}: weights must be of one dtype on one device, got {dtype} on {device} for weights[0] and "
                f"{w.dtype} on {w.device} for weights[{i}]; convert one with .to()"
            )
    if condition is not None:
        check_float(START, "condition", condition)
        check_condition(START, condition, len(kernel_sizes), shape, c, device)


def pixelcnn_step(
    state: PixelCNNState,
    ids: Tensor,  # [B, H, W] int64
    row: int,
    column: int,
) -> Tensor:  # [B, K]
    """Logits at one position of every image, from the ids before it in raster order, each position computed once.

    Positions come in raster order from (0, 0), every one of them: a call leaves in ``state.cache`` what later ones
    read (Ramachandran et al. 2017, "Fast Generation for Convolutional Autoregressive Models"). The call at column 0
    also computes the vertical stack for the whole row, which sees only rows above. Starting again at (0, 0) starts
    anew. ids at the position and after it are not read. What no call has left yet is zeros: positions in another order
    get logits that are those of no network, but the same ones every time. The CPU kernels undo what a call did that
    raises (ids outside [0, K), Ctrl-C): the position can be computed again.

    float32 weights are computed in float32, and on the CPU the result does not depend on the number of threads. The
    Triton kernels take weights of two bytes too, add in float32 and keep activations in the weights' dtype; an id
    outside [0, K) is read as zeros there, and nothing waits for the device.

    Raises:
        ValueError: ids of another shape than the state's, ids outside [0, K) (checked on the CPU), a position outside.
    """
    check_ids(OP, state, ids)
    check_integer(OP, "row", row)
    check_integer(OP, "column", column)
    if not (0 <= row < ids.shape[1] and 0 <= column < ids.shape[2]):
        raise ValueError(f"{OP}: (row, column) must lie in {list(ids.shape[1:])}, got ({row}, {column})")
    return torch.ops.fastvq.pixelcnn_step(
        ids, state.weights, state.cache, state.condition, state.kernel_sizes, row, column, state.isa, state.backend
    )


def check_ids(op: str, state: PixelCNNState, ids: Tensor) -> None:
    if not isinstance(state, PixelCNNState):
        raise TypeError(f"{op}: state must be what pixelcnn_start returned, got {type(state).__name__}")
    if not isinstance(ids, Tensor):
        raise TypeError(f"{op}: ids must be int64 {list(state.shape)}, got {type(ids).__name__}")
    if ids.dtype != torch.int64 or tuple(ids.shape) != state.shape:
        raise ValueError(
            f"{op}: ids must be int64 {list(state.shape)}, as the state was made for, got {ids.dtype} {list(ids.shape)}"
        )
    check_same_device(op, "the state's weights", state.weights[0], "ids", ids)


def _run(
    ids: Tensor, weights: list[Tensor], cache: Tensor, condition: Tensor | None, kernel_sizes: list[int], row: int,
    column: int, isa: int, backend: str,
) -> Tensor:  # fmt: skip
    check_option(OP, "backend", backend, STEP)
    check_step(OP, ids, weights, cache, condition, kernel_sizes, row, column, backend)
    return STEP[backend](ids, weights, cache, condition, kernel_sizes, row, column, isa)


def _fake(
    ids: Tensor, weights: list[Tensor], cache: Tensor, condition: Tensor | None, kernel_sizes: list[int], row: int,
    column: int, isa: int, backend: str,
) -> Tensor:  # fmt: skip
    return weights[0].new_empty(ids.shape[0], weights[0].shape[0])


register(
    "pixelcnn_step(Tensor ids, Tensor[] weights, Tensor(a!) cache, Tensor? condition, int[] kernel_sizes, int row, "
    "int column, int isa, str backend) -> Tensor",
    _run,
    _fake,
)
