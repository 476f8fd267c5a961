"""Turns names of pictures into file paths. Folders and characters are kept; different names get different paths.

``.png`` is added to every name (``a.jpg`` -> ``a.jpg.png``). A character that a path cannot hold is escaped: each byte
of it becomes ``%`` and two hexadecimal digits. A ``%`` that looks like an escape is escaped too, so that every path can
be turned back into its name.

A repeated name gets ``%2F2`` before ``.png``, the next one ``%2F3``. So does a name that differs from an earlier one
only in ways that some file systems ignore: upper and lower case, composed and decomposed letters, periods and spaces at
the end.
"""

from __future__ import annotations

import hashlib
import os
import re
import unicodedata
from pathlib import PurePosixPath

__all__ = ["FileNames"]

SUFFIX = ".png"
# Bytes of a folder's or a file's name, and of a path. Operating systems allow 255 and 4096.
MAX_PART, MAX_PATH = 240, 2048
DIGITS = 32  # of the digest at the end of a shortened name
# An escaped "/", which no part of a name contains: it marks the text added to names.
MARK = "%2F"
# Characters that the operating system does not allow in a name.
REFUSED = r'[\x00-\x1f\x7f"*:<>?\\|]' if os.name == "nt" else r"[\x00-\x1f\x7f]"
ESCAPED = re.compile(rf"{REFUSED}|%(?=[0-9A-Fa-f]{{2}})|[\ud800-\udc7f\udd00-\udfff]")


class FileNames:
    """Gives each name a path, one after another. A repeated name gets another path each time."""

    def __init__(self) -> None:
        self._times: dict[str, int] = {}

    def path(self, name: str) -> PurePosixPath:
        """The path of the picture, relative to the output folder."""
        path = _path(name, 1)
        folded = "/".join(map(_folded, path.parts))
        times = self._times[folded] = self._times.get(folded, 0) + 1
        return path if times == 1 else _path(name, times)


def _path(name: str, times: int) -> PurePosixPath:
    *folders, last = name.split("/")
    parts = [*map(_folder, folders), _part(last) + (f"{MARK}{times}" if times > 1 else "")]
    if sum(len(os.fsencode(p)) + 1 for p in parts) > MAX_PATH:
        parts = [_shortened(name, "", times)]
    *folders, last = parts
    return PurePosixPath(*folders, _shortened(last, last, 1) + SUFFIX)


def _folded(part: str) -> str:
    """A form of the name that is equal for names which some file system does not distinguish."""
    plain = unicodedata.normalize("NFD", unicodedata.normalize("NFD", part).casefold())
    return plain.rstrip(". ")


def _part(text: str) -> str:
    escaped = ESCAPED.sub(lambda found: _escape(found.group()), text)
    if not escaped.strip(". "):  # nothing, or a way to another folder
        return _escape(escaped) or MARK
    return escaped


def _folder(text: str) -> str:
    part = _part(text)
    if _folded(part).endswith((SUFFIX, ".jsonl")):
        # The files written here have these endings, and a folder must not have the name of a file.
        at = part.rindex(".")
        part = part[:at] + _escape(".") + part[at + 1 :]
    return _shortened(part, part, 1)


def _escape(text: str) -> str:
    return "".join(f"%{byte:02X}" for byte in text.encode("utf-8", "surrogatepass"))


def _shortened(text: str, shown: str, times: int) -> str:
    """``text`` if it is short enough, else the start of ``shown`` and a digest of the whole text."""
    if shown and len(os.fsencode(text)) <= MAX_PART:
        return text
    digest = hashlib.sha256(f"{times} {text}".encode("utf-8", "surrogatepass")).hexdigest()[:DIGITS]
    start = os.fsencode(shown)[: MAX_PART - len(MARK) - DIGITS].decode("utf-8", "ignore")
    return f"{start}{MARK}{digest}"
