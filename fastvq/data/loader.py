"""Batches in an order that depends only on a seed, so that a resumed run continues with the same batches."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastvq._checks import check_option
from fastvq._shorten import SHOWN_NOTE, shorten_text
from fastvq.data.pictures import Picture, normalise
from fastvq.data.shards import Shards
from fastvq.data.sources import OP, Source

__all__ = ["AUGMENTATIONS", "Batch", "Loader"]

AUGMENTATIONS = ("none", "shift", "flip")
SHIFT = 2  # pixels


class Batch(NamedTuple):
    """Pictures of one micro-batch.

    Attributes:
        images: [B, C, H, W] float32, normalised.
        labels: [B] int64, or None where the set has no labels.
    """

    images: Tensor
    labels: Tensor | None


class Loader:
    """Makes the batches of a run. Rank r of ``world`` makes batches g = r, r + world, ...; g alone fixes their content.

    So two processes with one micro-batch a step see the same pictures as one process with two. Every epoch has its own
    order; a batch may span two epochs. A picture that cannot be used is replaced by the next usable one.

    Args:
        augment: "none", "shift" (by up to 2 pixels, edges repeated) or "flip" (half of the pictures, left to right).
        workers: threads that decode ahead.
    """

    def __init__(
        self,
        source: Source | Shards,
        batch_size: int,
        *,
        seed: int = 0,
        augment: str = "none",
        rank: int = 0,
        world: int = 1,
        workers: int = 2,
    ) -> None:
        check_option(OP, "augment", augment, AUGMENTATIONS)
        if batch_size < 1:
            raise ValueError(f"{OP}: batch_size must be at least 1, got {batch_size}")
        self.source, self.batch_size, self.seed, self.augment = source, batch_size, seed, augment
        self.rank, self.world, self.workers = rank, world, workers
        self._order: tuple[int, np.ndarray] = (-1, np.empty(0))

    def batches(self, start: int = 0) -> Generator[Batch, None, None]:
        """This rank's batches from its ``start``-th on, without end. A stream of shards is read again up to there."""
        made = self._streamed(start) if isinstance(self.source, Shards) else self._numbered(start)
        # Each batch is made while the one before it is in use.
        with ThreadPoolExecutor(1) as ahead:
            waiting: Future[Batch | None] = ahead.submit(next, made, None)
            while (batch := waiting.result()) is not None:
                waiting = ahead.submit(next, made, None)
                yield batch

    def _numbered(self, start: int) -> Iterator[Batch]:
        with ThreadPoolExecutor(max(1, self.workers)) as pool:
            number = start * self.world + self.rank
            while True:
                first = number * self.batch_size
                indices = [self._index(i) for i in range(first, first + self.batch_size)]
                pictures = list(pool.map(self._usable, indices)) if self.workers else [*map(self._usable, indices)]
                yield self._collate(pictures, number)
                number += self.world

    def _streamed(self, start: int) -> Iterator[Batch]:
        assert isinstance(self.source, Shards)
        batch: list[Picture] = []
        number, epoch = 0, 0
        while True:
            before = (number, len(batch))
            for picture in self.source.shuffled(self.seed, epoch, rank=self.rank, world=self.world):
                batch.append(picture)
                if len(batch) == self.batch_size:
                    if number >= start:
                        yield self._collate(batch, number * self.world + self.rank)
                    number, batch = number + 1, []
            if (number, len(batch)) == before:
                raise ValueError(f"{OP}: no picture of {self.source.name} can be used: {_first(self.source.skipped)}")
            epoch += 1

    def _index(self, position: int) -> int:
        """The index of the picture at a position in the endless sequence of shuffled epochs."""
        assert isinstance(self.source, Source)
        epoch, offset = divmod(position, len(self.source))
        if self._order[0] != epoch:
            self._order = (epoch, np.random.default_rng((self.seed, epoch)).permutation(len(self.source)))
        return int(self._order[1][offset])

    def _usable(self, index: int) -> Picture:
        assert isinstance(self.source, Source)
        for offset in range(len(self.source)):
            picture = self.source.get((index + offset) % len(self.source))
            if picture is not None:
                return picture
        raise ValueError(f"{OP}: no picture of {self.source.name} can be used: {_first(self.source.skipped)}")

    def _collate(self, pictures: list[Picture], number: int) -> Batch:
        pixels = torch.stack([p.pixels for p in pictures])
        rng = np.random.default_rng((self.seed, 1, number))
        if self.augment == "shift":
            pixels = _shifted(pixels, rng)
        elif self.augment == "flip":
            flipped = torch.from_numpy(rng.random(len(pictures)) < 0.5)
            pixels = torch.where(flipped[:, None, None, None], pixels.flip(-1), pixels)
        known = [p.label for p in pictures if p.label is not None]
        labels = torch.tensor(known, dtype=torch.int64, device="cpu") if len(known) == len(pictures) else None
        return Batch(normalise(pixels), labels)


def _shifted(pixels: Tensor, rng: np.random.Generator) -> Tensor:
    batch, _, height, width = pixels.shape
    dy, dx = (torch.from_numpy(rng.integers(-SHIFT, SHIFT + 1, batch)) for _ in range(2))
    image, down, across = (torch.arange(n, device="cpu") for n in (batch, height, width))
    rows = (down + dy[:, None]).clamp(0, height - 1)  # [B, H]
    columns = (across + dx[:, None]).clamp(0, width - 1)
    return pixels[image[:, None, None], :, rows[:, :, None], columns[:, None, :]].movedim(-1, 1)


def _first(skipped: dict[str, str]) -> str:
    return next((shorten_text(f"{name}: {reason}", SHOWN_NOTE) for name, reason in skipped.items()), "it is empty")
