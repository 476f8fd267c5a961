"""``fastvq encode``: encodes pictures to id maps, in safetensors shards.

A shard holds the maps of ``shard_size`` pictures and is written atomically; an existing shard is kept. Shard s of a
numbered set holds the pictures from s * shard_size on; shard p of an archive holds its samples from p * shard_size on.
Batches do not cross shards. So the files do not depend on the process that writes them, nor on interruptions.
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
from fastvq.cli.encode_config import LOG, listing_digest, open_output, remove_output
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
from fastvq.cli.pictures import PAIRED, grid, paired, save_image, usage_plot
from fastvq.data import Picture, Shards, Source, check_size, normalise, open_data
from fastvq.models.autoencoder import Autoencoder
from fastvq.training import ProcessContext, barrier, from_first, processes, run_folder
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
    out: Annotated[Path, typer.Option(help="folder of the id maps; an interrupted call is continued")] = Path("ids"),
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
        shared.report_errors(RESUME),
        shared.raise_on_sigterm(),
        processes(device) as process,
        shared.output_folder(out, data),
        run_folder(OP, out, process),
    ):
        autoencoder = shared.read_model(model, process.device)
        if size is None:
            size = shared.read_data(model)[1]["size"]
        check_size(OP, size, autoencoder.strides[0])
        source = open_data(data, split, size=size, channels=autoencoder.in_channels, odd=odd, field=field)
        if source.channels != autoencoder.in_channels:
            raise ValueError(f"{model} takes {autoencoder.in_channels} channels, and {data} has {source.channels}")
        # Everything that the contents of the folder depend on. The batch size and the device are left out: they change
        # ids by rounding at most.
        config: dict[str, Any] = {
            "model_sha256": shared.fingerprint(model),
            "data": data,
            "split": split,
            "size": size,
            "shard_size": shard_size,
            "odd": odd,
            "field": field,
            "listing": listing_digest(source.listing()),
        }
        from_first(process, lambda: open_output(out, config, source, autoencoder.n_codes, restart=restart))
        job = _EncodeJob(autoencoder, source, out, shard_size, batch_size, process)
        with _remove_if_empty(out, process):
            if isinstance(source, Source):
                job.encode_numbered(source)
            else:
                job.encode_archives(source)
            barrier()
            if not from_first(process, lambda: _finish(job, config)):
                if process.first:
                    remove_output(out)
                raise typer.Exit(1)


class _EncodeJob(NamedTuple):
    model: Autoencoder
    source: Source | Shards
    out: Path
    shard_size: int
    batch_size: int
    process: ProcessContext

    def encode_numbered(self, source: Source) -> None:
        n_shards = -(-len(source) // self.shard_size)
        with shared.progress(n_shards, "encode", shown=self.process.first) as advance:
            for number in range(self.process.rank, n_shards, self.process.world):
                path = self.out / f"ids-{number:05d}.safetensors"
                if self.load(path) is None:
                    start, before = time.perf_counter(), set(source.skipped)
                    indices = range(number * self.shard_size, min((number + 1) * self.shard_size, len(source)))
                    encoded = self.encode(p for p in map(source.get, indices) if p is not None)
                    self.save(path, encoded, _added(source, before), LAST, start)
                advance(number + self.process.world)

    def encode_archives(self, source: Shards) -> None:
        """Processes take archives in turn; with fewer archives than processes, the id shards of each archive."""
        n, process = len(source.shards), self.process
        with shared.progress(n, "encode", shown=process.first) as advance:
            for number in range(n):
                if (n < process.world or number % process.world == process.rank) and not self._is_done(number):
                    self._encode_archive(source, number)
                advance(number + 1)

    def _encode_archive(self, source: Shards, number: int) -> None:
        part, end, process = 0, MORE, self.process
        before = set(source.skipped)
        samples = source.samples(number)
        following = next(samples, None)
        while end == MORE:
            start = time.perf_counter()
            of_shard = chain([] if following is None else [following], islice(samples, self.shard_size - 1))
            path = self._part(number, part)
            is_ours = len(source.shards) >= process.world or (number + part) % process.world == process.rank
            existing = self.load(path) if is_ours else None
            is_kept = existing is not None and existing.end != BROKEN_END
            encoded = None
            if is_ours and not is_kept:
                encoded = self.encode(p for p in map(source.decode, of_shard) if p is not None)
            deque(of_shard, maxlen=0)  # skips the samples that were not encoded
            following = next(samples, None)
            end = MORE if following is not None else LAST if source.is_whole(number) else BROKEN_END
            if is_kept and existing is not None and existing.end != end:
                if end != BROKEN_END:
                    raise ValueError(
                        f"{source.shards[number]} is not the archive that {self.out} was begun with: take another "
                        "--out, or start anew with --restart"
                    )
                # An earlier call read further into the archive. Keep this shard, and write an empty one after it, whose
                # end says that the archive may hold more.
                path = self._part(number, part + 1)
                encoded = self.encode(iter(()))
            if encoded is not None:
                self.save(path, encoded, _added(source, before), end, start)
            before = set(source.skipped)
            part += 1

    def _part(self, number: int, part: int) -> Path:
        return self.out / f"ids-{number:05d}-{part:05d}.safetensors"

    def _is_done(self, number: int) -> bool:
        """Whether all id shards of an archive exist."""
        part = 0
        while (shard := self.load(self._part(number, part))) is not None and shard.end == MORE:
            part += 1
        return shard is not None and shard.end == LAST

    def load(self, path: Path) -> IdShard | None:
        """The shard at ``path``; None if it does not exist or is damaged."""
        try:
            return load_shard(OP, path, self.model.n_codes)
        except (FileNotFoundError, ValueError):
            return None

    @torch.no_grad()
    def encode(self, pictures: Iterator[Picture]) -> tuple[list[str], list[int], list[Tensor]]:
        """(names, labels, maps of each level) of pictures."""
        levels: list[list[Tensor]] = [[] for _ in range(self.model.levels)]
        names: list[str] = []
        labels: list[int] = []
        while batch := list(islice(pictures, self.batch_size)):
            maps = self.model.encode_maps(normalise(torch.stack([p.pixels for p in batch])).to(self.process.device))
            for level, ids in enumerate(maps):
                levels[level].append(ids.cpu().to(_narrow(self.model.n_codes[level])))
            names += [p.name for p in batch]
            labels += [NO_LABEL if p.label is None else p.label for p in batch]
        return names, labels, [torch.cat(maps) for maps in levels if maps]

    def save(
        self,
        path: Path,
        encoded: tuple[list[str], list[int], list[Tensor]],
        skipped: dict[str, str],
        end: str,
        start: float,
    ) -> None:
        names, labels, maps = encoded
        save_shard(path, names, torch.tensor(labels, dtype=torch.int64), maps, skipped, end)
        write_line(
            self.out / LOG,
            {
                "shard": path.name,
                "pictures": len(names),
                "seconds": round(time.perf_counter() - start, 3),
                "rank": self.process.rank,
                "left_out": len(self.source.skipped),
            },
        )


def _added(source: Source | Shards, before: set[str]) -> dict[str, str]:
    return {name: reason for name, reason in source.skipped.items() if name not in before}


def _narrow(n_codes: int) -> torch.dtype:
    """The narrowest dtype that holds the ids."""
    return torch.uint8 if n_codes <= 1 << 8 else torch.int16 if n_codes <= 1 << 15 else torch.int32


@contextmanager
def _remove_if_empty(out: Path, process: ProcessContext) -> Iterator[None]:
    """If the block raises before a shard is written, removes the other files that the call wrote."""
    try:
        yield
    except BaseException:
        if process.first and not any(out.glob(SHARDS)):
            remove_output(out)
        raise


def _finish(job: _EncodeJob, config: dict[str, Any]) -> int:
    """Writes the manifest and the overview pictures; returns the number of encoded pictures."""
    out, model, source = job.out, job.model, job.source
    counts = [torch.zeros(k, dtype=torch.int64) for k in model.n_codes]
    shards: list[dict[str, Any]] = []
    skipped: dict[str, str] = {}
    for path in sorted(out.glob("skipped-*.json")):  # written by earlier versions
        skipped |= read_json(OP, path, SKIPPED_KIND)
    # A source may skip things before any picture is read, such as folders that cannot be read.
    skipped |= source.skipped if isinstance(source, Source) else {}
    for path in sorted(out.glob(SHARDS)):
        shard = load_shard(OP, path, model.n_codes)
        for level, ids in enumerate(shard.maps):  # no maps in a shard without usable pictures
            counts[level] += torch.bincount(ids.flatten().long(), minlength=model.n_codes[level])
        skipped |= shard.skipped
        listed = {"name": path.name, "pictures": len(shard.names)}
        shards.append({**listed, "sha256": shard.digest} if shard.digest else listed)
    pictures = sum(s["pictures"] for s in shards)
    if pictures:
        write_json(
            out / MANIFEST,
            {
                **config,
                "levels": model.levels,
                "n_codes": model.n_codes,
                "strides": model.strides,
                "pictures": pictures,
                "skipped": skipped,
                "shards": shards,
            },
            seal=True,
        )
        if model.depth == 1:
            save_image(out / "usage.png", usage_plot(counts))
        _show_some(model, source, out, job.process.device)
    shared.console.print(
        f"{out}: {pictures} pictures in {len(shards)} shards, {len(skipped)} left out"
        if pictures
        else f"[bold red]error:[/] no picture was encoded, {len(skipped)} left out",
        highlight=False,
        soft_wrap=True,
    )
    shared.show_skipped(skipped)
    return pictures


def _show_some(model: Autoencoder, source: Source | Shards, out: Path, device: torch.device) -> None:
    """Writes reconstructions.png: the first pictures above their reconstructions."""
    found = filter(None, map(source.get, range(len(source)))) if isinstance(source, Source) else source.stream()
    shown = [p.pixels for p in islice(found, SHOWN)]
    if shown:
        images = normalise(torch.stack(shown))
        decoded = model.decode_maps(model.encode_maps(images.to(device))).cpu()
        columns = min(COLUMNS, len(shown))
        save_image(out / "reconstructions.png", grid(paired(images, decoded, columns), columns, title=PAIRED))
