"""``fastvq encode`` and ``fastvq decode``: folders or shards of pictures to id maps in safetensors shards, and back.

A shard holds the maps of ``shard_size`` pictures, written whole or not at all; what is there already is not made again.
Shard s of numbered pictures holds pictures s * shard_size and on, whichever of several processes makes it, and maps are
made in batches within a shard, so that the tokens are the same on any number of processes.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from fastvq.cli import shared
from fastvq.cli.pictures import PAIRED, grid, paired, save_picture, save_png, usage_plot
from fastvq.data import Picture, Shards, Source, normalise, open_data
from fastvq.models.autoencoder import Autoencoder
from fastvq.models.checkpoints import load_tensors, read_json, save_tensors, write_json
from fastvq.training import Place, barrier, find_device, processes
from fastvq.training.log import write_line

__all__ = ["decode", "encode"]

OP = "fastvq encode"
FORMAT = "fastvq id maps"
MANIFEST, LOG = "manifest.json", "log.jsonl"
SHOWN, COLUMNS = 16, 8  # pictures of the grid of reconstructions
NO_LABEL = -1


def encode(
    data: Annotated[
        str, typer.Argument(help="a folder of pictures, tar shards, digits, photographs, torchvision:NAME")
    ],
    out: Annotated[Path, typer.Option(help="folder of the id maps; one that was begun is gone on with")] = Path("ids"),
    model: Annotated[Path, typer.Option(help="folder of the trained model")] = shared.MODEL,
    split: Annotated[str, typer.Option(help="train, held-out or all")] = "all",
    size: Annotated[int | None, typer.Option(help="side of the pictures; the model's unless given")] = None,
    odd: Annotated[str, typer.Option(help="odd pictures: skip or convert")] = "skip",
    batch_size: Annotated[int, typer.Option(min=1)] = 64,
    shard_size: Annotated[int, typer.Option(min=1, help="pictures a shard")] = 4096,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda")] = "auto",
) -> None:
    """Encode pictures to maps of code ids."""
    with shared.reported(), processes(device) as place:
        autoencoder = shared.read_model(model, place.device)
        if size is None:
            size = shared.read_data(model)[1]["size"]
        source = open_data(data, split, size=size, channels=autoencoder.in_channels, odd=odd)
        if source.channels != autoencoder.in_channels:
            raise ValueError(f"{model} takes {autoencoder.in_channels} channels, and {data} has {source.channels}")
        order = {
            "model_sha256": shared.fingerprint(model), "data": data, "split": split, "size": size,
            "shard_size": shard_size,
        }  # fmt: skip
        if isinstance(source, Shards):
            order["processes"] = place.world  # a stream is cut between them, so their number says what a shard holds
        _check_order(out, order, place)
        n_shards = -(-len(source) // shard_size) if isinstance(source, Source) else 0
        with shared.progress(n_shards, "encode", shown=place.first) as advance:
            for number, (name, pictures) in enumerate(_shards(source, shard_size, place)):
                if not _is_whole(out / name):
                    began = time.perf_counter()
                    n = _encode_shard(autoencoder, pictures, out / name, batch_size, place.device)
                    seconds = time.perf_counter() - began
                    write_line(out / LOG, {
                        "shard": name, "pictures": n, "seconds": round(seconds, 3), "rank": place.rank,
                        "left_out": len(source.skipped),
                    })  # fmt: skip
                advance((number + 1) * place.world)
        if source.skipped:
            # Shards that were whole already were not read again: what they left out was named when they were made.
            path = out / f"skipped-{place.rank}.json"
            write_json(path, {**(read_json(OP, path) if path.is_file() else {}), **source.skipped})
        barrier()
        if place.first:
            manifest, counts = _write_manifest(out, autoencoder, order)
            if autoencoder.depth == 1:
                save_png(out / "usage.png", usage_plot(counts))
            _show_some(autoencoder, source, out, place.device)
            shared.console.print(
                f"{out}: {manifest['pictures']} pictures in {len(manifest['shards'])} shards, "
                f"{len(manifest['skipped'])} left out", highlight=False, soft_wrap=True,
            )  # fmt: skip
            shared.show_skipped(source)


def _show_some(model: Autoencoder, source: Source | Shards, out: Path, device: torch.device) -> None:
    """reconstructions.png: the first pictures above what their ids decode to."""
    found = filter(None, map(source.get, range(len(source)))) if isinstance(source, Source) else source.stream()
    shown = [p.pixels for p in islice(found, SHOWN)]
    if shown:
        images = normalise(torch.stack(shown))
        decoded = model.decode_maps(model.encode_maps(images.to(device))).cpu()
        columns = min(COLUMNS, len(shown))
        save_png(out / "reconstructions.png", grid(paired(images, decoded, columns), columns, title=PAIRED))


def decode(
    ids: Annotated[Path, typer.Argument(help="folder that `fastvq encode` wrote")],
    out: Annotated[Path, typer.Option(help="folder that gets the pictures")] = Path("decoded"),
    model: Annotated[Path, typer.Option(help="folder of the model that made the ids")] = shared.MODEL,
    limit: Annotated[int | None, typer.Option(min=1, help="pictures at most")] = None,
    batch_size: Annotated[int, typer.Option(min=1)] = 64,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda")] = "cpu",
) -> None:
    """Decode maps of code ids to pictures (PNG)."""
    with shared.reported():
        place = find_device(device)
        autoencoder = shared.read_model(model, place)
        manifest = read_json("fastvq decode", ids / MANIFEST, entries=["model_sha256", "pictures", "shards"])
        if manifest["model_sha256"] != shared.fingerprint(model):
            raise ValueError(f"{ids} was made by another model than {model}; its ids mean nothing to this one")
        total = min(manifest["pictures"], limit or manifest["pictures"])
        done = 0
        with shared.progress(total, "decode") as advance:
            for shard in manifest["shards"]:
                if done >= total:
                    break
                began, before = time.perf_counter(), done
                tensors, metadata = load_tensors("fastvq decode", ids / shard["name"], FORMAT)
                names = json.loads(metadata["names"])
                for first in range(0, min(len(names), total - done), batch_size):
                    last = min(first + batch_size, len(names), first + total - done)
                    maps = [tensors[f"level{level}"][first:last].long() for level in range(autoencoder.levels)]
                    images = autoencoder.decode_maps([m.to(place) for m in maps])
                    for name, image in zip(names[first:last], images, strict=True):
                        save_picture(out / f"{_file_name(name)}.png", image)
                    done += last - first
                    advance(done)
                seconds = time.perf_counter() - began
                write_line(out / LOG, {"shard": shard["name"], "pictures": done - before, "seconds": round(seconds, 3)})
        shared.console.print(f"{out}: {done} pictures", highlight=False, soft_wrap=True)


def _shards(source: Source | Shards, size: int, place: Place) -> Iterator[tuple[str, Iterator[Picture]]]:
    """(file name, its pictures) of this process's shards. Pictures are read only where they are asked for."""
    if isinstance(source, Source):
        for number in range(place.rank, -(-len(source) // size), place.world):
            indices = range(number * size, min((number + 1) * size, len(source)))
            found = (source.get(i) for i in indices)
            yield f"ids-{number:05d}.safetensors", (p for p in found if p is not None)
        return
    pictures = source.stream(rank=place.rank, world=place.world)
    number = 0
    while chunk := list(islice(pictures, size)):
        yield f"ids-{place.rank:03d}-of-{place.world:03d}-{number:05d}.safetensors", iter(chunk)
        number += 1


@torch.no_grad()
def _encode_shard(
    model: Autoencoder, pictures: Iterator[Picture], path: Path, batch_size: int, device: torch.device
) -> int:
    """Writes one shard and returns how many pictures are in it."""
    levels: list[list[Tensor]] = [[] for _ in range(model.levels)]
    names, labels = [], []
    while batch := list(islice(pictures, batch_size)):
        maps = model.encode_maps(normalise(torch.stack([p.pixels for p in batch])).to(device))
        for level, ids in enumerate(maps):
            levels[level].append(ids.cpu().to(_narrow(model.n_codes[level])))
        names += [p.name for p in batch]
        labels += [NO_LABEL if p.label is None else p.label for p in batch]
    tensors = {f"level{i}": torch.cat(maps) for i, maps in enumerate(levels) if maps}
    tensors["labels"] = torch.tensor(labels, dtype=torch.int64)
    save_tensors(path, tensors, {"format": FORMAT, "names": json.dumps(names)})
    return len(names)


def _narrow(n_codes: int) -> torch.dtype:
    """The narrowest type that holds the ids."""
    return torch.uint8 if n_codes <= 1 << 8 else torch.int16 if n_codes <= 1 << 15 else torch.int32


def _is_whole(path: Path) -> bool:
    try:
        load_tensors(OP, path, FORMAT)
    except (FileNotFoundError, ValueError):
        return False
    return True


def _check_order(out: Path, order: dict[str, Any], place: Place) -> None:
    """Writes what this folder is to hold, or compares with what it was begun with."""
    path = out / "order.json"
    if path.is_file():
        begun = read_json(OP, path)
        if begun != order:
            differing = ", ".join(sorted(k for k in order if begun.get(k) != order[k]))
            raise ValueError(f"{out} was begun with another {differing}; take another --out")
    elif place.first:
        write_json(path, order)
    barrier()


def _write_manifest(
    out: Path, model: Autoencoder, order: dict[str, Any]
) -> tuple[dict[str, Any], list[Tensor]]:  # the manifest, and how often each code occurs, [K] a level
    counts = [torch.zeros(k, dtype=torch.int64) for k in model.n_codes]
    shards: list[dict[str, Any]] = []
    skipped: dict[str, str] = {}
    for path in sorted(out.glob("ids-*.safetensors")):
        tensors, _ = load_tensors(OP, path, FORMAT)
        for level, k in enumerate(model.n_codes):
            if f"level{level}" in tensors:  # a shard may hold no picture that could be used
                counts[level] += torch.bincount(tensors[f"level{level}"].flatten().long(), minlength=k)
        shards.append({"name": path.name, "pictures": len(tensors["labels"])})
    for path in sorted(out.glob("skipped-*.json")):
        skipped |= read_json(OP, path)
    manifest = {
        **order, "levels": model.levels, "n_codes": model.n_codes, "strides": model.strides,
        "pictures": sum(s["pictures"] for s in shards), "skipped": skipped, "shards": shards,
    }  # fmt: skip
    write_json(out / MANIFEST, manifest)
    return manifest, counts


def _file_name(name: str) -> str:
    """A picture's name as the name of one file: folders and anything unusual become an underscore."""
    stem = re.sub(r"\.[A-Za-z0-9]{1,4}$", "", name)
    return re.sub(r"[^A-Za-z0-9._-]+", "_", stem).strip(".") or "picture"
