"""Reads the members of a tar archive from start to end, and checks that the archive is whole.

Python's ``tarfile`` accepts an archive that was cut between two members, and skips the members after a damaged header.
Here an archive is whole only if it ends with its end-of-archive marker. Every other end raises ``BrokenArchive``.
"""

from __future__ import annotations

import lzma
import zlib
from collections.abc import Iterator
from http.client import HTTPException
from typing import NamedTuple, Protocol

from fastvq._shorten import shorten_text

__all__ = ["BROKEN", "BrokenArchive", "Member", "TarReader"]

BLOCK = 512
ZEROS = bytes(BLOCK)
MAX_HEADER_BYTES = 1 << 20  # size of a long name or of extended attributes
MAX_SKIPPED_BYTES = 4 << 30  # size of one member of a stream, which can be skipped only by reading it
MAX_TRAILER_BYTES = 16 << 20  # zeros after the end-of-archive marker; tar fills records of 10 KiB by default
CHUNK = 1 << 20

REGULAR, LONG_NAME, LONG_LINK, ATTRIBUTES, COMMON_ATTRIBUTES, SPARSE = b"\x000\x007", b"L", b"K", b"x", b"g", b"S"
LINKS, NO_DATA = b"12", b"123456"  # types of links; types without data: links, devices, folders, pipes


class BrokenArchive(Exception):
    """Why an archive cannot be read to its end."""


# The exceptions that reading a broken archive may raise, also from decompression and transport.
BROKEN = (BrokenArchive, OSError, EOFError, HTTPException, zlib.error, lzma.LZMAError)


class _Readable(Protocol):
    def read(self, n: int, /) -> bytes: ...
    def seek(self, at: int, /) -> int: ...


class Member(NamedTuple):
    name: str
    size: int  # bytes
    problem: str | None  # why its data cannot be used; None if it can


class TarReader:
    """Iterates over the files and links of an archive; ``read`` returns the data of the current one.

    Args:
        file: the archive, at its start.
        size: bytes of the archive, if ``file`` is seekable: members are then skipped without reading them.

    Reads POSIX, GNU and old (V7) headers. Members of other kinds (folders, devices) are skipped.

    Raises:
        BrokenArchive, while iterating or reading: the archive is empty, not a tar file, truncated, has a wrong size in
            a header, or data after its end. The members before the fault have been yielded.
    """

    def __init__(self, file: _Readable, size: int | None = None) -> None:
        self._file = file
        self._at = 0  # bytes read or skipped
        self._left = 0  # unread bytes of the current member
        self._padding = 0  # bytes after the member, up to the next block
        self._end = size

    def __iter__(self) -> Iterator[Member]:
        common: dict[bytes, bytes] = {}
        own: dict[bytes, bytes] = {}
        long_name: bytes | None = None
        while True:
            self._skip(self._left + self._padding)
            self._left = self._padding = 0
            at = self._at
            header = self._some(BLOCK)
            if at == 0 and not header:
                raise BrokenArchive("empty: it holds no byte")
            if len(header) == BLOCK and header == ZEROS:
                self._finish()
                return
            if at == 0 and (len(header) < BLOCK or not _is_header(header)):
                raise BrokenArchive("no tar archive")
            if len(header) < BLOCK:
                raise BrokenArchive(f"cut off at byte {self._at}: it has no end-of-archive marker")
            if not _is_header(header):
                raise BrokenArchive(
                    f"damaged at byte {at}: no header of a member, after one that may lie about its size"
                )
            kind, size = header[156:157], _number(header[124:136], at)
            if kind in (LONG_NAME, LONG_LINK, ATTRIBUTES, COMMON_ATTRIBUTES):
                self._expect(size)
                if size > MAX_HEADER_BYTES:
                    raise BrokenArchive(f"damaged at byte {at}: a name or attributes of {size} bytes")
                data = self.read()
                if kind == LONG_NAME:
                    long_name = data.rstrip(b"\0")
                elif kind != LONG_LINK:
                    (own if kind == ATTRIBUTES else common).update(_attributes(data, at))
                continue
            attributes = {**common, **own}
            name = attributes.get(b"path", long_name) or _name(header)
            if b"size" in attributes:
                size = _decimal(attributes[b"size"], at)
            sparse = kind == SPARSE or any(key.startswith(b"GNU.sparse") for key in attributes)
            own, long_name = {}, None
            if kind == SPARSE and header[482]:
                raise BrokenArchive(
                    f"holds a sparse file at byte {at}, which is not supported; pack it without --sparse"
                )
            self._expect(0 if kind in NO_DATA else size, _text(name))
            if kind in LINKS:
                yield Member(_text(name), 0, "a link in the archive, which holds no picture; pack with --dereference")
            elif sparse:
                yield Member(_text(name), size, "a sparse file in the archive; pack it without --sparse")
            elif kind in REGULAR and not name.endswith(b"/"):
                yield Member(_text(name), size, None)

    def read(self) -> bytes:
        """The data of the member that the iteration yielded last."""
        size = self._left
        parts = []
        while self._left:
            part = self._some(min(self._left, CHUNK))
            self._left -= len(part)
            if not part:
                raise BrokenArchive(f"cut off at byte {self._at}, inside a member of {size} bytes")
            parts.append(part)
        return b"".join(parts)

    def _expect(self, size: int, name: str = "a header") -> None:
        """Declares the next ``size`` bytes to be a member's data; BrokenArchive where there are fewer."""
        if self._end is not None and self._at + size > self._end:
            raise BrokenArchive(f"cut off at byte {self._end}, inside {shorten_text(name)} of {size} bytes")
        if self._end is None and size > MAX_SKIPPED_BYTES:
            raise BrokenArchive(f"damaged at byte {self._at}: {shorten_text(name)} of {size} bytes")
        self._left, self._padding = size, -size % BLOCK

    def _some(self, n: int) -> bytes:
        """The next n bytes, or fewer at the end of the file."""
        parts = []
        while n:
            part = self._file.read(n)
            if not part:
                break
            parts.append(part)
            n -= len(part)
            self._at += len(part)
        return b"".join(parts)

    def _skip(self, n: int) -> None:
        if self._end is not None:
            if self._at + n > self._end:
                raise BrokenArchive(f"cut off at byte {self._end}, inside a member")
            self._at = self._file.seek(self._at + n)
            return
        while n:
            part = self._some(min(n, CHUNK))
            n -= len(part)
            if not part:
                raise BrokenArchive(f"cut off at byte {self._at}, inside a member")

    def _finish(self) -> None:
        """Checks the end, after the first block of zeros: a second one must follow, and then nothing but zeros."""
        second = self._some(BLOCK)
        if len(second) < BLOCK:
            raise BrokenArchive(f"cut off at byte {self._at}, inside its end-of-archive marker")
        at, rest = self._at - BLOCK, second
        limit = self._at + MAX_TRAILER_BYTES
        while rest:
            if rest.count(0) != len(rest):
                raise BrokenArchive(f"followed by other data at byte {at}; unpack archives that were joined")
            at = self._at
            rest = self._some(CHUNK) if self._at < limit else b""


