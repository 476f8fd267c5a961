"""The launches that ``triton_offline`` compiles: every launcher, at least once for each tile and dtype."""

from collections.abc import Callable
from unittest import mock

import torch

from fastvq.ops.masked_conv import triton_ops as conv
from fastvq.ops.nearest import triton_ops as lookup
from fastvq.ops.pixelcnn import triton_ops as pixelcnn
from fastvq.ops.pixelcnn.triton_choice import sample_ids
from fastvq.ops.residual import triton_ops as residual
from fastvq.ops.residual.call import ResidualBackwardCall, ResidualCall
from tests.support import triton_calls_learning

CALLS: dict[str, Callable[[], object]] = {}

# Kernels that must use the tensor cores, in every tile and dtype of theirs that CALLS launches.
TENSOR_CORES: set[str] = {"_filter", "_collect_candidates", "_levels"}

# Calls that differ from one above in how many vectors or images there are, and so must not compile anything.
REPEATS: dict[str, Callable[[], object]] = {}


def masked_conv(
    dtype: torch.dtype, channels: int, *, mask: str = "B", c_in: int | None = None, side: int = 16, batch: int = 2
) -> Callable[[], object]:
    """Forward, and the gradients to x and to the weight."""

    def call():
        x = torch.empty(batch, c_in or channels, side, side, dtype=dtype, memory_format=torch.channels_last)
        weight = torch.empty(channels, x.shape[1], 3, 3, dtype=dtype)
        taps = torch.empty(3, 3, dtype=torch.bool) if mask == "custom" else None
        out = conv.masked_conv2d(x, weight, torch.empty(channels, dtype=dtype), mask, taps, 1)
        conv.masked_conv2d_backward(out, x, weight, mask, taps, 1, True, True, True)

    return call


def gated_masked_conv(
    dtype: torch.dtype, channels: int, condition: str = "map", batch: int = 2
) -> Callable[[], object]:
    def call():
        x = torch.empty(batch, channels, 16, 16, dtype=dtype, memory_format=torch.channels_last)
        weight = torch.empty(2 * channels, channels, 3, 3, dtype=dtype)
        given = torch.empty(batch, 2 * channels, *([16, 16] if condition == "map" else []), dtype=dtype)
        conv.gate_backward(
            *conv.gated_masked_conv2d(x, weight, torch.empty(2 * channels, dtype=dtype), given, "B", None, True)
        )

    return call


def pixelcnn_steps(
    dtype: torch.dtype, channels: int = 128, kernel_sizes: tuple[int, ...] = (5, 3, 3), tuned: bool = False
) -> Callable[[], object]:
    """A row's vertical stack and a position, of a model with a condition; ``tuned``: by the last tile that fits."""

    def last(kernel, table, device, dim, dtype, launch):
        return [t for t in table if t.dim >= dim and t.dtype == dtype][-1].meta

    def call():
        shape = (16, 32, 32)
        weights = [torch.empty(512, channels, dtype=dtype)]
        for i, k in enumerate(kernel_sizes):
            outputs = channels if i + 1 == len(kernel_sizes) else 2 * channels
            for size in ((k, k), (1, 1), (1, k), (1, 1)):
                n = outputs if len(weights) % 8 == 7 else 2 * channels
                weights += [torch.empty(n, channels, *size, dtype=dtype), torch.empty(n, dtype=dtype)]
        for n in (channels, 512):
            weights += [torch.empty(n, channels, 1, 1, dtype=dtype), torch.empty(n, dtype=dtype)]
        packed, cache = pixelcnn.prepare(weights, kernel_sizes, *shape)
        condition = torch.empty(len(kernel_sizes), 16, 8, 8, 4 * channels, dtype=dtype)
        ids = torch.empty(shape, dtype=torch.int64)
        with mock.patch.object(pixelcnn, "pick", last if tuned else pixelcnn.pick):
            pixelcnn.step(ids, packed, cache, condition, kernel_sizes, 1, 0)

    return call


def choice(n_codes: int, temperature: float, top_k: int | None, top_p: float | None) -> Callable[[], object]:
    def call():
        uniforms, mask = (torch.empty(16, 32, 32, dtype=dtype) for dtype in (F64, torch.bool))
        ids, position = torch.empty(16, 32, 32, dtype=torch.int64), torch.empty(1, dtype=torch.int64)
        sample_ids(torch.empty(16, n_codes), uniforms, mask, ids, position, temperature, top_k, top_p)

    return call


