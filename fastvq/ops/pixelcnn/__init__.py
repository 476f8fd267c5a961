"""Sampling from a gated PixelCNN: one position a call, each computed once."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from fastvq._checks import check_backend_name, check_float, check_integer, check_sizes
from fastvq.backends import triton as triton_backend
from fastvq.ops._op import Kernel, Op, register, without_backend
from fastvq.ops._transforms import refuse_tangents
from fastvq.ops.pixelcnn import cpu, cuda, reference
from fastvq.ops.pixelcnn.call import StartCall, StepCall
from fastvq.ops.pixelcnn.contract import check_condition, check_step
from fastvq.ops.pixelcnn.state import PixelCNNState, check_ids

__all__ = ["PIXELCNN_START", "PIXELCNN_STEP", "PixelCNNState", "pixelcnn_start", "pixelcnn_step"]

OP = "fastvq.ops.pixelcnn_step"
START = "fastvq.ops.pixelcnn_start"
TRITON = "fastvq.ops.pixelcnn.triton_ops"
NO_GRADIENT = "the sampler works without gradients"


def pixelcnn_start(
    weights: Sequence[Tensor],  # [K, C], then per layer, then the head
    kernel_sizes: Sequence[int],
    shape: tuple[int, int, int],  # B, H, W
    *,
    condition: Tensor | None = None,  # [layers, B, h, w, 4C]
    backend: Literal["cpu", "triton", "cuda", "reference"] | None = None,
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
    refuse_tangents(START, NO_GRADIENT, *weights)
    check_sizes(START, "kernel_sizes", kernel_sizes)
    check_sizes(START, "shape", shape)
    if len(shape) != 3:
        raise ValueError(f"{START}: shape must be B, H, W >= 1, got {list(shape)}")
    call = StartCall([w.detach() for w in weights], list(kernel_sizes), *shape, backend)
    _check_start(call)
    if condition is not None:
        check_float(START, "condition", condition)
        refuse_tangents(START, NO_GRADIENT, condition)
        embedding = weights[0]
        check_condition(START, condition, len(kernel_sizes), shape, embedding.shape[1], embedding.device)
        condition = condition.detach().to(embedding.dtype).contiguous()
    name = PIXELCNN_START.choose(call)
    packed, cache = PIXELCNN_START.kernels[name].run(call)
    return PixelCNNState(packed, cache, condition, tuple(kernel_sizes), (call.batch, call.height, call.width), name)


def _check_start(call: StartCall) -> None:
    weights, kernel_sizes, *shape, _ = call
    if not kernel_sizes or any(k < 1 or k % 2 == 0 for k in kernel_sizes):
        raise ValueError(f"{START}: kernel_sizes must be odd, one a layer, got {list(kernel_sizes)}")
    if min(shape) < 1:
        raise ValueError(f"{START}: shape must be B, H, W >= 1, got {shape}")
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


def pixelcnn_step(
    state: PixelCNNState,
    ids: Tensor,  # [B, H, W] int64
    row: int,
    column: int,
) -> Tensor:  # [B, K]
    """Logits at one position of every image, from the ids before it in raster order, each position computed once.

    Positions come in raster order from (0, 0), every one of them: a call leaves in ``state.cache`` what later ones
    read (Ramachandran et al. 2017, "Fast Generation for Convolutional Autoregressive Models"). The call at column 0
    also computes the vertical stack for the whole row, which sees only rows above. A position may come again as long
    as its row is the last one begun, column 0 too: it gives the same logits, and so do the positions after it. That
    holds after a call that raised as well (ids outside [0, K), Ctrl-C). Starting again at (0, 0) starts anew. ids at
    the position and after it are not read. What no call has left yet is zeros: positions in another order get logits
    that are those of no network, but the same ones every time.

    float32 weights are computed in float32, and on the CPU the result does not depend on the number of threads. The
    Triton kernels take weights of two bytes too, add in float32 and keep activations in the weights' dtype; an id
    outside [0, K) is read as zeros there, and nothing waits for the device.

    Raises:
        ValueError: ids of another shape than the state's, ids outside [0, K) (checked on the CPU), a position outside.
    """
    check_ids(OP, state, ids)
    check_integer(OP, "row", row)
    check_integer(OP, "column", column)
    refuse_tangents(OP, NO_GRADIENT, *state.weights, state.cache, state.condition)
    return _pixelcnn_step(
        ids, state.weights, state.cache, state.condition, state.kernel_sizes, row, column, state.backend
    )


def _check_step(call: StepCall) -> None:
    check_step(OP, *call)


def _fake_step(call: StepCall) -> Tensor:
    embedding = call.weights[0]
    return embedding.new_empty(call.ids.shape[0], embedding.shape[0])


def _triton_prepare(call: StartCall) -> tuple[list[Tensor], Tensor]:
    packed: tuple[list[Tensor], Tensor] = importlib.import_module(TRITON).prepare(*call[:-1])
    return packed


def _why_triton_unsupported(call: StartCall) -> str | None:
    if call.weights[0].dtype == torch.float64:
        return "it computes in float32, a weight is torch.float64"
    return None


def _why_not_float32(call: StartCall) -> str | None:
    if (dtype := call.weights[0].dtype) != torch.float32:
        return f"it computes in float32, a weight is {dtype}"
    return None


# Triton before CUDA C++ for the sampler too: 2.4 times faster for 16 maps of 32 x 32 and 15 layers, 1.05 times for one,
# on an H100 (benchmarks/results/nvidia_h100_80gb_hbm3/sampling.csv).
PIXELCNN_START = Op(
    "pixelcnn_start",
    StartCall,
    {
        "cpu": Kernel(without_backend(cpu.prepare), _why_not_float32),
        "triton": Kernel(_triton_prepare, _why_triton_unsupported),
        "cuda": Kernel(without_backend(cuda.prepare), _why_not_float32),
        "reference": Kernel(without_backend(reference.prepare)),
    },
    check=_check_start,
)
PIXELCNN_STEP = Op(
    "pixelcnn_step",
    StepCall,
    {
        "cpu": Kernel(without_backend(cpu.step)),
        "triton": Kernel(without_backend(triton_backend.lazy_function(TRITON, "step"))),
        "cuda": Kernel(without_backend(cuda.step)),
        "reference": Kernel(without_backend(reference.step)),
    },
    check=_check_step,
    fake=_fake_step,
    writes=("cache",),
)
_pixelcnn_step = register(PIXELCNN_STEP)
