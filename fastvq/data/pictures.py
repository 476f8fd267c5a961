"""One picture: read with suspicion, brought to a size, and the one place where pixels are normalised.

Pixels are uint8 [C, H, W] until ``normalise`` makes them float32 in -1 .. 1, which is what every model takes;
``to_pixels`` is its inverse.
"""

from __future__ import annotations

import io
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastvq._checks import check_option

__all__ = ["BadPicture", "Picture", "normalise", "psnr", "read_picture", "to_pixels"]

ODD = ("skip", "convert")
MIN_SIDE = 8  # a smaller picture holds less than one position of the coarsest map
MAX_PIXELS = 64_000_000
PLAIN_MODES = ("L", "RGB", "1", "CMYK", "YCbCr")
PNG_SIGNATURE, PNG_DEPTH_AT = b"\x89PNG\r\n\x1a\n", 24


class Picture(NamedTuple):
    name: str
    pixels: Tensor  # [C, H, W] uint8
    label: int | None


class BadPicture(ValueError):
    """A picture that is left out, or refused where it is the one that was asked for: ``name``, and why."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(f"{name}: {reason}")
        self.name, self.reason = name, reason


def normalise(
    pixels: Tensor,  # [..., C, H, W] uint8
) -> Tensor:
    """float32 in -1 .. 1: pixel / 127.5 - 1."""
    return pixels.to(torch.float32) / 127.5 - 1


def to_pixels(
    image: Tensor,  # [..., C, H, W] float, normalised
) -> Tensor:
    """uint8, rounded, values outside -1 .. 1 clipped: the inverse of ``normalise``."""
    return ((image.detach().float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def psnr(
    a: Tensor,  # [B, C, H, W] normalised
    b: Tensor,
) -> Tensor:
    """[B]: 10 log10(2^2 / mean squared error) in dB; 2 is the range of normalised pixels."""
    error = (a.double() - b.double()).square().flatten(1).mean(1)
    return 10 * torch.log10(4 / error)


def read_picture(
    data: bytes,
    name: str,
    *,
    channels: int,
    size: int | None,
    odd: str = "skip",
    min_side: int = MIN_SIDE,
    max_pixels: int = MAX_PIXELS,
) -> Tensor:
    """uint8 [channels, size, size] (its own sides, with ``size=None``) of an encoded picture.

    The shorter side is brought to ``size`` and the middle is cut out. Orientation tags are obeyed.

    Args:
        channels: 1 (luma) or 3.
        odd: what to do with a palette, transparency or more than 8 bits: "skip", or "convert" (transparent pixels on
            white, 16 bits scaled to 8).

    Raises:
        BadPicture: it cannot be read (truncated, no picture), is odd and ``odd="skip"``, has a side below ``min_side``
            or more than ``max_pixels`` pixels (they are counted before any is decoded).
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    check_option("fastvq.data", "odd", odd, ODD)
    try:
        picture: Any = Image.open(io.BytesIO(data))
        width, height = picture.size
        if min(width, height) < min_side:
            raise BadPicture(name, f"too small: {width}x{height}, a side below {min_side}")
        if width * height > max_pixels:
            raise BadPicture(name, f"huge: {width}x{height}, more than {max_pixels} pixels")
        oddity = _oddity(picture, data)
        if oddity and odd == "skip":
            raise BadPicture(name, f"odd: {oddity}")
        picture.load()
        picture = ImageOps.exif_transpose(picture)
        picture = _plain(picture).convert("L" if channels == 1 else "RGB")
        if size is not None:
            picture = ImageOps.fit(picture, (size, size), Image.Resampling.LANCZOS)
    except BadPicture:
        raise
    except Image.DecompressionBombError:  # Pillow's own limit, which it checks before it tells a size
        raise BadPicture(name, f"huge: more than {max_pixels} pixels") from None
    except UnidentifiedImageError:  # its own message holds an address of memory
        raise BadPicture(name, "cannot be read: no picture of a known format") from None
    except Exception as error:  # decoders raise whatever they like on foreign bytes, and a run must go on
        raise BadPicture(name, f"cannot be read: {type(error).__name__}: {error}") from None
    pixels = torch.from_numpy(np.array(picture, dtype=np.uint8))  # a copy: PIL's memory is read-only
    return pixels[None] if channels == 1 else pixels.permute(2, 0, 1).contiguous()


def _oddity(picture: Any, data: bytes) -> str | None:
    if data.startswith(PNG_SIGNATURE) and len(data) > PNG_DEPTH_AT and data[PNG_DEPTH_AT] == 16:
        return "16 bits a channel"
    if "transparency" in picture.info or picture.mode in ("RGBA", "LA", "RGBa", "La"):
        return f"transparency (mode {picture.mode})"
    if picture.mode in ("P", "PA"):
        return f"palette (mode {picture.mode})"
    return None if picture.mode in PLAIN_MODES else f"mode {picture.mode}"


def _plain(picture: Any) -> Any:
    """Odd modes to 8 bits without transparency; the others as they are."""
    from PIL import Image

    if picture.mode.startswith("I") or picture.mode == "F":
        values = np.asarray(picture).astype(np.float64)
        top = 65535.0 if picture.mode.startswith("I") else max(float(values.max()), 1.0)
        return Image.fromarray((values / top * 255).round().clip(0, 255).astype(np.uint8))
    if "transparency" in picture.info or picture.mode in ("P", "PA", "RGBA", "LA", "RGBa", "La"):
        picture = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, picture)
    return picture
