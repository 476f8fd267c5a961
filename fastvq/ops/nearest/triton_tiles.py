"""The tiles of the lookup's filter, a row for each capability and width; fastvq/backends/tiles.py chooses one."""

from __future__ import annotations

import torch

from fastvq.backends.tiles import Tile

__all__ = ["TILES", "WIDEST"]

WIDEST = 1 << 30


def _rows(capability: int, dim: int, **meta: int) -> list[Tile]:
    return [Tile(capability, dim, dtype, meta) for dtype in (torch.float16, torch.bfloat16)]


# fmt: off
# A row with a shape N x K x D was the fastest of 43 tiles at that shape on an H100 80GB HBM3, in 2026-11. No other row
# was measured on a GPU.
TILES = [
    *_rows(80, 32, BM=128, BN=128, BD=32, GROUP=8, num_warps=4, num_stages=3),
    *_rows(80, 64, BM=128, BN=128, BD=64, GROUP=4, num_warps=8, num_stages=3),
    *_rows(80, 128, BM=128, BN=128, BD=128, GROUP=8, num_warps=8, num_stages=2),
    *_rows(80, 256, BM=128, BN=64, BD=256, GROUP=4, num_warps=8, num_stages=2),
    *_rows(80, WIDEST, BM=128, BN=128, BD=64, GROUP=4, num_warps=8, num_stages=3),
    *_rows(90, 32, BM=128, BN=128, BD=32, GROUP=8, num_warps=8, num_stages=3),  # 262144 x 16384 x 8
    *_rows(90, 64, BM=128, BN=64, BD=64, GROUP=4, num_warps=4, num_stages=3),  # 1048576 x 1024 x 64
    *_rows(90, 128, BM=128, BN=128, BD=128, GROUP=4, num_warps=8, num_stages=2),  # 262144 x 1024 x 128
    *_rows(90, 256, BM=128, BN=64, BD=256, GROUP=4, num_warps=8, num_stages=3),  # 1048576 x 8192 x 256
    *_rows(90, WIDEST, BM=128, BN=256, BD=64, GROUP=8, num_warps=8, num_stages=3),
    *_rows(100, 32, BM=128, BN=128, BD=32, GROUP=8, num_warps=8, num_stages=3),
    *_rows(100, 64, BM=128, BN=128, BD=64, GROUP=4, num_warps=8, num_stages=3),
    *_rows(100, 128, BM=128, BN=128, BD=128, GROUP=4, num_warps=8, num_stages=3),
    *_rows(100, 256, BM=128, BN=128, BD=256, GROUP=4, num_warps=8, num_stages=2),
    *_rows(100, WIDEST, BM=128, BN=128, BD=64, GROUP=4, num_warps=8, num_stages=3),
]
# fmt: on
