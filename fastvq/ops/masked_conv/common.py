"""Helpers that several backends of the masked convolution share."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["like_input"]


def like_input(
    x: Tensor,  # [B, C_in, H, W]
    channels: int,
) -> Tensor:  # [B, channels, H, W], empty
    """Channels-last where x is, contiguous otherwise."""
    last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    memory_format = torch.channels_last if last else torch.contiguous_format
    return torch.empty(
        (x.shape[0], channels, *x.shape[2:]), dtype=x.dtype, device=x.device, memory_format=memory_format
    )
