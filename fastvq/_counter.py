"""Numbers from a counter: the same bits on every machine, with no library's generator and no libm in between."""

from __future__ import annotations

import numpy as np

__all__ = ["bits", "integers", "normal_like"]

_STEP, _MIX1, _MIX2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def bits(key: int, n: int) -> np.ndarray:  # [n] uint64
    """The finaliser of splitmix64 (Steele et al. 2014) over the counters of ``key``: 2^32 keys of 2^32 numbers."""
    z = (np.arange(n, dtype=np.uint64) + np.uint64(key << 32)) * np.uint64(_STEP)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(_MIX1)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(_MIX2)
    return z ^ (z >> np.uint64(31))


def integers(key: int, shape: tuple[int, ...], low: int, high: int) -> np.ndarray:  # int64
    """From low to high - 1; their number is at most 2^32."""
    drawn = (bits(key, int(np.prod(shape))) >> np.uint64(32)) * np.uint64(high - low) >> np.uint64(32)
    return drawn.astype(np.int64).reshape(shape) + low


def normal_like(key: int, shape: tuple[int, ...]) -> np.ndarray:  # float64
    """The sum of four 16-bit integers less its mean, over 2^15: mean 0, variance 4/3, every value exact in float32."""
    b = bits(key, int(np.prod(shape)))
    total = sum(((b >> np.uint64(16 * i)) & np.uint64(0xFFFF)).astype(np.int64) for i in range(4))
    return ((total - 2 * 0xFFFF) / 2.0**15).reshape(shape)
