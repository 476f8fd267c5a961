"""Pictures that a training leaves in its folder: the loss over the steps, id maps, and the codes as swatches."""

from __future__ import annotations

import colorsys
import json
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from fastvq.cli.pictures import BAR, GAP, INK, LINE, PAPER, draw_text, grid, text_width
from fastvq.models.autoencoder import Autoencoder

__all__ = ["codebook_picture", "id_pictures", "loss_curve", "read_losses"]

SWATCH = 16  # side of a swatch, in pixels of the page
BATCH = 64  # codes decoded at once
ID_CELL = 96  # side of an id map on its page
MOST_STEPS, MOST_LOSS = 1 << 40, 1e38  # numbers of a log that a curve shows


def read_losses(log: Path) -> list[tuple[int, float]]:
    """(step, loss) of the lines of a log that have both, by step; a killed run may have left half a line."""
    found = {}
    for text in log.read_text(errors="replace").splitlines() if log.is_file() else []:
        try:
            line = json.loads(text)
            step, loss = int(line["step"]), float(line["loss"])
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
            continue
        if 0 <= step <= MOST_STEPS and abs(loss) <= MOST_LOSS:  # false for NaN
            found[step] = loss
    return sorted(found.items())


def loss_curve(losses: Sequence[tuple[int, float]], title: str) -> Image.Image:
    """The loss over the steps, on a logarithmic scale where all losses are positive."""
    width, height = 640, 240
    page = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(page)
    draw_text(draw, (GAP, GAP), title)
    if not losses:
        return page
    logarithmic = min(loss for _, loss in losses) > 0
    values = [math.log10(loss) if logarithmic else loss for _, loss in losses]
    low, high = min(values), max(values)
    left, right, top, base = 64, width - 12, LINE + 14, height - LINE - 10
    first, last = losses[0][0], losses[-1][0]

    def place(step: int, value: float) -> tuple[float, float]:
        x = left + (right - left) * (step - first) / max(last - first, 1)
        return x, base - (base - top) * (value - low) / ((high - low) or 1)

    draw.line((left, base, right, base), fill=INK)
    draw.line((left, top, left, base), fill=INK)
    for value in dict.fromkeys((high, low)):
        draw_text(draw, (GAP, place(first, value)[1] - LINE // 2), f"{10**value if logarithmic else value:.3g}")
    draw_text(draw, (left, base + 4), f"step {first}")
    draw_text(draw, (right - text_width(str(last)), base + 4), str(last))
    points = [place(step, value) for (step, _), value in zip(losses, values, strict=True)]
    if len(points) > 1:
        draw.line(points, fill=BAR, width=2)
    else:
        draw.ellipse((points[0][0] - 3, points[0][1] - 3, points[0][0] + 3, points[0][1] + 3), fill=BAR)
    return page


def colours(n_codes: int) -> Tensor:  # [K, 3] in -1 .. 1
    """A colour for each id; ids next to each other get colours far apart."""
    turns = [(k * 0.6180339887) % 1 for k in range(n_codes)]
    made = [colorsys.hsv_to_rgb(t, 0.55 + 0.4 * (k % 3) / 2, 0.95 - 0.25 * (k % 2)) for k, t in enumerate(turns)]
    return torch.tensor(made) * 2 - 1


def id_pictures(
    images: Tensor,  # [B, C, H, W] normalised
    maps: Sequence[Tensor],  # L maps [B, h, w] or [B, h, w, Q], top first
    n_codes: Sequence[int],
) -> Image.Image:
    """A row of pictures, and below it a row a level of their id maps, a colour an id (the first of several ids)."""
    rows = [images.cpu().expand(-1, 3, -1, -1) if images.shape[1] == 1 else images.cpu()]
    for ids, k in zip(maps, n_codes, strict=True):
        first = (ids if ids.dim() == 3 else ids[..., 0]).cpu()
        rows.append(colours(k)[first].permute(0, 3, 1, 2))
    side = max(ID_CELL, *(max(row.shape[-2:]) for row in rows))
    size = (side, side * images.shape[2] // images.shape[3])
    same = [torch.nn.functional.interpolate(row.float(), (size[1], size[0]), mode="nearest") for row in rows]
    names = ["picture", *(f"ids {level}" for level in range(len(maps)))]
    return grid(torch.cat(same), len(images), title="pictures, and their ids as colours", rows=names)


@torch.no_grad()
def codebook_picture(
    model: Autoencoder,  # of one id a position
    counts: Sequence[Tensor],  # L tensors [K], uses of each code
) -> Image.Image:
    """Every code as a swatch, the most used first, a block a level: the middle of a map that holds this code alone.

    The other levels hold their most used code.
    """
    device = next(model.parameters()).device
    pages = []
    for level, uses in enumerate(counts):
        order = uses.argsort(descending=True, stable=True)
        stride, tiles = model.strides[level], []
        for ids in order.to(device).split(BATCH):
            # Four positions of the top level: the middle of the picture is far from its edge.
            maps = [
                (ids if other == level else counts[other].argmax().to(device).expand(len(ids)))
                .view(-1, 1, 1)
                .expand(-1, side, side)
                for other, side in enumerate(4 * model.strides[0] // s for s in model.strides)
            ]
            pictures = model.decode_maps(maps)
            at = pictures.shape[-1] // 2
            tiles.append(pictures[..., at : at + stride, at : at + stride].cpu())
        shown = torch.nn.functional.interpolate(torch.cat(tiles), (SWATCH, SWATCH), mode="nearest")
        columns = min(32, 2 ** math.ceil(math.log2(max(len(shown), 1)) / 2))
        pages.append(grid(shown, columns, title=f"level {level}: the codes, most used first", enlarge=False))
    page = Image.new("RGB", (max(p.width for p in pages), sum(p.height for p in pages)), PAPER)
    for i, one in enumerate(pages):
        page.paste(one, (0, sum(p.height for p in pages[:i])))
    return page
