"""The oracle of code statistics: float64 sums in the order of the rows, rounded once, within their type's range."""

import numpy as np
import torch
from torch import Tensor

from tests.fuzz.compare import assert_same


def statistics(x: Tensor, indices: Tensor, n_codes: int) -> tuple[np.ndarray, np.ndarray]:
    """sums [K, D] float64 and counts [K] of x [..., D]."""
    rows, index = x.detach().double().reshape(-1, x.shape[-1]).numpy(), indices.reshape(-1).numpy()
    used = (index >= 0) & np.isfinite(rows).all(1)
    total, count = np.zeros((n_codes, x.shape[-1])), np.zeros(n_codes, np.int64)
    with np.errstate(all="ignore"):
        np.add.at(total, index[used], rows[used])  # one row after another
    np.add.at(count, index[used], 1)
    return total, count


def check(x: Tensor, indices: Tensor, n_codes: int, heads: bool, sums: Tensor, counts: Tensor) -> None:
    pairs = zip(x, indices, strict=True) if heads else [(x, indices)]
    totals, expected = zip(*(statistics(a, i, n_codes) for a, i in pairs), strict=True)
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    total = saturate(torch.from_numpy(np.stack(totals)), dtype).reshape(sums.shape)
    assert counts.dtype == torch.int64
    assert torch.equal(counts, torch.from_numpy(np.stack(expected)).reshape(counts.shape)), "counts"
    assert_same(sums, total, "sums differ from float64 in the order of the rows")


def saturate(wide: Tensor, dtype: torch.dtype) -> Tensor:
    """As ``dtype``; beyond its range, its largest finite number."""
    largest = torch.finfo(dtype).max
    return wide.clamp(-largest, largest).to(dtype)
