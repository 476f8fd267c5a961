"""Text from elsewhere in an error: names and values of files, messages of libraries, in one line of bounded length.

Every error that quotes such text takes it through ``shorten`` or ``shorten_text``.
"""

from __future__ import annotations

from typing import Any

__all__ = ["SHOWN_NOTE", "printable", "shorten", "shorten_text"]

SHOWN_VALUE = 80  # characters of a value
SHOWN_TEXT = 160  # characters of a name or a message
SHOWN_NOTE = 400  # characters of a name with the reason why it is left out, and of other texts that are mostly our own


def shorten(value: Any) -> str:
    """The start of a value's repr, at most ``SHOWN_VALUE`` characters and an ellipsis."""
    if isinstance(value, int) and value.bit_length() > 4 * SHOWN_VALUE:  # Python refuses to write out the longest
        return f"an integer of {value.bit_length()} bits"
    # A long text is cut first: its repr may have ten times its characters.
    return _start(repr(value[: SHOWN_VALUE + 1] if isinstance(value, (str, bytes)) else value), SHOWN_VALUE)


def shorten_text(text: object, limit: int = SHOWN_TEXT) -> str:
    """The start of a name or a message, as one line of at most ``limit`` characters and an ellipsis."""
    return _start(printable(str(text)[: 2 * limit]), limit)


def printable(text: str) -> str:
    """The text as one line. Names from files may hold line breaks, terminal codes and undecodable bytes."""
    return "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in " ".join(text.split()))


def _start(text: str, limit: int) -> str:
    return text if len(text) <= limit else f"{text[:limit]}..."
