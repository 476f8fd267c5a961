"""The launches of codebook learning for ``tests.triton_calls``: every tile, both methods, each dtype and layout once."""

from collections.abc import Callable

import torch

from fastvq.ops.ema.triton_replace import replace_dead_codes_
from fastvq.ops.ema.triton_statistics import code_statistics
from fastvq.ops.ema.triton_update import ema_update_

FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def tensor(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="cuda")


def image(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """[B, H, W, C] of an image that is stored [B, C, H, W]."""
    b, h, w, c = shape
    return tensor(b, c, h, w, dtype=dtype).movedim(1, -1)


def statistics(x: torch.Tensor, n_codes: int, n_heads: int | None = None, deterministic: bool = True) -> object:
    indices = tensor(*x.shape[:-1], dtype=torch.int64)
    return code_statistics(x, indices, n_codes, n_heads, deterministic)


def buffers(*shape: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    return [tensor(*shape, dtype=dtype), tensor(*shape, dtype=dtype), tensor(*shape[:-1], dtype=dtype)]


def update(*shape: int, dtype: torch.dtype = torch.float32, smoothing: str = "laplace", debias: bool = False) -> object:
    sums, counts = tensor(*shape, dtype=dtype), tensor(*shape[:-1], dtype=torch.int64)
    return ema_update_(*buffers(*shape, dtype=dtype), sums, counts, 0.99, 1e-5, smoothing, debias)


def replace(x: torch.Tensor, n_codes: int) -> object:
    return replace_dead_codes_(*buffers(n_codes, x.shape[-1]), x, tensor(n_codes), 1.0)


CALLS: dict[str, Callable[[], object]] = {}
for dtype in FLOATS:
    name = str(dtype).removeprefix("torch.")
    for dim in (8, 32, 64, 128, 256, 512, 1024, 4096):
        CALLS[f"statistics {name} {dim}"] = lambda dim=dim, dtype=dtype: statistics(
            tensor(65536, dim, dtype=dtype), 1024
        )
    for dim in (8, 64, 256, 4096):
        CALLS[f"atomic statistics {name} {dim}"] = lambda dim=dim, dtype=dtype: statistics(
            tensor(65536, dim, dtype=dtype), 1024, deterministic=False
        )
    CALLS[f"replacement {name}"] = lambda dtype=dtype: replace(tensor(65536, 64, dtype=dtype), 1024)
    CALLS[f"replacement of an image {name}"] = lambda dtype=dtype: replace(image(8, 32, 32, 64, dtype=dtype), 1024)
CALLS["statistics of heads"] = lambda: statistics(tensor(8, 65536, 64), 16384, n_heads=8)
for dtype in (torch.float32, torch.float64):
    for dim in (8, 64, 256):
        for smoothing in ("laplace", "none"):
            for debias in (False, True):
                CALLS[f"update {dtype} {dim} {smoothing} {debias}"] = (
                    lambda dtype=dtype, dim=dim, smoothing=smoothing, debias=debias: update(
                        8, 1024, dim, dtype=dtype, smoothing=smoothing, debias=debias
                    )
                )
