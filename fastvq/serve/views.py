"""Tensors as pictures: PNG files, id maps in colours, swatches of codes, differences."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor

from fastvq.data import to_pixels
from fastvq.models.autoencoder import Autoencoder

__all__ = ["difference", "id_colours", "png", "swatch_columns", "swatches"]

AROUND = 2  # positions of the top map on each side of a swatch
GAP, PAPER = 1, 160  # pixels between swatches, and their grey
CODES_AT_ONCE = 128  # codes whose swatches are decoded in one batch
GOLDEN = (math.sqrt(5) - 1) / 2  # steps of this share of the colour circle spread any number of hues


def png(
    pixels: Tensor,  # [C, H, W] uint8, C 1 or 3
) -> bytes:
    """A PNG file of exactly these pixels."""
    array = pixels[0].numpy() if len(pixels) == 1 else pixels.permute(1, 2, 0).contiguous().numpy()
    data = io.BytesIO()
    Image.fromarray(array).save(data, "png")
    return data.getvalue()


def id_colours(
    ids: Tensor,  # [h, w], or [h, w, Q] of which the first id is shown
    n_codes: int,
) -> Tensor:
    """[3, h, w] uint8: one colour for each id, the same in every picture. Neighbouring ids differ in hue."""
    ids = ids[..., 0] if ids.dim() == 3 else ids
    number = torch.arange(n_codes, dtype=torch.float64)
    hue, light = number * GOLDEN % 1, 0.62 + 0.3 * (number * GOLDEN**2 * 3 % 1)
    channels = [(light * (1 - 0.6 * _ramp(hue + third / 3))) for third in (0, 2, 1)]
    return (torch.stack(channels)[:, ids.cpu()] * 255).to(torch.uint8)


def _ramp(hue: Tensor) -> Tensor:
    """0 where the channel is full, 1 where it is empty."""
    distance = ((hue + 0.5) % 1 - 0.5).abs() * 6  # sixths of the circle from the channel's own hue
    return (distance - 1).clamp(0, 1)


def difference(
    after: Tensor,  # [C, H, W] uint8
    before: Tensor,
) -> Tensor:
    """[C, H, W] uint8: the change on middle grey (128), which means none; clipped."""
    return (after.int() - before.int() + 128).clamp(0, 255).to(torch.uint8)


def swatch_columns(n_codes: int) -> int:
    """Columns of the picture of swatches; code k is in row k // columns and column k % columns."""
    return math.ceil(math.sqrt(n_codes))


@torch.no_grad()
def swatches(
    model: Autoencoder,
    maps: Sequence[Tensor],  # L maps [1, h, w] of a picture
    level: int,
) -> Tensor:
    """[C, rows * s, columns * s] uint8, s the level's stride + GAP: what each code of a level looks like.

    A swatch is the middle of what a map of that code alone decodes to. The other levels hold the id that is most
    frequent in ``maps``.
    """
    n_codes, stride = model.n_codes[level], model.strides[level]
    columns = swatch_columns(n_codes)
    side = 2 * AROUND + 1
    device = maps[0].device
    common = [int(ids.flatten().mode().values) for ids in maps]
    middle = (side << level) // 2 * stride
    blocks = []
    for codes in torch.arange(n_codes, device=device).split(CODES_AT_ONCE):
        filled = [
            (codes if of == level else torch.full_like(codes, common[of]))[:, None, None].expand(
                -1, side << of, side << of
            )
            for of in range(model.levels)
        ]
        decoded = model.decode_maps([ids.contiguous() for ids in filled])
        blocks.append(to_pixels(decoded[:, :, middle : middle + stride, middle : middle + stride]).cpu())
    rows, cell = -(-n_codes // columns), stride + GAP
    page = torch.full((rows * columns, model.in_channels, cell, cell), PAPER, dtype=torch.uint8)
    page[:n_codes, :, :stride, :stride] = torch.cat(blocks)
    return page.view(rows, columns, -1, cell, cell).permute(2, 0, 3, 1, 4).reshape(-1, rows * cell, columns * cell)
