"""Pictures that come as a stream: WebDataset shards, tar files of pictures with their labels beside them.

A shard is read from its front to its end and never held, from a disk or from http(s), so a data set may be larger than
any disk here.
"""

from __future__ import annotations

import glob
import json
import re
import tarfile
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np

from fastvq.data.pictures import BadPicture, Picture, read_picture
from fastvq.data.sources import EXTENSIONS, OP

__all__ = ["Shards", "expand"]

MAX_MEMBER_BYTES = 256 << 20  # a larger member is no picture


class _Sample(NamedTuple):
    name: str
    data: bytes | None  # None: the member is too large to be read
    label: int | None


class Shards:
    """Pictures of WebDataset shards: members of one name, ``x.jpg`` and ``x.cls`` (or ``x.json`` with ``label``), are
    one sample.

    Args:
        pattern: a path or http(s) address, with ``{000..127}`` or ``*`` (paths only) for many.
        buffer: how many pictures a shuffle holds at a time.
    """

    n_classes: int | None = None

    def __init__(
        self, pattern: str, size: int = 64, channels: int = 3, odd: str = "skip", n_classes: int | None = None,
        buffer: int = 1000,
    ) -> None:  # fmt: skip
        self.name, self.size, self.channels, self.odd, self.buffer = "shards", size, channels, odd, buffer
        self.n_classes = n_classes
        self.shards = expand(pattern)
        self.skipped: dict[str, str] = {}

    def stream(self, *, rank: int = 0, world: int = 1) -> Iterator[Picture]:
        """All pictures once, in order: this rank's shards, or its share of the pictures where there are fewer shards
        than ranks."""
        yield from self._decoded(self._samples(list(range(len(self.shards))), rank, world))

    def shuffled(self, seed: int, epoch: int, *, rank: int = 0, world: int = 1) -> Iterator[Picture]:
        """All pictures once, shards in a random order and pictures shuffled within ``buffer``; one seed, one order."""
        order = [int(i) for i in np.random.default_rng((seed, epoch)).permutation(len(self.shards))]
        rng = np.random.default_rng((seed, epoch, rank))
        held: list[_Sample] = []
        for sample in self._samples(order, rank, world):
            held.append(sample)
            if len(held) == self.buffer:
                yield from self._decoded(iter([held.pop(int(rng.integers(len(held))))]))
        for i in rng.permutation(len(held)):
            yield from self._decoded(iter([held[int(i)]]))

    def _decoded(self, samples: Iterator[_Sample]) -> Iterator[Picture]:
        for sample in samples:
            try:
                if sample.data is None:
                    raise BadPicture(sample.name, f"huge: a member of more than {MAX_MEMBER_BYTES} bytes")
                pixels = read_picture(sample.data, sample.name, channels=self.channels, size=self.size, odd=self.odd)
            except BadPicture as bad:
                self.skipped[bad.name] = bad.reason
                continue
            yield Picture(sample.name, pixels, sample.label)

    def _samples(self, order: list[int], rank: int, world: int) -> Iterator[_Sample]:
        by_shard = len(self.shards) >= world
        count = 0
        for shard in order[rank::world] if by_shard else order:
            for sample in self._read(self.shards[shard]):
                if by_shard or count % world == rank:
                    yield sample
                count += 1

    def _read(self, shard: str) -> Iterator[_Sample]:
        """The samples of one shard; what follows a broken place in it is left out, with its name."""
        stem = Path(shard).name
        try:
            with _open(shard) as file, tarfile.open(fileobj=file, mode="r|*") as tar:
                key, picture, label, too_large = None, None, None, False
                for member in tar:
                    if not member.isfile():
                        continue
                    folder, _, base = member.name.rpartition("/")
                    name, _, extension = base.partition(".")
                    if (folder, name) != key:
                        if key is not None and (picture is not None or too_large):
                            yield _Sample(f"{stem}/{'/'.join(filter(None, key))}", picture, label)
                        key, picture, label, too_large = (folder, name), None, None, False
                    kind = "." + extension.lower().rpartition(".")[2]
                    if kind not in (*EXTENSIONS, ".cls", ".json"):
                        continue
                    if member.size > MAX_MEMBER_BYTES:
                        too_large = kind in EXTENSIONS
                        continue
                    handle = tar.extractfile(member)
                    data = handle.read() if handle else b""
                    if kind in EXTENSIONS:
                        picture = data
                    else:
                        label = _label(data, kind) if label is None else label
                if key is not None and (picture is not None or too_large):
                    yield _Sample(f"{stem}/{'/'.join(filter(None, key))}", picture, label)
        except (tarfile.TarError, OSError, EOFError) as error:
            self.skipped[shard] = f"shard cannot be read to its end: {error}"


def _label(data: bytes, kind: str) -> int | None:
    try:
        if kind == ".cls":
            return int(data.decode().strip())
        value = json.loads(data)
        return int(value["label"]) if isinstance(value, dict) and "label" in value else None
    except (ValueError, TypeError):
        return None


def _open(shard: str) -> IO[bytes]:
    if re.match(r"https?://", shard):
        return urllib.request.urlopen(shard)
    return open(shard, "rb")


def expand(pattern: str) -> list[str]:
    """``a-{000..002}.tar`` -> a-000.tar, a-001.tar, a-002.tar; a path with ``*`` -> the files there, by name.

    Raises:
        ValueError: there is no such file.
    """
    braces = re.search(r"\{(\d+)\.\.(\d+)\}", pattern)
    if braces:
        low, high = braces.group(1), braces.group(2)
        numbers = (str(i).zfill(len(low)) for i in range(int(low), int(high) + 1))
        found = [s for n in numbers for s in expand(pattern[: braces.start()] + n + pattern[braces.end() :])]
    elif re.match(r"https?://", pattern):
        found = [pattern]
    else:
        found = sorted(glob.glob(pattern)) or ([pattern] if Path(pattern).is_file() else [])
    if not found:
        raise ValueError(f"{OP}: there is no shard {pattern}")
    return found