def _is_header(block: bytes) -> bool:
    """Whether the checksum is right: the sum of the bytes, or of signed bytes as some old programs computed it."""
    field = block[148:156].strip(b" \0")
    try:
        checksum = int(field, 8)
    except ValueError:
        return False
    rest = block[:148] + b" " * 8 + block[156:]
    unsigned = sum(rest)
    return checksum in (unsigned, unsigned - 256 * sum(byte > 127 for byte in rest))


def _number(field: bytes, at: int) -> int:
    """Octal digits, or a binary number where the first bit is set."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    digits = field.split(b"\0")[0].strip()
    if not all(48 <= digit < 56 for digit in digits):
        raise BrokenArchive(f"damaged at byte {at}: a size that is no number")
    return int(digits or b"0", 8)


def _decimal(digits: bytes, at: int) -> int:
    if not digits.isdigit() or len(digits) > 19:
        raise BrokenArchive(f"damaged at byte {at}: a size that is no number")
    return int(digits)


def _attributes(data: bytes, at: int) -> dict[bytes, bytes]:
    """Records of a POSIX extended header: "length key=value" and a newline."""
    found: dict[bytes, bytes] = {}
    at_record = 0
    while at_record < len(data) and data[at_record]:
        space = data.find(b" ", at_record, at_record + 20)
        digits = data[at_record:space] if space > 0 else b""
        end = at_record + int(digits) if digits.isdigit() else 0
        record = data[space + 1 : end]
        key, equals, value = record[:-1].partition(b"=")
        if end <= space or end > len(data) or not equals or not record.endswith(b"\n"):
            raise BrokenArchive(f"damaged at byte {at}: extended attributes that cannot be read")
        found[key] = value
        at_record = end
    return found


def _name(header: bytes) -> bytes:
    name = header[:100].split(b"\0")[0]
    prefix = header[345:500].split(b"\0")[0] if header[257:263] == b"ustar\0" else b""
    return prefix + b"/" + name if prefix else name


def _text(name: bytes) -> str:
    return name.decode("utf-8", "surrogateescape")
