"""Reads one picture, checks it and scales it to a size; the only place where pixels are normalised.

Pixels are uint8 [C, H, W]. ``normalise`` turns them into float32 in -1 .. 1, the input of every model; ``to_pixels`` is
its inverse.
"""

from __future__ import annotations

import io
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastvq._checks import check_option
from fastvq._shorten import shorten_text

__all__ = [
    "MAX_SIZE",
    "BadPicture",
    "Picture",
    "check_size",
    "normalise",
    "psnr",
    "read_fitting",
    "read_picture",
    "to_pixels",
]

ODD = ("skip", "convert")
MIN_SIDE = 8  # a smaller picture holds less than one position of the coarsest map
MAX_PIXELS = 64_000_000
MAX_SIZE = 8000  # a larger square has more than MAX_PIXELS
# Decoders of the documented extensions. Without a list Pillow tries all of its decoders, and some run other programs.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
PLAIN_MODES = ("L", "RGB", "1", "CMYK", "YCbCr")
PNG_SIGNATURE, PNG_DEPTH_AT = b"\x89PNG\r\n\x1a\n", 24
TIFF_BITS, TIFF_SAMPLE_FORMAT, TIFF_UNSIGNED = 258, 339, 1


class Picture(NamedTuple):
    """A picture of a set.

    Attributes:
        name: of its file, or its place in the set.
        pixels: [C, H, W] uint8.
        label: its class, or None.
    """

    name: str
    pixels: Tensor
    label: int | None


class BadPicture(ValueError):
    """A picture that cannot be used: ``name`` and ``reason``. Sets leave it out; a single picture is refused."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(f"{name}: {reason}")
        self.name, self.reason = name, reason


def check_size(op: str, size: int | None, stride: int = 1) -> None:
    """ValueError where ``size`` is out of range for the side of a picture, or not a multiple of ``stride``."""
    if size is not None and not 1 <= size <= MAX_SIZE:
        raise ValueError(f"{op}: size must be in 1 .. {MAX_SIZE} pixels, got {size}")
    if size is not None and size % stride:
        raise ValueError(f"{op}: size must be multiples of {stride}, the stride of the model's top level, got {size}")


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
    size: int | tuple[int, int] | None,
    odd: str = "skip",
    min_side: int = MIN_SIDE,
    max_pixels: int = MAX_PIXELS,
) -> Tensor:
    """Decodes a picture to uint8 [channels, size, size], or [channels, H, W] with ``size=None`` or ``size=(H, W)``.

    The picture is scaled until it covers ``size``, and the middle is cut out. Orientation tags are applied.

    Args:
        channels: 1 (luma) or 3.
        odd: treatment of a palette, transparency or more than 8 bits: "skip" or "convert". "convert" puts transparent
            pixels on white and scales to 8 bits: 16 bits by their range, other whole and floating numbers by the
            picture's largest value. A picture that would come out black is refused.

    Raises:
        BadPicture: it cannot be read (truncated, not a picture), is odd with ``odd="skip"``, has a side below
            ``min_side`` or more than ``max_pixels`` pixels (counted before any pixel is decoded).
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    check_option("fastvq.data", "odd", odd, ODD)
    try:
        picture: Any = Image.open(io.BytesIO(data), formats=FORMATS)
        width, height = picture.size
        if min(width, height) < min_side:
            raise BadPicture(name, f"too small: {width}x{height}, a side below {min_side}")
        if width * height > max_pixels:
            raise BadPicture(name, f"huge: {width}x{height}, more than {max_pixels} pixels")
        depth = _depth(picture, data)
        oddity = _oddity(picture, depth)
        if oddity and odd == "skip":
            raise BadPicture(name, f"odd: {oddity}")
        picture.load()
        picture = ImageOps.exif_transpose(picture)
        picture = _plain(picture, depth).convert("L" if channels == 1 else "RGB")
        if depth.bits > 8 and np.asarray(picture).max() <= 1:
            raise BadPicture(name, f"black: of {depth.bits} bits a channel the upper 8 hold next to nothing")
        if size is not None:
            height, width = (size, size) if isinstance(size, int) else size
            picture = ImageOps.fit(picture, (width, height), Image.Resampling.LANCZOS)
    except BadPicture:
        raise
    # Pillow checks its own limits before it reports a size. The warning arrives here if the caller made it an error.
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise BadPicture(name, f"huge: more than {max_pixels} pixels") from None
    except UnidentifiedImageError:  # Pillow's message holds a memory address
        raise BadPicture(name, f"cannot be read: no picture of a known format ({', '.join(FORMATS)})") from None
    except Exception as error:  # decoders raise many types on foreign bytes, and a run must go on
        raise BadPicture(name, f"cannot be read: {type(error).__name__}: {shorten_text(error)}") from None
    pixels = torch.from_numpy(np.array(picture, dtype=np.uint8))  # a copy: PIL's memory is read-only
    return pixels[None] if channels == 1 else pixels.permute(2, 0, 1).contiguous()


