"""Names of pictures as paths of files: folders and characters are kept, and no two names get one path.

Every path ends in ``.png``, added to the whole name (``a.jpg`` -> ``a.jpg.png``). A character that a path cannot hold
becomes ``%`` and two hexadecimal digits of its bytes, and so does a ``%`` that could be taken for such an escape, so
that every path can be turned back into its name.

A name that comes again, or differs from an earlier one only where file systems see no difference (upper and lower case,
composed and decomposed letters, periods and spaces at the end), gets ``%2F2`` before ``.png``, the next ``%2F3``.
"""

from __future__ import annotations

import hashlib
import os
import re
import unicodedata
from pathlib import PurePosixPath

__all__ = ["FileNames"]

SUFFIX = ".png"
MAX_PART, MAX_PATH = (
    240,
    2048,
)  # bytes of a folder's or a file's name and of a path, which systems limit to 255 and 4096
DIGITS = 32  # of the digest that ends a name that was cut
# An escape of "/", which no part of a name holds: it marks what is added to names.
MARK = "%2F"
# What a system cannot hold in a name.
REFUSED = r'[\x00-\x1f\x7f"*:<>?\\|]' if os.name == "nt" else r"[\x00-\x1f\x7f]"
ESCAPED = re.compile(rf"{REFUSED}|%(?=[0-9A-Fa-f]{{2}})|[\ud800-\udc7f\udd00-\udfff]")


class FileNames:
    """Paths of names, one after another. A name that comes again gets another path each time."""

    def __init__(self) -> None:
        self._times: dict[str, int] = {}

    def path(self, name: str) -> PurePosixPath:
        """A relative path inside the folder that the pictures go to."""
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
    """Equal for two names that some file system takes for one."""
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
        # Files that are written end so, and no folder may have a file's name.
        at = part.rindex(".")
        part = part[:at] + _escape(".") + part[at + 1 :]
    return _shortened(part, part, 1)


def _escape(text: str) -> str:
    return "".join(f"%{byte:02X}" for byte in text.encode("utf-8", "surrogatepass"))


def _shortened(text: str, shown: str, times: int) -> str:
    """``text`` if its bytes are few, else the start of ``shown`` and a digest of the whole."""
    if shown and len(os.fsencode(text)) <= MAX_PART:
        return text
    digest = hashlib.sha256(f"{times} {text}".encode("utf-8", "surrogatepass")).hexdigest()[:DIGITS]
    start = os.fsencode(shown)[: MAX_PART - len(MARK) - DIGITS].decode("utf-8", "ignore")
    return f"{start}{MARK}{digest}"
