"""Archives with random faults: no exception, no long wait, and no picture is lost without a word."""

import bz2
import gzip
import io
import lzma
import random
import tarfile
import time

import pytest

from fastvq.data import Shards
from fastvq.data.tar import BROKEN, TarReader
from tests.support.archives import BLOCK, END, archive, header, padded, png, with_tarfile

SECONDS = 5.0
MEMBERS = [member for i in range(4) for member in ((f"a/{i}.png", png(i)), (f"a/{i}.cls", b"%d" % i))]
LONG = [(f"{'long/' * 30}{i}.png", png(i)) for i in range(2)]
FORMATS = (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)
WHOLE = [archive(MEMBERS), *(with_tarfile([*MEMBERS, *LONG], form) for form in FORMATS)]
PACKS = [bytes, gzip.compress, bz2.compress, lzma.compress]
KINDS = b"0123456LKxgSDVM\0\xff"


def flipped(data, rng):
    """A few bytes changed, somewhere or at the front of a block, where headers are."""
    data = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 8))):
        at = rng.randrange(len(data))
        if rng.random() < 0.5:
            at = min(at // BLOCK * BLOCK + rng.choice((0, 100, 124, 130, 148, 156, 257, 345)), len(data) - 1)
        data[at] ^= rng.randrange(1, 256)
    return bytes(data)


def cut(data, rng):
    return data[: rng.randrange(len(data))]


def moved(data, rng):
    """Blocks taken away, doubled, or put elsewhere."""
    blocks = [data[i : i + BLOCK] for i in range(0, len(data), BLOCK)]
    first, n = rng.randrange(len(blocks)), rng.randrange(1, 4)
    taken = blocks[first : first + n]
    if rng.random() < 0.7:
        del blocks[first : first + n]
    if rng.random() < 0.7:
        blocks[(at := rng.randrange(len(blocks) + 1)) : at] = taken
    return b"".join(blocks)


def lying(data, rng):
    """Headers with right checksums and wrong sizes, kinds and attributes."""
    parts = []
    for name, content in MEMBERS:
        kind, size = b"0", len(content)
        if rng.random() < 0.3:
            size = rng.choice((0, 1, 511, 513, size + BLOCK, 1 << 30, (1 << 33) - 1, b"\x80" + rng.randbytes(11)))
        if rng.random() < 0.3:
            kind = bytes([rng.choice(KINDS)])
        if rng.random() < 0.3:
            record = rng.choice(
                (b"12 size=512\n", b"13 path=../x\n", b"9 size=\n", b"0 \n", b"99999999 a=b\n", b"x", b"")
            )
            parts += [header("x", len(record), rng.choice((b"x", b"g"))), padded(record)]
        parts += [header(name, size, kind), padded(content)]
    return b"".join(parts) + rng.choice((END, END, b"", bytes(BLOCK)))


@pytest.mark.fuzz(weight=1)
def test_an_archive_with_faults_is_read_or_named(fuzz, tmp_path):
    path = tmp_path / "set.tar"
    for number in range(fuzz.count):
        rng = random.Random(f"{fuzz.seed} {number}")
        fault = rng.choice((flipped, cut, moved, lying))
        pack, whole = rng.choice(PACKS), rng.choice(WHOLE)
        data = fault(pack(whole), rng) if rng.random() < 0.5 else pack(fault(whole, rng))
        path.write_bytes(data)
        began = time.monotonic()
        source = Shards(str(path), size=16)
        names = [p.name for p in source.stream()]
        said = f"example {number}, {fault.__name__}, {pack.__module__}"
        assert time.monotonic() - began < SECONDS, said
        assert len(set(names)) == len(names), said
        if fault is not lying:  # an archive that lies as a whole may well be another one
            assert len(names) >= 4 or source.skipped, said


@pytest.mark.fuzz(weight=1)
def test_the_reader_gives_what_tarfile_gives_of_whole_archives(fuzz):
    """Names and contents of archives that ``tarfile`` writes, whatever their names, sizes and headers."""
    for number in range(fuzz.count):
        rng = random.Random(f"{fuzz.seed} {number}")
        letters = "ab.-_ /é家\n"
        members = []
        for i in range(rng.randrange(5)):
            name = "".join(rng.choice(letters) for _ in range(rng.choice((1, 20, 99, 100, 101, 300)))).strip("/")
            members.append((f"{i}{name}", rng.randbytes(rng.choice((0, 1, 511, 512, 513, 3000)))))
        form = rng.choice(FORMATS[1:])
        data = with_tarfile(members, form)
        for reader in (TarReader(io.BytesIO(data)), TarReader(io.BytesIO(data), len(data))):
            assert [(m.name, reader.read()) for m in reader] == members, f"example {number}"


def test_any_bytes_are_refused_by_the_reader():
    rng = random.Random(0)
    for size in (0, 1, 511, 512, 513, 4096):
        for _ in range(20):
            with pytest.raises(BROKEN):
                list(TarReader(io.BytesIO(rng.randbytes(size))))
