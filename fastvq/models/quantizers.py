"""Makes the quantizer of one level by name, and measures how many codes a batch uses."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastvq import nn as fastvq_nn
from fastvq._checks import check_option

__all__ = ["KINDS", "code_use", "make_quantizer"]

KINDS = ("plain", "residual", "grouped")


def make_quantizer(op: str, kind: str, dim: int, n_codes: int, depth: int, **options: Any) -> nn.Module:
    """``fastvq.nn``'s quantizer for [B, dim, h, w]: one code a position, or ``depth`` of them.

    kind "plain" is ``VectorQuantizer``, "residual" ``ResidualVQ`` with ``depth`` levels, "grouped" ``GroupedVQ`` with
    ``depth`` groups; ``options`` are passed to it.
    """
    check_option(op, "quantizer", kind, KINDS)
    if kind == "plain":
        if depth != 1:
            raise ValueError(f"{op}: depth must be 1 for quantizer 'plain', got {depth}; take 'residual' or 'grouped'")
        return fastvq_nn.VectorQuantizer(dim, n_codes, channel_first=True, **options)
    make = fastvq_nn.ResidualVQ if kind == "residual" else fastvq_nn.GroupedVQ
    return make(dim, n_codes, depth, channel_first=True, **options)


@torch.no_grad()
def code_use(
    ids: Tensor,  # [B, h, w], or [B, h, w, Q] with Q codebooks
    n_codes: int,
) -> tuple[Tensor, Tensor]:
    """(perplexity [], used []) of one batch: exp of the entropy of its codes, and the share of codes it uses.

    float32. With Q codebooks, each is measured separately and the means are returned. Ids below 0 are not counted.
    """
    columns = ids.reshape(-1, ids.shape[-1] if ids.dim() == 4 else 1)
    depth = columns.shape[1]
    offset = torch.arange(depth, device=ids.device) * n_codes
    flat = (columns.clamp(min=0) + offset).flatten()
    ones = (columns >= 0).flatten().to(torch.float32)
    counts = ones.new_zeros(depth * n_codes).scatter_add_(0, flat, ones).view(depth, n_codes)
    share = counts / counts.sum(1, keepdim=True).clamp(min=1)
    entropy = -torch.special.xlogy(share, share).sum(1)
    return entropy.exp().mean(), (counts > 0).float().mean()
