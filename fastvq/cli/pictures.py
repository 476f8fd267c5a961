"""Pictures that the commands write: grids, samples by class, an edit before and after, a plot of code use."""

from __future__ import annotations

import functools
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from fastvq._files import write_atomically
from fastvq.data import to_pixels

__all__ = [
    "BAR",
    "GAP",
    "INK",
    "LINE",
    "PAIRED",
    "PAPER",
    "check_picture_path",
    "draw_text",
    "edit_picture",
    "grid",
    "save_image",
    "save_picture",
    "text_width",
    "usage_plot",
]

FORMATS: dict[str, tuple[str, dict[str, Any]]] = {  # extension of the file: Pillow's format and options
    ".png": ("png", {"optimize": True}),
    ".jpg": ("jpeg", {"quality": 95}),
    ".jpeg": ("jpeg", {"quality": 95}),
    ".webp": ("webp", {"lossless": True}),
    ".bmp": ("bmp", {}),
}
GAP = 2
SIDE = 96  # small pictures are enlarged to about this many pixels
LINE = 16  # height of a line of text
FONT_SIZE = 12
INK, PAPER, BAR, MARK = (20, 20, 20), (255, 255, 255), (52, 101, 164), (204, 0, 0)
PAIRED = "upper rows: pictures; lower rows: what their ids decode to"
DIFFERENCE_GAIN = 2


def check_picture_path(option: str, path: Path) -> None:
    """ValueError unless the path's extension names a format that can be written."""
    if path.suffix.lower() not in FORMATS:
        raise ValueError(f"{option} must end in one of {', '.join(FORMATS)}, got {str(path)!r}")


def save_image(path: Path, picture: Image.Image) -> None:
    """Writes a picture in the format of the path's extension; lossy formats at high quality."""
    data = io.BytesIO()
    form, options = FORMATS[path.suffix.lower()]
    picture.save(data, form, **options)
    write_atomically(path, data.getvalue())


def save_picture(
    path: Path,
    image: Tensor,  # [C, H, W] normalised
) -> None:
    save_image(path, _to_image(image, 1))


def grid(
    images: Tensor,  # [N, C, H, W] normalised, row by row
    columns: int,
    *,
    title: str = "",
    rows: Sequence[str] = (),  # a name in front of each row
    enlarge: bool = True,
) -> Image.Image:
    height, width = images.shape[2:]
    scale = max(1, SIDE // max(height, width)) if enlarge else 1
    cell_w, cell_h = width * scale + GAP, height * scale + GAP
    n_rows = -(-len(images) // columns)
    left = max((text_width(name) for name in rows), default=0) + (2 * GAP if rows else 0)
    top = LINE + GAP if title else 0
    page = Image.new("RGB", (max(left + columns * cell_w, text_width(title)) + GAP, top + n_rows * cell_h + GAP), PAPER)
    draw = ImageDraw.Draw(page)
    if title:
        draw_text(draw, (GAP, GAP), title)
    for i, image in enumerate(images):
        row, column = divmod(i, columns)
        page.paste(_to_image(image, scale), (left + column * cell_w + GAP, top + row * cell_h + GAP))
    for row, name in enumerate(rows):
        draw_text(draw, (GAP, top + row * cell_h + cell_h // 2 - LINE // 2), name)
    return page


def paired(
    originals: Tensor,  # [N, C, H, W]
    others: Tensor,
    columns: int,
) -> Tensor:
    """Both in the order of one grid: rows of originals and rows of the others alternate."""
    rows = [torch.cat(pair) for pair in zip(originals.split(columns), others.split(columns), strict=True)]
    return torch.cat(rows)


def edit_picture(
    original: Tensor,  # [C, H, W]
    reconstruction: Tensor,
    edited: Tensor,
    mask: Tensor,  # [H, W] bool, the region
    title: str = "",
) -> Image.Image:
    """Four pictures side by side: the original with the region framed, its reconstruction, the edit, and the difference
    of the last two, on grey."""
    difference = ((edited - reconstruction) * DIFFERENCE_GAIN / 2).clamp(-1, 1)
    page = grid(torch.stack([original, reconstruction, edited, difference]), 4, title=title or " ")
    scale = max(1, SIDE // max(mask.shape))
    ys, xs = torch.nonzero(mask, as_tuple=True)
    x0, y0, x1, y1 = (int(v) * scale for v in (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1))
    top = LINE + 2 * GAP
    ImageDraw.Draw(page).rectangle((GAP + x0, top + y0, GAP + x1 - 1, top + y1 - 1), outline=MARK)
    step = mask.shape[1] * scale + GAP
    tall = Image.new("RGB", (page.width, page.height + LINE), PAPER)
    tall.paste(page, (0, 0))
    draw = ImageDraw.Draw(tall)
    for i, name in enumerate(("picture", "reconstruction", "edited", "change")):
        draw_text(draw, (GAP + i * step, page.height - 1), name)
    return tall


def usage_plot(
    counts: Sequence[Tensor],  # L tensors [K]: number of uses of each code, top first
) -> Image.Image:
    """A bar chart for each level: one bar a code, the most used first."""
    width, height = 640, 150
    page = Image.new("RGB", (width, len(counts) * height), PAPER)
    draw = ImageDraw.Draw(page)
    for level, level_counts in enumerate(counts):
        ordered = level_counts.double().sort(descending=True).values
        share = ordered / ordered.sum().clamp(min=1)
        perplexity = float(torch.exp(-torch.special.xlogy(share, share).sum()))
        used = int((ordered > 0).sum())
        base, tall = (level + 1) * height - 2 * GAP, height - LINE - 6 * GAP
        shown = f"level {level}: {used} of {len(ordered)} codes in use, perplexity {perplexity:.1f}; "
        draw_text(draw, (GAP, level * height + GAP), f"{shown}most used {share[0]:.1%} of positions")
        draw.line((GAP, base, width - GAP, base), fill=INK)
        span = (width - 2 * GAP) / len(ordered)
        for k, value in enumerate((share / share.max().clamp(min=1e-12)).tolist()):
            x0 = GAP + k * span
            if value:
                draw.rectangle((x0, base - value * tall, max(x0, x0 + span - 1), base), fill=BAR)
    return page


def _to_image(
    image: Tensor,  # [C, H, W]
    scale: int,
) -> Image.Image:
    pixels = to_pixels(image.cpu())
    if pixels.shape[0] not in (1, 3):
        pixels = pixels[:1]  # with another number of channels show the first
    picture = Image.fromarray(pixels[0].numpy() if len(pixels) == 1 else pixels.permute(1, 2, 0).contiguous().numpy())
    return picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)


@functools.cache
def _font() -> Any:
    """Pillow's scalable font; its bitmap font where Pillow was built without FreeType."""
    return ImageFont.load_default(FONT_SIZE)


def draw_text(draw: ImageDraw.ImageDraw, place: tuple[float, float], text: str) -> None:
    draw.text(place, text, fill=INK, font=_font())


def text_width(text: str) -> int:
    return int(ImageDraw.Draw(Image.new("L", (1, 1))).textlength(text, font=_font())) + 2 * GAP if text else 0
