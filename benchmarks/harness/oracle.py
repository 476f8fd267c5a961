"""The nearest code by definition, in NumPy float64: shares no line with the kernels it judges."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np

# Scores of one block stay in a core's cache.
BLOCK_SCORES = 32768


def nearest_float64(
    x: np.ndarray,  # [N, D]
    codebook: np.ndarray,  # [K, D]
) -> np.ndarray:  # [N] int64
    """Lowest k among those with the least sum over d = 0 .. D-1, in this order, of (x_d - c_kd)^2.

    One float64 accumulator, every operation rounded and none contracted, which is what NumPy's elementwise functions
    do. Finite input only.
    """
    n_rows, dim = x.shape
    columns = np.ascontiguousarray(codebook.T.astype(np.float64))  # [D, K]
    indices = np.empty(n_rows, np.int64)
    n_block = max(1, BLOCK_SCORES // columns.shape[1])

    def block(start: int) -> None:
        rows = x[start : start + n_block].astype(np.float64)
        total = np.zeros((len(rows), columns.shape[1]))
        term = np.empty_like(total)
        for d in range(dim):
            np.subtract(rows[:, d : d + 1], columns[d], out=term)
            np.multiply(term, term, out=term)
            np.add(total, term, out=total)
        indices[start : start + n_block] = total.argmin(1)

    # NumPy lets go of the GIL in these calls; blocks are independent, so threads change nothing but the time.
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(block, range(0, n_rows, n_block)))
    return indices


def count_differing(indices: np.ndarray, expected: np.ndarray) -> int:
    if indices.shape != expected.shape:
        raise ValueError(f"indices have shape {indices.shape}, expected {expected.shape}")
    return int(np.count_nonzero(indices != expected))
