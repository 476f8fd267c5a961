"""Ways to damage a file: its bytes, its JSON, the tensors in it; with the digest left, renewed or taken away."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save

from fastvq._json import SEAL, write_json
from fastvq.models.checkpoints import DIGEST, METADATA, save_tensors

SHOWN = 100


class Damage(NamedTuple):
    name: str
    content: bytes
    hidden: bool  # a program wrote it on purpose, digest included or without one: the reader may take it for another


def shuffled_bytes(data: bytes, rng: random.Random) -> tuple[str, bytes]:
    """A fault of a disk or of a transfer."""
    at, n = rng.randrange(len(data) + 1), rng.choice((1, 1, 2, 7, 64, 600))
    way = rng.choice(("bit", "bit", "bytes", "cut", "grown", "lost", "doubled", "zeros", "noise"))
    if way in ("bit", "bytes"):
        changed = bytearray(data)
        for _ in range(1 if way == "bit" else n):
            if changed:
                changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8) if way == "bit" else rng.randrange(1, 256)
        return way, bytes(changed)
    return way, {
        "cut": data[:at],
        "grown": data + rng.randbytes(n),
        "lost": data[:at] + data[at + n :],
        "doubled": data[:at] + data[at : at + n] + data[at:],
        "zeros": data[:at] + bytes(len(data[at : at + n])) + data[at + n :],
        "noise": rng.randbytes(n),
    }[way]


def wrong_value(rng: random.Random, place: str) -> Any:
    """A value that a file's JSON should not hold. ``place`` is a path outside the folders that a command may touch."""
    deep: Any = []
    for _ in range(rng.choice((3, 100, 500))):
        deep = [deep]
    return rng.choice((
        None, True, False, -1, 0, 1, 2, 3, 7, 16, 10**6, 10**9, 2**31, 2**63, 10**30, -(2**63), 0.5, -0.0, 1e308, -1e30,
        1e999, float("nan"), "", "x", "9", "\n\x1b[31m", "é\ud800", "x" * 5000, f"{place}/evil", "../../../../evil",
        "/", "..", "a/../../../evil", "\0", [], [[]], {}, [None], [1], ["x"], {"x": 1}, [0] * 5000, deep,
    ))  # fmt: skip


def wrong_json(value: Any, rng: random.Random, place: str) -> tuple[str, Any]:
    """The value with something in it replaced, renamed, removed or added."""
    copied = json.loads(json.dumps(value))
    at: Any = None
    key: Any = None
    inner = copied
    trail = ""
    while isinstance(inner, (dict, list)) and inner and rng.random() < 0.8:
        at, key = inner, rng.choice(list(inner) if isinstance(inner, dict) else range(len(inner)))
        inner, trail = at[key], f"{trail}.{key}"
    new = wrong_value(rng, place)
    if at is None:
        return f"all of it {new!r}"[:SHOWN], new
    way = rng.choice(("replaced", "replaced", "replaced", "removed", "added", "renamed"))
    if way == "replaced":
        at[key] = new
    elif way == "removed":
        del at[key]
    elif isinstance(at, list):
        at.insert(0, new)
    else:
        at["hydra" if way == "added" else f"{key}_"] = new if way == "added" else at.pop(key)
    return f"{trail} {way}, {new!r}"[:SHOWN], copied


def wrong_tensors(tensors: dict[str, torch.Tensor], rng: random.Random) -> tuple[str, dict[str, torch.Tensor]]:
    """One tensor missing, unknown, of another name, shape or type, or with other values."""
    tensors = dict(tensors)
    name = rng.choice(sorted(tensors))
    t = tensors[name]
    dtype = rng.choice(
        (torch.int32, torch.int64, torch.bool, torch.float16, torch.float64, torch.uint8, torch.bfloat16)
    )
    value = rng.choice((0, -1, 3, 200, float("nan"), float("inf"), 3e38) if t.is_floating_point() else (0, 1, 3, 200))
    way = rng.choice(("removed", "added", "renamed", "flat", "longer", "empty", "type", "values", "values"))
    if way == "removed":
        del tensors[name]
    elif way in ("added", "renamed"):
        new = rng.choice(("hydra", f"{name}_", "model.hydra", "optimizer.x.step", "optimizer.-1.step", "level9", ""))
        tensors[new] = t.clone() if way == "added" else tensors.pop(name)
    elif way == "values":
        tensors[name] = torch.full_like(t, value)
    else:
        tensors[name] = {
            "flat": lambda: t.flatten()[:, None], "longer": lambda: torch.cat([t.flatten(), t.flatten()]),
            "empty": lambda: t[:0] if t.dim() else t.flatten()[:0], "type": lambda: t.to(dtype),
        }[way]()  # fmt: skip
    return f"tensor {name} {way}", {name: t.contiguous() for name, t in tensors.items()}


