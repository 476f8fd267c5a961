"""Pictures read as a stream from WebDataset shards: tar files of pictures and their labels.

A shard is read once from start to end, from a disk or over http(s), and never stored. So a data set may be larger than
the local disk.
"""

from __future__ import annotations

import bz2
import contextlib
import glob
import gzip
import io
import lzma
import os
import re
import stat
import urllib.parse
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from fastvq._shorten import SHOWN_NOTE, shorten_text
from fastvq.data.http import HttpFile
from fastvq.data.pictures import BadPicture, Picture, read_picture
from fastvq.data.samples import Sample, check_field, read_samples
from fastvq.data.sources import OP
from fastvq.data.tar import BROKEN, BrokenArchive, TarReader

__all__ = ["Shards", "expand", "is_archive"]

MAX_SHARDS = 1_000_000
BUFFER_BYTES = 1 << 16
# The first bytes of compressed files. Other files are read as plain tar.
GZIP, BZIP2, XZ, ZSTANDARD = b"\x1f\x8b", b"BZh", b"\xfd7zXZ\0", b"\x28\xb5\x2f\xfd"
SUFFIXES = r"\.(tar(\.\w+)?|tgz|tbz2?|txz)$"


class Shards:
    """Pictures of WebDataset shards; ``fastvq.data.samples`` groups their members into samples. ``skipped`` holds the
    name of each sample that cannot be used, and of each shard that cannot be read to its end, with the reason.

    Args:
        pattern: a path or http(s) address, with ``{000..127}`` or ``*`` (paths only) for many.
        field: the field of a sample that is its picture, needed where several are pictures.
        n_classes: if given, labels of n_classes and above are refused.
        buffer: number of samples that a shuffle holds at a time.
    """

    def __init__(
        self,
        pattern: str,
        size: int = 64,
        channels: int = 3,
        odd: str = "skip",
        n_classes: int | None = None,
        buffer: int = 1000,
        field: str | None = None,
    ) -> None:
        check_field(field)
        self.name, self.size, self.channels, self.odd, self.buffer = "shards", size, channels, odd, buffer
        self.n_classes, self.field = n_classes, field
        self.shards = expand(pattern)
        self.labels = _short_names(self.shards)
        self.skipped: dict[str, str] = {}

    def listing(self) -> list[tuple[str, int]]:
        """(name, bytes) of every shard; bytes are -1 on a web server."""
        sizes = [-1 if _is_address(shard) else os.stat(shard).st_size for shard in self.shards]
        return list(zip(self.labels, sizes, strict=True))

    def stream(self, *, rank: int = 0, world: int = 1) -> Iterator[Picture]:
        """All pictures of this rank once, in order: those of every ``world``-th shard, or every ``world``-th picture if
        there are fewer shards than ranks."""
        yield from self._decoded(self._samples(list(range(len(self.shards))), rank, world))

    def shuffled(self, seed: int, epoch: int, *, rank: int = 0, world: int = 1) -> Iterator[Picture]:
        """All pictures once: shards in random order, pictures shuffled within ``buffer``. The seed fixes the order."""
        order = [int(i) for i in np.random.default_rng((seed, epoch)).permutation(len(self.shards))]
        rng = np.random.default_rng((seed, epoch, rank))
        buffered: list[Sample] = []
        for sample in self._samples(order, rank, world):
            buffered.append(sample)
            if len(buffered) == self.buffer:
                yield from self._decoded(iter([buffered.pop(int(rng.integers(len(buffered))))]))
        for i in rng.permutation(len(buffered)):
            yield from self._decoded(iter([buffered[int(i)]]))

    def samples(self, number: int) -> Iterator[Sample]:
        """The samples of one shard, in its order. ``skipped`` names the shard if it cannot be read to its end."""
        shard = self.shards[number]
        self.skipped.pop(shard, None)
        last = ""
        try:
            with _open(shard) as tar:
                note = self.skipped.__setitem__
                for sample in read_samples(tar, self.labels[number], self.field, note, self.n_classes):
                    last = sample.name
                    yield sample
        except BROKEN as error:
            after = f"; what follows {shorten_text(last)} is left out" if last else ""
            reason = shorten_text(error, SHOWN_NOTE) or type(error).__name__
            self.skipped[shard] = f"shard cannot be read to its end: {reason}{after}"

    def is_whole(self, number: int) -> bool:
        """Whether a shard was read to its end. Call it after all of its ``samples`` were taken."""
        return self.shards[number] not in self.skipped

    def decode(self, sample: Sample) -> Picture | None:
        """The picture of a sample, or None where it cannot be used."""
        try:
            if sample.data is None:
                raise BadPicture(sample.name, sample.problem)
            pixels = read_picture(sample.data, sample.name, channels=self.channels, size=self.size, odd=self.odd)
        except BadPicture as bad:
            self.skipped[bad.name] = bad.reason
            return None
        return Picture(sample.name, pixels, sample.label)

    def _decoded(self, samples: Iterator[Sample]) -> Iterator[Picture]:
        yield from (picture for picture in map(self.decode, samples) if picture is not None)

    def _samples(self, order: list[int], rank: int, world: int) -> Iterator[Sample]:
        by_shard = len(self.shards) >= world
        count = 0
        for shard in order[rank::world] if by_shard else order:
            for sample in self.samples(shard):
                if by_shard or count % world == rank:
                    yield sample
                count += 1


