"""The config of a folder of id maps (``order.json``): the model, the options and a digest of the list of pictures.

An interrupted ``fastvq encode`` can be continued only with the same config. With another one, pictures would be encoded
twice, or not at all.
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
from fastvq._shorten import shorten, shorten_text
from fastvq.cli.id_shards import CONFIG, CONFIG_KIND, MANIFEST, SHARDS, load_shard
from fastvq.data import Shards, Source
from fastvq.models.checkpoints import WEIGHTS

__all__ = ["LOG", "listing_digest", "open_output", "remove_output", "same_option"]

OP = "fastvq encode"
LISTING, LOG = "listing.jsonl", "log.jsonl"
WRITTEN = (SHARDS, "skipped-*.json", MANIFEST, CONFIG, LISTING)
SHARED_WITH_TRAINING = (LOG, "usage.png", "reconstructions.png")  # names that a training writes, too
MAX_NAMED = 3  # an error names at most this many pictures
ENTRY_NAMES = {"model_sha256": "model"}  # names of entries in messages
ADVICE = "take another --out, or start anew with --restart"

Listing = Sequence[tuple[str, int]]


def open_output(
    out: Path, config: dict[str, Any], source: Source | Shards, n_codes: Sequence[int], *, restart: bool
) -> int:
    """Writes the config to a new folder ``out``, or compares it with the config of an existing one. Returns the length
    of the listing. Only the first process calls this.

    Args:
        config: the options that the contents of the folder depend on; the entry ``listing`` is the digest of the
            listing of ``source``.
        restart: first remove the files that an earlier call wrote.

    Raises:
        ValueError: the folder has another config; the message names the difference.
    """
    if (out / WEIGHTS).exists() and not (out / CONFIG).is_file():
        raise ValueError(f"{out} holds a model; take another --out for the maps")
    if restart:
        remove_output(out)
    listing = source.listing()
    if (out / CONFIG).is_file() and any(out.glob(SHARDS)):
        begun = read_json(OP, out / CONFIG, CONFIG_KIND)
        differing = [
            f"{ENTRY_NAMES.get(name, name)}"
            + ("" if name in ENTRY_NAMES else f" ({shorten(begun[name])}, now {shorten(config[name])})")
            for name in sorted(config)
            if name in begun and name != "listing" and not same_option(name, begun[name], config[name])
        ]
        if differing:
            raise ValueError(f"{out} was begun with another {', '.join(differing)}; {ADVICE}")
        if "listing" not in begun:
            _check_earlier(out, source, listing, config["shard_size"], n_codes)
        elif begun["listing"] != config["listing"]:
            raise ValueError(f"{out} was begun with other pictures: {_difference(out, begun, listing)}; {ADVICE}")
    elif any(out.glob(SHARDS)):
        raise ValueError(f"{out} holds id maps and no {CONFIG} that says of which pictures; {ADVICE}")
    write_atomically(out / LISTING, _lines(listing))
    write_json(out / CONFIG, config, seal=True)
    return len(listing)


def same_option(name: str, before: Any, now: Any) -> bool:
    """Whether the option ``name`` has one value before and now. A folder of pictures has many paths."""
    if name == "data" and isinstance(now, str) and "://" not in now:
        return os.path.abspath(before) == os.path.abspath(now)
    return bool(before == now)


def remove_output(out: Path) -> None:
    """Removes the files that ``fastvq encode`` writes, and no others."""
    for pattern in WRITTEN if (out / WEIGHTS).exists() else (*WRITTEN, *SHARED_WITH_TRAINING):
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
    for change, names in (
        ("added", [name for name in now if name not in before]),
        ("removed", [name for name in before if name not in now]),
        ("of another size", [name for name in now if name in before and now[name] != before[name]]),
    ):
        if names:
            named = [shorten_text(name) for name in names[:MAX_NAMED]] + ["..."] * (len(names) > MAX_NAMED)
            parts.append(f"{len(names)} {change} ({', '.join(named)})")
    return ", ".join(parts) or "in another order"


def _check_earlier(
    out: Path, source: Source | Shards, listing: Listing, shard_size: int, n_codes: Sequence[int]
) -> None:
    """Checks a folder of an earlier version, which wrote no listing: its maps must belong to the listed pictures."""
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
        expected = {name for name, _ in listing[first : first + shard_size]}
        try:
            names = load_shard(OP, path, n_codes).names
        except ValueError:
            continue  # a damaged shard is made again
        if other := [name for name in names if name not in expected]:
            raise ValueError(
                f"{out} was begun with other pictures: {shorten_text(other[0])} is not where it was; {ADVICE}"
            )
