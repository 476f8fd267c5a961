"""Helpers around the lookup that are neither a backend nor the definition."""

from __future__ import annotations

import math

from torch import Tensor

__all__ = ["norms"]


def norms(
    codebook: Tensor,  # [K, D] float64
) -> Tensor:  # [K] float64
    """|c_k| of the index contract: float64, d = 0 ... D-1 one after another, every operation rounded."""
    square = codebook.new_zeros(codebook.shape[0])
    for column in codebook.unbind(1):
        square += column * column
    # math.sqrt rounds correctly; torch.sqrt need not (a vector library's may miss the last bit).
    return codebook.new_tensor([math.sqrt(s) for s in square.tolist()])
