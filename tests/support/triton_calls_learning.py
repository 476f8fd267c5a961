"""The launches of quantization and codebook learning for ``triton_calls``: every tile, layout and dtype once."""

from collections.abc import Callable

import torch

from fastvq.ops.quantize.call import QuantizeBackwardCall
from fastvq.ops.quantize.triton_backward import quantize_backward
from fastvq.ops.quantize.triton_forward import gather
from fastvq.ops.statistics.call import ReplaceCall, UpdateCall
from fastvq.ops.statistics.triton_replace import replace_dead_codes_
from fastvq.ops.statistics.triton_statistics import code_statistics
from fastvq.ops.statistics.triton_update import ema_update_

F32, F64, F16, BF16 = torch.float32, torch.float64, torch.float16, torch.bfloat16
CALLS: dict[str, Callable[[], object]] = {}
REPEATS: dict[str, Callable[[], object]] = {}


def tensor(*shape: int, dtype: torch.dtype = F32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="cuda")


def image(dim: int, dtype: torch.dtype = F32) -> torch.Tensor:
    """[B, H, W, D] of images that are stored [B, D, H, W]."""
    return tensor(8, dim, 32, 32, dtype=dtype).movedim(1, -1)


def statistics(x: torch.Tensor, n_heads: int | None = None, deterministic: bool = True) -> object:
    return code_statistics(x, tensor(*x.shape[:-1], dtype=torch.int64), 1024, n_heads, deterministic)


def buffers(*shape: int, dtype: torch.dtype = F32) -> list[torch.Tensor]:
    return [tensor(*shape, dtype=dtype), tensor(*shape, dtype=dtype), tensor(*shape[:-1], dtype=dtype)]


def update(dim: int, dtype: torch.dtype, smoothing: str, debias: bool) -> object:
    sums, counts = tensor(8, 1024, dim), tensor(8, 1024, dtype=torch.int64)
    given = buffers(8, 1024, dim, dtype=dtype)
    return ema_update_(UpdateCall(*given, sums, counts, 0.99, 1e-5, smoothing, debias, None))


def replace(x: torch.Tensor) -> object:
    return replace_dead_codes_(ReplaceCall(*buffers(1024, x.shape[-1]), x, tensor(1024), 1.0, None))


def forward(x: torch.Tensor, dtype: torch.dtype = F32, masked: bool = False) -> object:
    mask = tensor(*x.shape[:-1], dtype=torch.bool) if masked else None
    return gather(x, tensor(1024, x.shape[-1], dtype=dtype), tensor(*x.shape[:-1], dtype=torch.int64), mask, 0.25)


def backward(
    x: torch.Tensor, estimator: str, dtype: torch.dtype = F32, loss: bool = True, codes: bool = True
) -> object:
    indices, scalar = tensor(*x.shape[:-1], dtype=torch.int64), tensor() if loss else None
    codebook, g = tensor(1024, x.shape[-1], dtype=dtype), torch.empty_like(x)
    need_codebook = codes and x.stride(-1) == 1  # its statistics copy an image, which fake tensors cannot without CUDA
    call = QuantizeBackwardCall(x, codebook, indices, g, scalar, scalar, estimator, 0.25, True, need_codebook, None)
    return quantize_backward(call)


for dim in (8, 32, 64, 128, 256, 512, 4096):
    CALLS[f"statistics {dim}"] = lambda dim=dim: statistics(tensor(65536, dim))
for dtype, dim in ((F64, 1024), (BF16, 64)):
    CALLS[f"statistics {dim} {dtype}"] = lambda dtype=dtype, dim=dim: statistics(tensor(65536, dim, dtype=dtype))
CALLS["statistics of heads"] = lambda: statistics(tensor(8, 65536, 64), n_heads=8)
for dtype, dim in ((F32, 4096), (F64, 64), (BF16, 64)):
    CALLS[f"atomic statistics {dim} {dtype}"] = lambda dtype=dtype, dim=dim: statistics(
        tensor(65536, dim, dtype=dtype), deterministic=False
    )
CALLS["atomic statistics of images"] = lambda: statistics(image(64), deterministic=False)
for dtype, dim in ((F32, 8), (F32, 64), (F32, 256), (F64, 64)):
    CALLS[f"update {dim} {dtype}"] = lambda dtype=dtype, dim=dim: update(dim, dtype, "laplace", False)
CALLS["update without a bias"] = lambda: update(64, F32, "none", True)
for dtype, dim in ((F32, 256), (BF16, 64)):
    CALLS[f"replacement {dim} {dtype}"] = lambda dtype=dtype, dim=dim: replace(tensor(65536, dim, dtype=dtype))
CALLS["replacement from images"] = lambda: replace(image(64))
for dim in (8, 32, 256):
    CALLS[f"quantize {dim}"] = lambda dim=dim: forward(tensor(65536, dim))
    CALLS[f"gradient {dim}"] = lambda dim=dim: backward(tensor(65536, dim), "rotation", codes=dim == 8)
CALLS["gradient straight through"] = lambda: backward(tensor(65536, 32), "straight_through")
CALLS["gradient without losses"] = lambda: backward(tensor(65536, 64), "straight_through", loss=False)
for x_dtype, dtype in ((BF16, F32), (F16, F16), (F64, F64)):
    CALLS[f"quantize {x_dtype} {dtype}"] = lambda x=x_dtype, c=dtype: forward(
        tensor(65536, 64, dtype=x), c, masked=True
    )
    CALLS[f"gradient {x_dtype} {dtype}"] = lambda x=x_dtype, c=dtype: backward(
        tensor(65536, 64, dtype=x), "rotation", dtype=c
    )
CALLS["quantize images"] = lambda: forward(image(64))
CALLS["gradient of images"] = lambda: backward(image(64), "rotation")
for n in (16, 777):
    REPEATS[f"statistics of {n}"] = lambda n=n: statistics(tensor(n, 64))
    REPEATS[f"quantize {n}"] = lambda n=n: forward(tensor(n, 32))
    REPEATS[f"gradient of {n}"] = lambda n=n: backward(tensor(n, 32), "straight_through")
