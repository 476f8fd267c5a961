"""The arguments of the registered ops of the masked convolution."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

__all__ = ["ConvBackwardCall", "ConvCall", "GateBackwardCall", "GatedConvCall"]


class ConvCall(NamedTuple):
    x: Tensor  # [B, C_in, H, W]
    weight: Tensor  # [C_out, C_in, kh, kw]
    bias: Tensor | None  # [C_out]
    mask: str  # a name, or "custom"
    taps: Tensor | None  # [kh, kw] bool, for mask "custom"
    colours: int
    backend: str | None


class ConvBackwardCall(NamedTuple):
    grad: Tensor  # [B, C_out, H, W]
    x: Tensor  # [B, C_in, H, W]
    weight: Tensor  # [C_out, C_in, kh, kw]
    mask: str
    taps: Tensor | None
    colours: int
    need_x: bool
    need_weight: bool
    need_bias: bool
    backend: str | None


class GatedConvCall(NamedTuple):
    x: Tensor  # [B, C_in, H, W]
    weight: Tensor  # [2C, C_in, kh, kw]
    bias: Tensor | None  # [2C]
    condition: Tensor | None  # [B, 2C] or [B, 2C, H, W]
    mask: str
    taps: Tensor | None
    save: bool  # whether to return the two factors of the gate, for a backward
    backend: str | None


class GateBackwardCall(NamedTuple):
    grad: Tensor  # [B, C, H, W]
    tanh_a: Tensor  # [B, C, H, W]
    sigmoid_b: Tensor  # [B, C, H, W]
    backend: str | None
