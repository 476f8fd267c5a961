"""Indices of codes that a caller may have changed: found before a kernel reads a code by them."""

from __future__ import annotations

import torch
from torch import Tensor

from fastvq import _env, _native
from fastvq._native import address

__all__ = ["check_indices", "count_real", "raise_bad_index"]


def raise_bad_index(op: str, indices: Tensor, n_codes: int, flat_row: int) -> None:
    value = indices.reshape(-1)[flat_row].item()
    row = tuple(int(i) for i in torch.unravel_index(torch.tensor(flat_row, device="cpu"), indices.shape))
    raise ValueError(
        f"{op}: indices must be -1 (no code) or 0 ... {n_codes - 1} (n_codes = {n_codes}), got {value} at row {row}; "
        "look the vectors up again or pass the right n_codes"
    )


def check_indices(op: str, indices: Tensor, n_codes: int) -> None:
    """Raises on the first index that is neither -1 nor a code. Elsewhere than on the CPU that waits for the device."""
    if indices.device.type == "cpu" or _env.read("FASTVQ_CHECK") in ("1", "2"):
        bad = ((indices < -1) | (indices >= n_codes)).reshape(-1)
        if bad.any():
            raise_bad_index(op, indices, n_codes, int(bad.nonzero()[0]))


def count_real(
    op: str,
    indices: Tensor,  # [...] or [..., Q] with Q levels, contiguous, on the CPU
    n_codes: int,
    n_levels: int = 1,
) -> int:
    """How many vectors have a code. ValueError on the first index that is neither -1 nor a code, and on a vector that
    has a code on some levels alone."""
    n_rows = indices.numel() // n_levels
    first_bad, n_real = _native._cpu.count_indices(address(indices), n_rows, n_levels, n_codes)
    if first_bad >= 0:
        raise_bad_index(op, indices, n_codes, first_bad)
    return int(n_real)