@contextlib.contextmanager
def _open(shard: str) -> Iterator[TarReader]:
    with contextlib.ExitStack() as stack:
        raw: io.RawIOBase = HttpFile(shard) if _is_address(shard) else io.FileIO(shard)
        file = stack.enter_context(io.BufferedReader(stack.enter_context(raw), BUFFER_BYTES))
        start = file.peek(len(XZ))[: len(XZ)]
        if start.startswith(ZSTANDARD):
            raise BrokenArchive("compressed with Zstandard, which is not read; unpack it, or pack it with gzip")
        size = None
        if isinstance(raw, io.FileIO) and stat.S_ISREG(os.fstat(raw.fileno()).st_mode):
            size = os.fstat(raw.fileno()).st_size
        if start.startswith(GZIP):
            yield TarReader(stack.enter_context(gzip.GzipFile(fileobj=file)))
        elif start.startswith(BZIP2):
            yield TarReader(stack.enter_context(bz2.BZ2File(file)))
        elif start.startswith(XZ):
            yield TarReader(stack.enter_context(lzma.LZMAFile(file)))
        else:
            yield TarReader(file, size)


def _is_address(shard: str) -> bool:
    return re.match(r"https?://", shard) is not None


def is_archive(name: str) -> bool:
    """Whether a name is that of shards: a .tar, .tar.gz, .tgz, .tbz2 or .txz file, or a web address."""
    return _is_address(name) or re.search(SUFFIXES, name, re.IGNORECASE) is not None


def _short_names(shards: list[str]) -> list[str]:
    """Short, different names of the shards: their paths below the folder that they all share."""
    # Of a web address, only the path counts.
    paths = [urllib.parse.unquote(re.sub(r"^https?://[^/]*|[?#].*$", "", s)) if _is_address(s) else s for s in shards]
    parts = [Path(path).parts or ("shard",) for path in paths]
    shared = 0
    while all(len(p) > shared + 1 and p[shared] == parts[0][shared] for p in parts):
        shared += 1
    short = ["/".join(p[shared:]) for p in parts]
    if len(set(short)) == len(short):
        return short
    # Addresses whose paths are the same, but not their queries: number them.
    digits = len(str(len(shards)))
    return [f"{number:0{digits}d}-{name}" for number, name in enumerate(short)]


def expand(pattern: str) -> list[str]:
    """``a-{000..002}.tar`` -> a-000.tar, a-001.tar, a-002.tar; a path with ``*`` -> the files there, by name.

    Raises:
        ValueError: there is no such file.
    """
    braces = re.search(r"\{(\d+)\.\.(\d+)\}", pattern)
    if braces:
        low, high = braces.group(1), braces.group(2)
        if int(high) - int(low) >= MAX_SHARDS:
            raise ValueError(f"{OP}: {shorten_text(pattern)} stands for more than {MAX_SHARDS} shards")
        numbers = (str(i).zfill(len(low)) for i in range(int(low), int(high) + 1))
        found = [s for n in numbers for s in expand(pattern[: braces.start()] + n + pattern[braces.end() :])]
    elif _is_address(pattern):
        found = [pattern]
    else:
        found = [pattern] if os.path.isfile(pattern) else sorted(glob.glob(pattern))
    if not found:
        raise ValueError(f"{OP}: there is no shard {shorten_text(pattern)}")
    return found
