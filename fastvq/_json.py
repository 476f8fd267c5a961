"""JSON files: one writer, one reader, and the kinds of values that a file's schema is made of."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fastvq._files import write_atomically
from fastvq._shorten import shorten, shorten_text

__all__ = [
    "Kind",
    "any_of",
    "anything",
    "flag",
    "list_of",
    "mapping_of",
    "matching",
    "nothing",
    "number",
    "parse_json",
    "read_json",
    "record",
    "text",
    "whole",
    "write_json",
]

SEAL = "__sha256__"  # entry of a file: the digest of all its other entries

# Checks a value; the second argument says where in the file it stands ("": it is the whole). Raises _Misfit.
Kind = Callable[[Any, str], None]


class _Misfit(Exception):
    def __init__(self, where: str, expected: str, value: Any) -> None:
        super().__init__(f"{where and ': '}{where} must be {expected}, got {shorten(value)}")


def anything(value: Any, where: str) -> None:
    """Any value that JSON can hold."""


def text(value: Any, where: str) -> None:
    if not isinstance(value, str):
        raise _Misfit(where, "a string", value)


def matching(pattern: str, expected: str) -> Kind:
    """A string that the regular expression matches as a whole; ``expected`` describes it."""

    def check(value: Any, where: str) -> None:
        if not isinstance(value, str) or not re.fullmatch(pattern, value):
            raise _Misfit(where, expected, value)

    return check


def flag(value: Any, where: str) -> None:
    if not isinstance(value, bool):
        raise _Misfit(where, "true or false", value)


def number(value: Any, where: str) -> None:
    # 1e999 is read as infinity.
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < float("inf"):
        raise _Misfit(where, "a finite number", value)


def nothing(value: Any, where: str) -> None:
    if value is not None:
        raise _Misfit(where, "null", value)


def whole(low: int, high: int) -> Kind:
    def check(value: Any, where: str) -> None:
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise _Misfit(where, f"a whole number in {low} .. {high}", value)

    return check


def any_of(*kinds: Kind) -> Kind:
    """A value of one of these kinds; the error is the last one's."""

    def check(value: Any, where: str) -> None:
        for kind in kinds[:-1]:
            try:
                return kind(value, where)
            except _Misfit:
                continue
        return kinds[-1](value, where)

    return check


def list_of(kind: Kind) -> Kind:
    def check(value: Any, where: str) -> None:
        if not isinstance(value, list):
            raise _Misfit(where, "a list", value)
        for i, element in enumerate(value):
            kind(element, f"{where}[{i}]")

    return check


def mapping_of(kind: Kind) -> Kind:
    """An object with any names."""

    def check(value: Any, where: str) -> None:
        if not isinstance(value, dict):
            raise _Misfit(where, "an object", value)
        for name, entry in value.items():
            kind(entry, f"{where}[{shorten(name)}]")

    return check


def record(required: Mapping[str, Kind], optional: Mapping[str, Kind] | None = None) -> Kind:
    """An object with these entries and no others."""
    known = {**required, **(optional or {})}

    def check(value: Any, where: str) -> None:
        if not isinstance(value, dict) or any(name not in value for name in required):
            raise _Misfit(where, f"an object with {', '.join(required)}", value)
        if unknown := [name for name in value if name not in known]:
            raise _Misfit(where, f"an object with {', '.join(known)} and nothing else", unknown[:3])
        for name, entry in value.items():
            known[name](entry, f"{where}.{name}" if where else name)

    return check


def parse_json(op: str, source: str, content: str | bytes, kind: Kind = anything) -> tuple[Any, bool]:
    """(the value of a JSON text, whether it carried the digest of its entries); ValueError, naming ``source``, where
    the text is no JSON, the value is of another kind or the digest differs."""
    try:
        value = json.loads(content, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        reason = "its nesting is too deep" if isinstance(error, RecursionError) else shorten_text(error)
        raise ValueError(f"{op}: {source} must be JSON, and is not ({reason}); it may be truncated") from None
    sealed = isinstance(value, dict) and SEAL in value
    try:
        if sealed:
            seal = value.pop(SEAL)
            if seal != _digest(value):
                raise ValueError(
                    f"{op}: {source} was changed after it was written: its digest differs; restore it, or remove its "
                    f"entry {SEAL} to accept the change"
                )
        kind(value, "")
    except _Misfit as error:
        raise ValueError(f"{op}: {source}{error}; it is damaged or a file of something else") from None
    except RecursionError:
        raise ValueError(f"{op}: {source} must be JSON of few levels, its nesting is too deep; it is damaged") from None
    return value, sealed


def read_json(op: str, path: Path | str, kind: Kind = anything) -> Any:
    """The value that a JSON file holds, of that kind, without the digest that it is checked against.

    Raises:
        ValueError: it is no JSON, of another kind, or its digest differs; the message names the file.
        FileNotFoundError: it is not there.
    """
    return parse_json(op, str(path), Path(path).read_bytes(), kind)[0]


def write_json(path: Path | str, value: Any, *, seal: bool = False) -> None:
    """Writes a JSON file atomically; ``seal`` adds the digest of the object's entries, for files that are read back."""
    if seal:
        value = {**value, SEAL: _digest(json.loads(json.dumps(value)))}
    write_atomically(path, (json.dumps(value, indent=2) + "\n").encode())


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _no_constant(name: str) -> None:
    raise ValueError(f"it holds {name}, which is no JSON")
