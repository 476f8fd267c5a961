"""Encoder and decoder CNNs.

No layer normalises over space. A pixel therefore depends only on the codes within the decoder's reach, and an edit
changes no pixel beyond it. ``Decoder.reach`` computes the reach layer by layer, from the shapes of the layers.
"""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["Decoder", "Encoder", "ResidualBlock", "widen"]


def widen(
    mask: Tensor,  # [B, 1, h, w] bool
    radius: int,
) -> Tensor:
    """True wherever ``mask`` has a True within ``radius`` rows and columns, a convolution's field."""
    return F.max_pool2d(mask.float(), 2 * radius + 1, stride=1, padding=radius) > 0


class ResidualBlock(nn.Module):
    """x + conv1x1(relu(conv3x3(relu(x)))), channels kept."""

    RADIUS = 1  # an input changes outputs up to this many rows and columns away

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv3 = nn.Conv2d(channels, channels // 2, 3, padding=1)
        self.conv1 = nn.Conv2d(channels // 2, channels, 1)

    def forward(
        self,
        x: Tensor,  # [B, C, h, w]
    ) -> Tensor:
        return x + self.conv1(F.relu(self.conv3(F.relu(x))))


class Encoder(nn.Module):
    """[B, in_channels, H, W] -> [B, hidden, H / downsample, W / downsample], downsample a power of two."""

    def __init__(self, in_channels: int, hidden: int, downsample: int, n_blocks: int) -> None:
        super().__init__()
        halvings = downsample.bit_length() - 1
        widths = [in_channels, *(hidden // 2 if i + 1 < halvings else hidden for i in range(halvings))]
        self.down = nn.ModuleList(nn.Conv2d(a, b, 4, stride=2, padding=1) for a, b in pairwise(widths))
        self.mix = nn.Conv2d(hidden, hidden, 3, padding=1)
        self.blocks = nn.ModuleList(ResidualBlock(hidden) for _ in range(n_blocks))

    def forward(
        self,
        x: Tensor,  # [B, in_channels, H, W]
    ) -> Tensor:
        for conv in self.down:
            x = F.relu(conv(x))
        x = self.mix(x)
        for block in self.blocks:
            x = block(x)
        return F.relu(x)


class Decoder(nn.Module):
    """[B, in_channels, h, w] -> [B, out_channels, h * upsample, w * upsample], upsample a power of two."""

    def __init__(self, in_channels: int, hidden: int, out_channels: int, upsample: int, n_blocks: int) -> None:
        super().__init__()
        doublings = upsample.bit_length() - 1
        widths = [hidden, *(hidden // 2 if i + 1 < doublings else out_channels for i in range(doublings))]
        self.mix = nn.Conv2d(in_channels, hidden, 3, padding=1)
        self.blocks = nn.ModuleList(ResidualBlock(hidden) for _ in range(n_blocks))
        self.up = nn.ModuleList(nn.ConvTranspose2d(a, b, 4, stride=2, padding=1) for a, b in pairwise(widths))

    def forward(
        self,
        x: Tensor,  # [B, in_channels, h, w]
    ) -> Tensor:
        x = self.mix(x)
        for block in self.blocks:
            x = block(x)
        for conv in self.up:
            x = conv(F.relu(x))
        return x

    def reach(
        self,
        mask: Tensor,  # [B, 1, h, w] bool
    ) -> Tensor:
        """[B, 1, h * upsample, w * upsample] bool: the outputs that can change if the inputs in ``mask`` do."""
        mask = widen(mask, 1)
        for _ in self.blocks:
            mask = widen(mask, ResidualBlock.RADIUS)
        for _ in self.up:
            # Input row i enters output rows 2i - 1 .. 2i + 2: two rows of the doubled map, and one more on each side.
            mask = widen(mask.repeat_interleave(2, -2).repeat_interleave(2, -1), 1)
        return mask