F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
# Both 16-bit types have the same tiles: the widest shows that bfloat16 compiles as float16 does.
for dtype, channels in ((F16, 32), (F16, 64), (F16, 128), (BF16, 128), (F32, 32), (F32, 128), (F64, 64)):
    CALLS[f"masked_conv {dtype} {channels}"] = masked_conv(dtype, channels)
for dtype, channels in ((F16, 32), (F16, 128), (BF16, 128), (F32, 128)):
    CALLS[f"gated_masked_conv {dtype} {channels}"] = gated_masked_conv(dtype, channels)
CALLS["masked_conv of three channels"] = masked_conv(BF16, 64, c_in=3)
CALLS["masked_conv of a mask on the device"] = masked_conv(F16, 128, mask="custom")
CALLS["masked_conv of more than 2^31 pixels"] = masked_conv(BF16, 64, side=2**16)
CALLS["gated_masked_conv of a vector"] = gated_masked_conv(F16, 128, "vector")
CALLS["pixelcnn_step float32"] = pixelcnn_steps(F32)
CALLS["pixelcnn_step bfloat16"] = pixelcnn_steps(BF16)
for dtype in (F16, F32):
    CALLS[f"pixelcnn_step of few channels {dtype}"] = pixelcnn_steps(dtype, 48, (3,))
    CALLS[f"pixelcnn_step tuned {dtype}"] = pixelcnn_steps(dtype, 128, (3,), tuned=True)
for n_codes in (1024, 2048, 4096):  # every tile, with the options that take most registers
    CALLS[f"choice of {n_codes}"] = choice(n_codes, 1.0, 5, 0.9)
CALLS["choice of the likeliest"] = choice(4096, 0.0, None, None)
CALLS["choice without options"] = choice(4096, 1.0, None, None)
TENSOR_CORES |= {"masked_conv", "masked_conv_weight_grad"}
CALLS.update(triton_calls_learning.CALLS)
REPEATS.update(triton_calls_learning.REPEATS)


def nearest(
    dim: int,
    dtype: torch.dtype,
    metric: str = "euclidean",
    precision: str = "exact",
    shape: tuple[int, ...] = (100_000,),
) -> Callable[[], object]:
    def call():
        x, codebook = (torch.empty(*n, dim, dtype=dtype) for n in (shape, (*shape[:-1], 1024)))
        lookup.nearest(x, codebook, metric, precision)

    return call


for dim in (8, 32, 64, 128, 256, 512):
    CALLS[f"nearest {dim}"] = nearest(dim, F32)
CALLS["nearest bfloat16"] = nearest(64, BF16)
CALLS["nearest float16 cosine"] = nearest(64, F16, "cosine")
CALLS["nearest float64 dot fast"] = nearest(64, F64, "dot", "fast")
for shape in ((1,), (77_777,), (2, 4096), (3, 777)):
    REPEATS[f"nearest of {shape}"] = nearest(64, F32, shape=shape)
for batch in (1, 7):
    REPEATS[f"masked_conv of {batch}"] = masked_conv(BF16, 128, batch=batch)
    REPEATS[f"gated_masked_conv of {batch}"] = gated_masked_conv(BF16, 128, batch=batch)


def residual_quantize(dtype: torch.dtype, dim: int) -> Callable[[], object]:
    def call():
        x, codebooks = torch.empty(1000, dim, dtype=dtype), torch.empty(2, 1024, dim, dtype=dtype)
        mask = torch.empty(1000, dtype=torch.bool)
        forward = ResidualCall(x, codebooks, mask, "euclidean", "straight_through", 1.0, False, "exact", None)
        out, losses, _, indices, *_ = residual.residual_quantize(forward)
        backward = (x, codebooks, indices, out, losses, None, "straight_through", 1.0, True, False, None)
        residual.residual_quantize_backward(ResidualBackwardCall(*backward))

    return call


# All levels in one launch, then a launch a level: rows that are too wide, and float64.
for dtype, dim in ((F32, 8), (F32, 64), (BF16, 128), (F32, 256), (F64, 64)):
    CALLS[f"residual_quantize {dtype} {dim}"] = residual_quantize(dtype, dim)