def read_fitting(
    data: bytes, name: str, *, channels: int, stride: int, size: int | tuple[int, int] | None
) -> Tensor:  # [C, H, W] uint8
    """``read_picture`` of a single picture for a model, odd kinds converted. Its sides are cut to multiples of
    ``stride``, the model's top level's; the picture's right and lower edges lose at most stride - 1 pixels.

    Raises:
        BadPicture: as ``read_picture``, and where a side is shorter than ``stride``.
    """
    pixels = read_picture(data, name, channels=channels, size=size, odd="convert")
    height, width = (side // stride * stride for side in pixels.shape[1:])
    if not height or not width:
        sides = f"{pixels.shape[2]}x{pixels.shape[1]}"
        raise BadPicture(name, f"too small: {sides}, a side below {stride}, the stride of the model's top level")
    return pixels[:, :height, :width].contiguous()


class _Depth(NamedTuple):
    bits: int  # a channel
    any_range: bool  # the largest possible value is not known from the number of bits
    unsigned: bool


def _depth(picture: Any, data: bytes) -> _Depth:
    if data.startswith(PNG_SIGNATURE) and len(data) > PNG_DEPTH_AT:
        return _Depth(data[PNG_DEPTH_AT], False, True)
    if picture.format == "TIFF":
        unsigned = TIFF_UNSIGNED in picture.tag_v2.get(TIFF_SAMPLE_FORMAT, (TIFF_UNSIGNED,))
        return _Depth(max(picture.tag_v2.get(TIFF_BITS, (1,))), True, unsigned)
    # Pillow scales a PGM to 16 bits.
    return _Depth(16 if picture.mode.startswith("I") else 8, False, True)


def _oddity(picture: Any, depth: _Depth) -> str | None:
    if depth.bits > 8:
        return f"{depth.bits} bits a channel"
    if "transparency" in picture.info or picture.mode in ("RGBA", "LA", "RGBa", "La"):
        return f"transparency (mode {picture.mode})"
    if picture.mode in ("P", "PA"):
        return f"palette (mode {picture.mode})"
    return None if picture.mode in PLAIN_MODES else f"mode {picture.mode}"


def _plain(picture: Any, depth: _Depth) -> Any:
    """Converts odd modes to 8 bits without transparency; other modes are unchanged."""
    from PIL import Image

    if picture.mode.startswith("I") or picture.mode == "F":
        return Image.fromarray(_eight_bits(picture, depth))
    if "transparency" in picture.info or picture.mode in ("P", "PA", "RGBA", "LA", "RGBa", "La"):
        picture = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, picture)
    return picture


def _eight_bits(
    picture: Any,  # mode I (whole numbers) or F (float32)
    depth: _Depth,
) -> np.ndarray:  # [H, W] uint8
    values = np.asarray(picture)
    if picture.mode == "I" and depth.bits == 32 and depth.unsigned:
        values = values.view(np.uint32)  # Pillow reads all 32-bit numbers as signed
    values = values.astype(np.float64)
    if not np.isfinite(values).all():
        raise ValueError("it holds NaN or infinity")
    low = min(0.0, float(values.min()))
    span = 65535.0
    if depth.any_range:
        # TIFFs of 16 bits may hold numbers of 10, 12 or 14 bits; other whole and floating numbers have any range.
        largest = float(values.max())
        known = (1.0, 255.0) if picture.mode == "F" else (255.0, 1023.0, 4095.0, 16383.0, 65535.0)
        span = next((top for top in known if low == 0 and largest <= top), largest - low)
    if span == 0:
        raise ValueError("all of its numbers are the same, and none is above 0")
    return ((values - low) / span * 255).round().clip(0, 255).astype(np.uint8)
