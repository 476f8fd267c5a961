"""Masked convolution as modules."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from fastvq._checks import check_integer, check_option
from fastvq.ops import gated_masked_conv2d, masked_conv2d
from fastvq.ops.masked_conv.masks import MASKS, MaskName, active_taps

__all__ = ["GatedMaskedConv2d", "MaskName", "MaskedConv2d"]


class _MaskedBase(nn.Module):
    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        n_weights: int,
        kernel_size: int | tuple[int, int],
        mask: MaskName | Tensor,
        colours: int,
        bias: bool,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        sizes = tuple(kernel_size) if isinstance(kernel_size, Iterable) else (kernel_size, kernel_size)
        if len(sizes) != 2 or not all(isinstance(size, int) for size in sizes):
            raise ValueError(
                f"fastvq.nn.{name}: kernel_size must be one integer or two (height, width), got {kernel_size}"
            )
        kh, kw = sizes
        for argument, value in (("in_channels", in_channels), ("out_channels", out_channels)):
            check_integer(f"fastvq.nn.{name}", argument, value)
            if value < 1:
                raise ValueError(f"fastvq.nn.{name}: {argument} must be >= 1, got {value}")
        if kh < 1 or kw < 1 or kh % 2 == 0 or kw % 2 == 0:
            raise ValueError(f"fastvq.nn.{name}: kernel_size must be odd, so that there is a centre, got {kernel_size}")
        self.in_channels, self.out_channels, self.kernel_size, self.colours = (
            in_channels,
            out_channels,
            (kh, kw),
            colours,
        )
        check_integer(f"fastvq.nn.{name}", "colours", colours)
        self.mask_name: MaskName | None = None
        if isinstance(mask, str):
            check_option(f"fastvq.nn.{name}", "mask", mask, MASKS)
            self.mask_name = mask
        else:
            if not isinstance(mask, Tensor):
                raise TypeError(
                    f"fastvq.nn.{name}: mask must be the name of a mask or a bool tensor, got {type(mask).__name__}"
                )
            if mask.dtype != torch.bool or mask.shape != (kh, kw):
                raise ValueError(
                    f"fastvq.nn.{name}: mask must be a bool tensor [{kh}, {kw}], got {mask.dtype} {list(mask.shape)}"
                )
        # A mask is an argument of the constructor, as a mask's name is, so it is not saved in the state.
        self.register_buffer("mask_taps", None if isinstance(mask, str) else mask.clone(), persistent=False)
        self.weight = nn.Parameter(torch.empty(n_weights, in_channels, kh, kw, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(n_weights, device=device, dtype=dtype)) if bias else None
        self.reset_parameters()

    @property
    def mask(self) -> MaskName | Tensor:
        return self.mask_name if self.mask_name is not None else self.get_buffer("mask_taps")

    def reset_parameters(self) -> None:
        """Initialises within torch's bound for convolutions, 1/sqrt(fan_in); only active taps count in fan_in."""
        taps = self._buffers["mask_taps"]
        n_taps = len(active_taps(self.mask_name or "custom", taps, *self.kernel_size, self.colours))
        bound = 1 / math.sqrt(max(1, n_taps * self.in_channels))
        nn.init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -bound, bound)

    def extra_repr(self) -> str:
        mask = self.mask_name if self.mask_name is not None else "custom"
        colours = f", colours={self.colours}" if self.colours > 1 else ""
        bias = "" if self.bias is not None else ", bias=False"
        return f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, mask={mask!r}{colours}{bias}"


class MaskedConv2d(_MaskedBase):
    """``nn.Conv2d`` of stride 1 and same padding with a mask; see ``fastvq.ops.masked_conv2d`` for the equation.

    Args:
        in_channels, out_channels, bias, device, dtype: as ``nn.Conv2d``.
        kernel_size: odd, one number or two.
        mask: "A", "B", "vertical-A", "vertical-B", "horizontal-A", "horizontal-B" or a bool tensor [kh, kw].
        colours: 3 for channels in three ordered groups.

    Attributes:
        weight [out_channels, in_channels, kh, kw]: masked elements are initialised like the others (within the bound
            of the active taps' fan-in); their gradient is zero.
        bias [out_channels] or None.

    Raises:
        ValueError: an even kernel size, channels below 1, an unknown mask or a mask of the wrong shape.

    Example:
        >>> conv = MaskedConv2d(16, 32, 5, mask="A")
        >>> conv(torch.randn(2, 16, 8, 8)).shape
        torch.Size([2, 32, 8, 8])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        *,
        mask: MaskName | Tensor = "B",
        colours: int = 1,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_channels, out_channels, out_channels, kernel_size, mask, colours, bias, device, dtype)

    def forward(
        self,
        x: Tensor,  # [B, C_in, H, W]
    ) -> Tensor:  # [B, C_out, H, W]
        return masked_conv2d(x, self.weight, self.bias, mask=self.mask, colours=self.colours)


class GatedMaskedConv2d(_MaskedBase):
    """tanh(a + condition_a) sigmoid(b + condition_b) of a masked convolution to (a, b), fused.

    As ``MaskedConv2d``, with ``out_channels`` = C, weight [2C, C_in, kh, kw] and bias [2C]; a is the first half.
    ``forward(x, condition)`` takes a condition [B, 2C] or [B, 2C, H, W]; see ``fastvq.ops.gated_masked_conv2d``.

    Example:
        >>> conv = GatedMaskedConv2d(16, 32, 3)
        >>> conv(torch.randn(2, 16, 8, 8), condition=torch.randn(2, 64)).shape
        torch.Size([2, 32, 8, 8])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        *,
        mask: MaskName | Tensor = "B",
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_channels, out_channels, 2 * out_channels, kernel_size, mask, 1, bias, device, dtype)

    def forward(
        self,
        x: Tensor,  # [B, C_in, H, W]
        condition: Tensor | None = None,  # [B, 2C] or [B, 2C, H, W]
    ) -> Tensor:  # [B, C, H, W]
        return gated_masked_conv2d(x, self.weight, self.bias, condition, mask=self.mask)
