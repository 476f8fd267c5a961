"""The launches that ``tests.triton_offline`` compiles: every launcher, once at least for each tile and dtype."""

from collections.abc import Callable

import torch

CALLS: dict[str, Callable[[], object]] = {}

# Kernels that must use the tensor cores, in every tile and dtype of theirs that CALLS launches.
TENSOR_CORES: set[str] = {"_filter", "_survivors"}


def _nearest(dim: int, dtype: torch.dtype, metric: str = "euclidean", precision: str = "exact") -> None:
    from fastvq.ops.nearest.triton_ import nearest

    x, codebook = (torch.empty(n, dim, dtype=dtype, device="cuda") for n in (100_000, 1024))
    nearest(x, codebook, metric, precision)


for _dim in (8, 32, 64, 128, 256, 512):
    CALLS[f"nearest, D = {_dim}, float32"] = lambda dim=_dim: _nearest(dim, torch.float32)
    CALLS[f"nearest, D = {_dim}, bfloat16"] = lambda dim=_dim: _nearest(dim, torch.bfloat16)
CALLS["nearest, cosine, float16"] = lambda: _nearest(64, torch.float16, "cosine")
CALLS["nearest, dot, float64, fast"] = lambda: _nearest(64, torch.float64, "dot", "fast")
