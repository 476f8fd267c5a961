"""``fastvq encode`` and ``fastvq decode``: folders or shards of pictures to id maps in safetensors shards, and back.

A shard holds the maps of ``shard_size`` pictures, written whole or not at all; what is there already is not made again.
Shard s of numbered pictures holds pictures s * shard_size and on, whichever of several processes makes it, and maps are
made in batches within a shard, so that the tokens are the same on any number of processes.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from fastvq._files import lock_folder
from fastvq._json import read_json, write_json
from fastvq.cli import shared
from fastvq.cli.id_shards import MANIFEST, MANIFEST_KIND, ORDER_KIND, SKIPPED_KIND, check_listed, load_shard, save_shard
from fastvq.cli.pictures import PAIRED, grid, paired, save_picture, save_png, usage_plot
from fastvq.data import Picture, Shards, Source, normalise, open_data
from fastvq.models.autoencoder import Autoencoder
from fastvq.training import Place, barrier, find_device, processes, run_folder
from fastvq.training.log import write_line

__all__ = ["decode", "encode"]

OP = "fastvq encode"
LOG = "log.jsonl"
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
    with shared.reported(), processes(device) as place, run_folder(OP, out, place):
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
                if not _is_whole(out / name, autoencoder.n_codes):
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
            before = read_json(OP, path, SKIPPED_KIND) if path.is_file() else {}
            write_json(path, {**before, **source.skipped}, seal=True)
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
    with shared.reported(), lock_folder("fastvq decode", out):
        place = find_device(device)
        autoencoder = shared.read_model(model, place)
        manifest = read_json("fastvq decode", ids / MANIFEST, MANIFEST_KIND)
        if manifest["model_sha256"] != shared.fingerprint(model):
            raise ValueError(f"{ids} was made by another model than {model}; its ids mean nothing to this one")
        total = min(manifest["pictures"], limit or manifest["pictures"])
        done = 0
        with shared.progress(total, "decode") as advance:
            for shard in manifest["shards"]:
                if done >= total:
                    break
                began, before = time.perf_counter(), done
                path = ids / Path(shard["name"]).name
                loaded = load_shard("fastvq decode", path, autoencoder.n_codes)
                check_listed("fastvq decode", path, shard, loaded)
                names = loaded.names
                for first in range(0, min(len(names), total - done), batch_size):
                    last = min(first + batch_size, len(names), first + total - done)
                    maps = [ids[first:last].long() for ids in loaded.maps]
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
    save_shard(path, names, torch.tensor(labels, dtype=torch.int64), [torch.cat(maps) for maps in levels if maps])
    return len(names)


def _narrow(n_codes: int) -> torch.dtype:
    """The narrowest type that holds the ids."""
    return torch.uint8 if n_codes <= 1 << 8 else torch.int16 if n_codes <= 1 << 15 else torch.int32


def _is_whole(path: Path, n_codes: Sequence[int]) -> bool:
    try:
        load_shard(OP, path, n_codes)
    except (FileNotFoundError, ValueError):
        return False
    return True


def _check_order(out: Path, order: dict[str, Any], place: Place) -> None:
    """Writes what this folder is to hold, or compares with what it was begun with."""
    path = out / "order.json"
    if path.is_file():
        begun = read_json(OP, path, ORDER_KIND)
        if begun != order:
            differing = ", ".join(sorted(k for k in order if begun.get(k) != order[k]))
            raise ValueError(f"{out} was begun with another {differing}; take another --out")
    elif place.first:
        write_json(path, order, seal=True)
    barrier()


def _write_manifest(
    out: Path, model: Autoencoder, order: dict[str, Any]
) -> tuple[dict[str, Any], list[Tensor]]:  # the manifest, and how often each code occurs, [K] a level
    counts = [torch.zeros(k, dtype=torch.int64) for k in model.n_codes]
    shards: list[dict[str, Any]] = []
    skipped: dict[str, str] = {}
    for path in sorted(out.glob("ids-*.safetensors")):
        shard = load_shard(OP, path, model.n_codes)
        for level, ids in enumerate(shard.maps):  # none where the shard holds no picture that could be used
            counts[level] += torch.bincount(ids.flatten().long(), minlength=model.n_codes[level])
        listed = {"name": path.name, "pictures": len(shard.names)}
        shards.append({**listed, "sha256": shard.digest} if shard.digest else listed)
    for path in sorted(out.glob("skipped-*.json")):
        skipped |= read_json(OP, path, SKIPPED_KIND)
    manifest = {
        **order, "levels": model.levels, "n_codes": model.n_codes, "strides": model.strides,
        "pictures": sum(s["pictures"] for s in shards), "skipped": skipped, "shards": shards,
    }  # fmt: skip
    write_json(out / MANIFEST, manifest, seal=True)
    return manifest, counts


def _file_name(name: str) -> str:
    """A picture's name as the name of one file: folders and anything unusual become an underscore."""
    stem = re.sub(r"\.[A-Za-z0-9]{1,4}$", "", name)
    return re.sub(r"[^A-Za-z0-9._-]+", "_", stem).strip(".") or "picture"
