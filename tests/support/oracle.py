"""The index contract in NumPy float64, written without looking at fastvq's own reference or kernels."""

import numpy as np
import torch

# Scores held at once.
TILE = 1 << 22


def as_float64(t: torch.Tensor) -> np.ndarray:
    return t.detach().to(torch.float64).numpy()


def distances(
    x: np.ndarray,  # [N, D] float64
    codebook: np.ndarray,  # [K, D] float64
    metric: str,
) -> np.ndarray:  # [N, K] float64
    """d_k: one accumulator, d = 0 ... D-1 in turn, multiply and add rounded apart; inf for a code that may not win."""
    acc = np.zeros((x.shape[0], codebook.shape[0]))
    with np.errstate(all="ignore"):
        if metric == "euclidean":
            for d in range(x.shape[1]):
                t = x[:, d : d + 1] - codebook[None, :, d]
                acc = acc + t * t
            result = acc
        else:
            for d in range(x.shape[1]):
                acc = acc + x[:, d : d + 1] * codebook[None, :, d]
            result = -acc
            if metric == "cosine":
                square = np.zeros(codebook.shape[0])
                for d in range(x.shape[1]):
                    square = square + codebook[:, d] * codebook[:, d]
                norm = np.sqrt(square)
                result = result / norm
                result[:, norm == 0] = np.inf
        result[:, ~np.isfinite(codebook).all(1)] = np.inf
        result[np.isnan(result)] = np.inf
    return result


def nearest(
    x: torch.Tensor,  # [..., D]
    codebook: torch.Tensor,  # [K, D]
    metric: str = "euclidean",
) -> torch.Tensor:  # [...]
    rows, codes = as_float64(x).reshape(-1, x.shape[-1]), as_float64(codebook)
    out = np.zeros(rows.shape[0], dtype=np.int64)
    step = max(1, TILE // codes.shape[0])
    for start in range(0, rows.shape[0], step):
        block = rows[start : start + step]
        best = distances(block, codes, metric).argmin(1)  # NumPy's argmin takes the first of equals
        best[~np.isfinite(block).all(1)] = 0
        out[start : start + step] = best
    return torch.from_numpy(out).view(x.shape[:-1])
