"""``fastvq encode``: pictures to id maps in safetensors shards.

A shard holds the maps of ``shard_size`` pictures, written whole or not at all; one that is there already is not made
again. Shard s of numbered pictures holds pictures s * shard_size and on; shard p of an archive holds its samples
p * shard_size and on. Maps are made in batches within a shard. So the files are the same whichever of several processes
makes them, and however often the call was interrupted.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain, islice
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import typer
from torch import Tensor

from fastvq._json import read_json, write_json
from fastvq.cli import shared
from fastvq.cli.id_shards import (
    BROKEN_END,
    LAST,
    MANIFEST,
    MORE,
    SHARDS,
    SKIPPED_KIND,
    IdShard,
    load_shard,
    save_shard,
)
from fastvq.cli.order import LOG, begin, forget, listing_digest
from fastvq.cli.pictures import PAIRED, grid, paired, save_image, usage_plot
from fastvq.data import Picture, Shards, Source, check_size, normalise, open_data
from fastvq.models.autoencoder import Autoencoder
from fastvq.training import Place, barrier, from_first, processes, run_folder
from fastvq.training.log import write_line

__all__ = ["encode"]

OP = "fastvq encode"
SHOWN, COLUMNS = 16, 8  # pictures of the grid of reconstructions
NO_LABEL = -1
RESUME = "the same command goes on where it stopped"


def encode(
    data: Annotated[
        str, typer.Argument(help="a folder of pictures, tar shards, digits, photographs, torchvision:NAME")
    ],
    out: Annotated[Path, typer.Option(help="folder of the id maps; one that was begun is gone on with")] = Path("ids"),
    model: Annotated[Path, typer.Option(help="folder of the trained model")] = shared.MODEL,
    split: Annotated[str, typer.Option(help="train, held-out or all")] = "all",
    size: Annotated[int | None, typer.Option(help="side of the pictures; the model's unless given")] = None,
    odd: Annotated[str, typer.Option(help="odd pictures: skip or convert")] = "skip",
    field: shared.Field = None,
    batch_size: Annotated[int, typer.Option(min=1)] = 64,
    shard_size: Annotated[int, typer.Option(min=1, help="pictures a shard")] = 4096,
    restart: Annotated[bool, typer.Option("--restart", help="remove the maps in --out and start anew")] = False,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda")] = "auto",
) -> None:
    """Encode pictures to maps of code ids. Status 0: some were encoded; 1: every picture was left out; 2: an error."""
    with (
        shared.reported(RESUME), shared.ended_by_sigterm(), processes(device) as place, shared.unclaimed(out, data),
        run_folder(OP, out, place),
    ):  # fmt: skip
        autoencoder = shared.read_model(model, place.device)
        if size is None:
            size = shared.read_data(model)[1]["size"]
        check_size(OP, size, autoencoder.strides[0])
        source = open_data(data, split, size=size, channels=autoencoder.in_channels, odd=odd, field=field)
        if source.channels != autoencoder.in_channels:
            raise ValueError(f"{model} takes {autoencoder.in_channels} channels, and {data} has {source.channels}")
        # All that decides what the folder holds. The size of batches and the device may change: they move ids by
        # rounding at most.
        order: dict[str, Any] = {
            "model_sha256": shared.fingerprint(model), "data": data, "split": split, "size": size,
            "shard_size": shard_size, "odd": odd, "field": field, "listing": listing_digest(source.listing()),
        }  # fmt: skip
        from_first(place, lambda: begin(out, order, source, autoencoder.n_codes, restart=restart))
        call = _Call(autoencoder, source, out, shard_size, batch_size, place)
        with _forgotten_if_empty(out, place):
            if isinstance(source, Source):
                call.encode_numbered(source)
            else:
                call.encode_archives(source)
            barrier()
            if not from_first(place, lambda: _finish(call, order)):
                if place.first:
                    forget(out)
                raise typer.Exit(1)


class _Call(NamedTuple):
    model: Autoencoder
    source: Source | Shards
    out: Path
    shard_size: int
    batch_size: int
    place: Place

    def encode_numbered(self, source: Source) -> None:
        n_shards = -(-len(source) // self.shard_size)
        with shared.progress(n_shards, "encode", shown=self.place.first) as advance:
            for number in range(self.place.rank, n_shards, self.place.world):
                path = self.out / f"ids-{number:05d}.safetensors"
                if self.load(path) is None:
                    began, before = time.perf_counter(), set(source.skipped)
                    indices = range(number * self.shard_size, min((number + 1) * self.shard_size, len(source)))
                    encoded = self.encode(p for p in map(source.get, indices) if p is not None)
                    self.save(path, encoded, _added(source, before), LAST, began)
                advance(number + self.place.world)

    def encode_archives(self, source: Shards) -> None:
        """Archives go to processes in turn; the shards of each do where there are fewer archives than processes."""
        n, place = len(source.shards), self.place
        with shared.progress(n, "encode", shown=place.first) as advance:
            for number in range(n):
                if (n < place.world or number % place.world == place.rank) and not self._is_done(number):
                    self._encode_archive(source, number)
                advance(number + 1)

    def _encode_archive(self, source: Shards, number: int) -> None:
        part, end = 0, MORE
        before = set(source.skipped)
        samples = source.samples(number)
        ahead = next(samples, None)
        while end == MORE:
            began = time.perf_counter()
            taken = chain([] if ahead is None else [ahead], islice(samples, self.shard_size - 1))
            path = self._part(number, part)
            mine = len(source.shards) >= self.place.world or (number + part) % self.place.world == self.place.rank
            there = self.load(path) if mine else None
            is_kept = there is not None and there.end != BROKEN_END
            encoded = None
            if mine and not is_kept:
                encoded = self.encode(p for p in map(source.decode, taken) if p is not None)
            deque(taken, maxlen=0)
            ahead = next(samples, None)
            end = MORE if ahead is not None else LAST if source.is_whole(number) else BROKEN_END
            if is_kept and there is not None and there.end != end:
                if end != BROKEN_END:
                    raise ValueError(
                        f"{source.shards[number]} is not the archive that {self.out} was begun with: take another "
                        "--out, or start anew with --restart"
                    )
                # It was read further before. This shard stays, and the next says that there may be more.
                path = self._part(number, part + 1)
                encoded = self.encode(iter(()))
            if encoded is not None:
                self.save(path, encoded, _added(source, before), end, began)
            before = set(source.skipped)
            part += 1

    def _part(self, number: int, part: int) -> Path:
        return self.out / f"ids-{number:05d}-{part:05d}.safetensors"

    def _is_done(self, number: int) -> bool:
        """Whether all shards of an archive are there."""
        part = 0
        while (there := self.load(self._part(number, part))) is not None and there.end == MORE:
            part += 1
        return there is not None and there.end == LAST

    def load(self, path: Path) -> IdShard | None:
        """A shard that is there and whole."""
        try:
            return load_shard(OP, path, self.model.n_codes)
        except (FileNotFoundError, ValueError):
            return None

    @torch.no_grad()
    def encode(self, pictures: Iterator[Picture]) -> tuple[list[str], list[int], list[Tensor]]:
        """(names, labels, maps of each level)."""
        levels: list[list[Tensor]] = [[] for _ in range(self.model.levels)]
        names: list[str] = []
        labels: list[int] = []
        while batch := list(islice(pictures, self.batch_size)):
            maps = self.model.encode_maps(normalise(torch.stack([p.pixels for p in batch])).to(self.place.device))
            for level, ids in enumerate(maps):
                levels[level].append(ids.cpu().to(_narrow(self.model.n_codes[level])))
            names += [p.name for p in batch]
            labels += [NO_LABEL if p.label is None else p.label for p in batch]
        return names, labels, [torch.cat(maps) for maps in levels if maps]

    def save(
        self, path: Path, encoded: tuple[list[str], list[int], list[Tensor]], skipped: dict[str, str], end: str,
        began: float,
    ) -> None:  # fmt: skip
        names, labels, maps = encoded
        save_shard(path, names, torch.tensor(labels, dtype=torch.int64), maps, skipped, end)
        write_line(self.out / LOG, {
            "shard": path.name, "pictures": len(names), "seconds": round(time.perf_counter() - began, 3),
            "rank": self.place.rank, "left_out": len(self.source.skipped),
        })  # fmt: skip


def _added(source: Source | Shards, before: set[str]) -> dict[str, str]:
    return {name: reason for name, reason in source.skipped.items() if name not in before}


def _narrow(n_codes: int) -> torch.dtype:
    """The narrowest type that holds the ids."""
    return torch.uint8 if n_codes <= 1 << 8 else torch.int16 if n_codes <= 1 << 15 else torch.int32


@contextmanager
def _forgotten_if_empty(out: Path, place: Place) -> Iterator[None]:
    """A call that fails before the first shard is whole leaves the folder as if it had not been."""
    try:
        yield
    except BaseException:
        if place.first and not any(out.glob(SHARDS)):
            forget(out)
        raise


def _finish(call: _Call, order: dict[str, Any]) -> int:
    """Writes the manifest and the pictures to look at; returns how many pictures are encoded."""
    out, model, source = call.out, call.model, call.source
    counts = [torch.zeros(k, dtype=torch.int64) for k in model.n_codes]
    shards: list[dict[str, Any]] = []
    skipped: dict[str, str] = {}
    for path in sorted(out.glob("skipped-*.json")):  # of earlier versions
        skipped |= read_json(OP, path, SKIPPED_KIND)
    # What a source leaves out before any picture is read, as folders that cannot be.
    skipped |= source.skipped if isinstance(source, Source) else {}
    for path in sorted(out.glob(SHARDS)):
        shard = load_shard(OP, path, model.n_codes)
        for level, ids in enumerate(shard.maps):  # none where the shard holds no picture that could be used
            counts[level] += torch.bincount(ids.flatten().long(), minlength=model.n_codes[level])
        skipped |= shard.skipped
        listed = {"name": path.name, "pictures": len(shard.names)}
        shards.append({**listed, "sha256": shard.digest} if shard.digest else listed)
    pictures = sum(s["pictures"] for s in shards)
    if pictures:
        write_json(out / MANIFEST, {
            **order, "levels": model.levels, "n_codes": model.n_codes, "strides": model.strides, "pictures": pictures,
            "skipped": skipped, "shards": shards,
        }, seal=True)  # fmt: skip
        if model.depth == 1:
            save_image(out / "usage.png", usage_plot(counts))
        _show_some(model, source, out, call.place.device)
    shared.console.print(
        f"{out}: {pictures} pictures in {len(shards)} shards, {len(skipped)} left out" if pictures else
        f"[bold red]error:[/] no picture was encoded, {len(skipped)} left out", highlight=False, soft_wrap=True,
    )  # fmt: skip
    shared.show_skipped(skipped)
    return pictures


def _show_some(model: Autoencoder, source: Source | Shards, out: Path, device: torch.device) -> None:
    """reconstructions.png: the first pictures above what their ids decode to."""
    found = filter(None, map(source.get, range(len(source)))) if isinstance(source, Source) else source.stream()
    shown = [p.pixels for p in islice(found, SHOWN)]
    if shown:
        images = normalise(torch.stack(shown))
        decoded = model.decode_maps(model.encode_maps(images.to(device))).cpu()
        columns = min(COLUMNS, len(shown))
        save_image(out / "reconstructions.png", grid(paired(images, decoded, columns), columns, title=PAIRED))
