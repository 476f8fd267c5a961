"""Files of ``fastvq encode``: shards of id maps, and the formats of its JSON files."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastvq._json import any_of, list_of, mapping_of, matching, nothing, parse_json, record, text, whole
from fastvq._shorten import shorten
from fastvq.models.checkpoints import DIGEST, load_tensors, save_tensors

__all__ = [
    "BROKEN_END",
    "CONFIG",
    "CONFIG_KIND",
    "LAST",
    "MANIFEST",
    "MANIFEST_KIND",
    "MORE",
    "SHARDS",
    "SKIPPED_KIND",
    "IdShard",
    "check_listed",
    "find_manifest",
    "load_shard",
    "save_shard",
]

FORMAT = "fastvq id maps"
CONFIG = "order.json"  # the config of a folder; see encode_config.py
MANIFEST = "manifest.json"
SHARDS = "ids-*.safetensors"
# How an archive continues after the pictures of a shard: with more of them, not at all, or unreadably.
MORE, LAST, BROKEN_END = "more", "last", "broken"
MOST = 1 << 40
LABELS = "labels"
ID_TYPES = (torch.uint8, torch.int16, torch.int32)

CONFIG_ENTRIES = {
    "model_sha256": text,
    "data": text,
    "split": text,
    "size": whole(1, 1 << 16),
    "shard_size": whole(1, MOST),
}
CONFIG_OPTIONS = {
    "processes": whole(1, MOST),  # of earlier versions, which divided archives among processes
    "odd": text,
    "field": any_of(nothing, text),
    "listing": record({"entries": whole(0, MOST), "sha256": text}),
}
SHARD_NAME = matching(r"ids-[^/\\\0]{1,200}\.safetensors", "the name of a shard")
CONFIG_KIND = record(CONFIG_ENTRIES, CONFIG_OPTIONS)
SKIPPED_KIND = mapping_of(text)
MANIFEST_KIND = record(
    {
        **CONFIG_ENTRIES,
        "levels": whole(1, MOST),
        "n_codes": list_of(whole(1, MOST)),
        "strides": list_of(whole(1, MOST)),
        "pictures": whole(0, MOST),
        "skipped": SKIPPED_KIND,
        "shards": list_of(record({"name": SHARD_NAME, "pictures": whole(0, MOST)}, {"sha256": text})),
    },
    CONFIG_OPTIONS,
)


class IdShard(NamedTuple):
    names: list[str]  # of n pictures
    labels: Tensor  # [n] int64
    maps: list[Tensor]  # one a level, top first: [n, h, w] or [n, h, w, Q]; no maps if n is 0
    digest: str | None  # of the file; None in files of earlier versions
    skipped: dict[str, str]  # pictures left out of the shard, with the reasons
    end: str  # MORE, LAST or BROKEN_END


def save_shard(
    path: Path, names: Sequence[str], labels: Tensor, maps: Sequence[Tensor], skipped: Mapping[str, str], end: str
) -> None:
    tensors = {**{f"level{i}": ids for i, ids in enumerate(maps)}, LABELS: labels}
    metadata = {
        "format": FORMAT,
        "names": json.dumps(list(names)),
        "skipped": json.dumps(dict(skipped)),
        "end": end,
    }
    save_tensors(path, tensors, metadata)


def find_manifest(op: str, folder: Path) -> Path:
    """The manifest of a folder of id maps.

    Raises:
        FileNotFoundError: there is no manifest; the message says whether ``fastvq encode`` was interrupted.
    """
    path = folder / MANIFEST
    if not path.is_file():
        if any(folder.glob(SHARDS)) or (folder / CONFIG).is_file():
            raise FileNotFoundError(
                f"{op}: {folder} has no {MANIFEST}: `fastvq encode` did not end there; run the same command again, it "
                "goes on where it stopped"
            )
        raise FileNotFoundError(f"{op}: {folder} must be a folder that `fastvq encode` wrote; it has no {MANIFEST}")
    return path


def load_shard(op: str, path: Path, n_codes: Sequence[int]) -> IdShard:
    """Loads a shard of id maps. ``n_codes``: codes of the model, one number a level.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, of another format, or holds ids that are not codes of the model.
    """
    tensors, metadata = load_tensors(op, path, FORMAT, ["names", "skipped?", "end?"])
    names, _ = parse_json(op, f"the names in {path}", metadata["names"], list_of(text))
    expected = [LABELS, *(f"level{i}" for i in range(len(n_codes) if names else 0))]
    if tensors.keys() != set(expected):
        _refuse(op, path, f"must hold {', '.join(expected)}, got {shorten(sorted(tensors))}")
    labels, maps = tensors[LABELS], [tensors[name] for name in expected[1:]]
    if labels.shape != (len(names),) or labels.dtype != torch.int64:
        _refuse(op, path, f"must hold labels [{len(names)}] int64, got {shorten(list(labels.shape))} {labels.dtype}")
    for level, (ids, k) in enumerate(zip(maps, n_codes, strict=False)):
        if ids.dtype not in ID_TYPES or ids.dim() not in (3, 4) or len(ids) != len(names):
            _refuse(
                op, path, f"must hold level{level} [{len(names)}, h, w], got {shorten(list(ids.shape))} {ids.dtype}"
            )
        low, high = (int(ids.min()), int(ids.max())) if ids.numel() else (0, 0)
        if not 0 <= low <= high < k:
            _refuse(op, path, f"must hold ids in 0 .. {k - 1} at level {level}, got {low} .. {high}")
    skipped, _ = parse_json(op, f"the pictures left out in {path}", metadata.get("skipped", "{}"), SKIPPED_KIND)
    return IdShard(names, labels, maps, metadata.get(DIGEST), skipped, metadata.get("end", LAST))


def check_listed(op: str, path: Path, listed: Mapping[str, Any], shard: IdShard) -> None:
    """ValueError unless a shard is the one that the manifest lists."""
    if listed["pictures"] != len(shard.names) or listed.get("sha256", shard.digest) != shard.digest:
        _refuse(op, path, f"is not the shard that {MANIFEST} lists")


def _refuse(op: str, path: Path, fault: str) -> None:
    raise ValueError(f"{op}: {path} {fault}; it is damaged or of another model: encode again")
