"""What a folder of id maps is to hold: ``order.json``, and the listing of the pictures beside it.

A folder that was begun is gone on with only if the model, the options and the listing are the same; otherwise pictures
would be encoded twice, or not at all.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastvq._files import write_atomically
from fastvq._json import read_json, write_json
from fastvq.cli.id_shards import MANIFEST, ORDER_KIND, SHARDS, load_shard
from fastvq.data import Shards, Source
from fastvq.models.checkpoints import WEIGHTS

__all__ = ["LOG", "begin", "forget", "listing_digest"]

OP = "fastvq encode"
ORDER, LISTING, LOG = "order.json", "listing.jsonl", "log.jsonl"
WRITTEN = (SHARDS, "skipped-*.json", MANIFEST, ORDER, LISTING)
ALSO_OF_MODELS = (LOG, "usage.png", "reconstructions.png")  # names that a training writes, too
NAMED = 3  # pictures that an error names
WORDS = {"model_sha256": "model"}  # what an entry is called in a message
ADVICE = "take another --out, or start anew with --restart"

Listing = Sequence[tuple[str, int]]


def begin(out: Path, order: dict[str, Any], source: Source | Shards, n_codes: Sequence[int], *, restart: bool) -> int:
    """Writes what ``out`` is to hold, or compares with what it was begun with; returns the
    length of the listing. For the first process alone.

    Args:
        order: options that decide what the folder holds; its entry ``listing`` is the digest of ``source``'s listing.
        restart: remove what an earlier call wrote there.

    Raises:
        ValueError: the folder was begun with something else; the message names the difference.
    """
    if (out / WEIGHTS).exists() and not (out / ORDER).is_file():
        raise ValueError(f"{out} holds a model; take another --out for the maps")
    if restart:
        forget(out)
    listing = source.listing()
    if (out / ORDER).is_file() and any(out.glob(SHARDS)):
        begun = read_json(OP, out / ORDER, ORDER_KIND)
        differing = [
            f"{WORDS.get(name, name)}" + ("" if name in WORDS else f" ({begun[name]!r}, now {order[name]!r})")
            for name in sorted(order)
            if name in begun and name != "listing" and not _is_same(name, begun[name], order[name])
        ]
        if differing:
            raise ValueError(f"{out} was begun with another {', '.join(differing)}; {ADVICE}")
        if "listing" not in begun:
            _check_earlier(out, source, listing, order["shard_size"], n_codes)
        elif begun["listing"] != order["listing"]:
            raise ValueError(f"{out} was begun with other pictures: {_difference(out, begun, listing)}; {ADVICE}")
    elif any(out.glob(SHARDS)):
        raise ValueError(f"{out} holds id maps and no {ORDER} that says of which pictures; {ADVICE}")
    write_atomically(out / LISTING, _lines(listing))
    write_json(out / ORDER, order, seal=True)
    return len(listing)


def _is_same(name: str, before: Any, now: Any) -> bool:
    if name == "data" and isinstance(now, str) and "://" not in now:
        return os.path.abspath(before) == os.path.abspath(now)  # one folder has many paths: a, a/, ./a
    return bool(before == now)


def forget(out: Path) -> None:
    """Removes all that ``fastvq encode`` writes, and nothing else."""
    for pattern in WRITTEN if (out / WEIGHTS).exists() else (*WRITTEN, *ALSO_OF_MODELS):
        for path in out.glob(pattern):
            path.unlink()


def listing_digest(listing: Listing) -> dict[str, Any]:
    return {"entries": len(listing), "sha256": hashlib.sha256(_lines(listing)).hexdigest()}


def _lines(listing: Listing) -> bytes:
    return "".join(json.dumps(entry) + "\n" for entry in listing).encode()


def _difference(out: Path, begun: dict[str, Any], listing: Listing) -> str:
    before: dict[str, int] = {}
    with contextlib.suppress(OSError, ValueError, TypeError):
        data = (out / LISTING).read_bytes()
        if hashlib.sha256(data).hexdigest() == begun["listing"]["sha256"]:
            before = dict(json.loads(line) for line in data.splitlines())
    now = dict(listing)
    if not before:
        return f"it listed {begun['listing']['entries']}, and now there are {len(now)}"
    parts = []
    for what, names in (
        ("added", [name for name in now if name not in before]),
        ("removed", [name for name in before if name not in now]),
        ("of another size", [name for name in now if name in before and now[name] != before[name]]),
    ):
        if names:
            parts.append(f"{len(names)} {what} ({', '.join(names[:NAMED])}{', ...' if len(names) > NAMED else ''})")
    return ", ".join(parts) or "in another order"


def _check_earlier(
    out: Path, source: Source | Shards, listing: Listing, shard_size: int, n_codes: Sequence[int]
) -> None:
    """Of a folder that an earlier version began, which kept no listing: its maps must be of the listed pictures."""
    if isinstance(source, Shards):
        raise ValueError(
            f"{out} was begun by an earlier version, which cut archives in another way; decode reads it as it is, but "
            f"to encode more, {ADVICE}"
        )
    if len(listing) != len(source):
        return
    for path in sorted(out.glob(SHARDS)):
        number = path.stem.removeprefix("ids-")
        first = int(number) * shard_size if number.isdigit() else len(listing)
        there = {name for name, _ in listing[first : first + shard_size]}
        try:
            names = load_shard(OP, path, n_codes).names
        except ValueError:
            continue  # a broken one is made again
        if other := [name for name in names if name not in there]:
            raise ValueError(f"{out} was begun with other pictures: {other[0]} is not where it was; {ADVICE}")