def damaged(path: Path, rng: random.Random, place: str) -> Damage:
    """One random fault of the file at ``path``."""
    data = path.read_bytes()
    ways: dict[str, Callable[[], Damage]] = {
        ".json": lambda: _json(path, rng, place),
        ".safetensors": lambda: _weights(path, rng, place),
        ".jsonl": lambda: _line(path, rng, place),
    }
    if path.suffix in ways and rng.random() < 0.6:
        return ways[path.suffix]()
    name, content = shuffled_bytes(data, rng)
    # A picture of an archive has no digest, and what an archive names as lost is not an error of the command.
    return Damage(name, content, path.suffix == ".tar")


def _json(path: Path, rng: random.Random, place: str) -> Damage:
    value = json.loads(path.read_text())
    seal = value.pop(SEAL, None)
    name, value = wrong_json(value, rng, place)
    # Renewed, taken away, or as it was: then the file is one that somebody changed later.
    way = rng.choice(("renewed", "none", "old"))
    if isinstance(value, dict) and way == "old" and seal:
        value[SEAL] = seal
    temporary = path.with_name("damage")
    try:
        write_json(temporary, value, seal=way == "renewed" and isinstance(value, dict))
    except (ValueError, OverflowError):  # NaN and the like, which the digest cannot be made of
        temporary.write_text(json.dumps(value))
    content = temporary.read_bytes()
    temporary.unlink()
    return Damage(f"{name}, digest {way}", content, way != "old")


def _line(path: Path, rng: random.Random, place: str) -> Damage:
    lines = path.read_text().splitlines()
    at = rng.randrange(len(lines))
    name, value = wrong_json(json.loads(lines[at]), rng, place)
    lines[at] = json.dumps(value)
    return Damage(f"line {at}: {name}", "".join(f"{line}\n" for line in lines).encode(), True)


def _weights(path: Path, rng: random.Random, place: str) -> Damage:
    if rng.random() < 0.3:
        return _header(path.read_bytes(), rng, place)
    with safe_open(str(path), framework="pt") as file:
        metadata = json.loads(file.metadata()[METADATA])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    del metadata[DIGEST]
    if rng.random() < 0.5:
        name, tensors = wrong_tensors(tensors, rng)
    elif rng.random() < 0.6:
        key = rng.choice(sorted(metadata))
        try:
            name, inner = wrong_json(json.loads(metadata[key]), rng, place)
            metadata[key] = json.dumps(inner)
        except ValueError:  # plain text
            name, metadata[key] = "text", str(wrong_value(rng, place))
        name = f"metadata {key}: {name}"
    else:
        name, metadata = wrong_json(metadata, rng, place)
        name = f"metadata: {name}"
    if isinstance(metadata, dict) and all(isinstance(v, str) for v in metadata.values()) and rng.random() < 0.7:
        temporary = path.with_name("damage")
        save_tensors(temporary, tensors, metadata)
        content = temporary.read_bytes()
        temporary.unlink()
        return Damage(f"{name}, digest renewed", content, True)
    return Damage(f"{name}, digest none", save(tensors, {METADATA: json.dumps(metadata)}), True)


def _header(data: bytes, rng: random.Random, place: str) -> Damage:
    """A safetensors file with something else in its header."""
    n = int.from_bytes(data[:8], "little")
    name, value = wrong_json(json.loads(data[8 : 8 + n]), rng, place)
    header = json.dumps(value).encode()
    length = rng.choice((len(header), len(header), len(header), n, 0, 1, 2**31, 2**63, rng.getrandbits(64)))
    return Damage(f"header {name}", length.to_bytes(8, "little") + header + data[8 + n :], False)
