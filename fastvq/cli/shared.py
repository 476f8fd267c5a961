"""What the commands share: how errors look, progress bars, opening models, priors and pictures."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from fastvq.data import Batch, Loader, Shards, normalise, open_data, read_picture
from fastvq.data.sources import Source
from fastvq.models.autoencoder import Autoencoder
from fastvq.models.checkpoints import read_json, write_json
from fastvq.models.prior import Prior

__all__ = [
    "MODEL", "PRIOR", "console", "count_codes", "picture_file", "progress", "read_data", "read_model",
    "read_priors", "reported", "show_skipped", "some_pictures", "write_data",
]  # fmt: skip

console = Console(stderr=True)
MODEL, PRIOR = Path("runs/vqvae"), Path("runs/prior")
DATA = "data.json"  # beside a model: what it was trained on


@contextmanager
def reported() -> Iterator[None]:
    """Turns errors that a user can do something about into one line and exit status 1."""
    try:
        yield
    except (ValueError, TypeError, OSError) as error:
        console.print(f"[bold red]error:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
        raise typer.Exit(1) from error


@contextmanager
def progress(total: int, what: str, *, shown: bool = True) -> Iterator[Any]:
    """Yields ``advance(done, note)``; a bar where the output is a terminal, nothing else where it is not."""
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )  # fmt: skip
    with Progress(*columns, console=console, disable=not (shown and console.is_terminal)) as bar:
        task = bar.add_task(what, total=total, note="")

        def advance(done: int, note: str | None = None) -> None:
            fields: dict[str, Any] = {} if note is None else {"note": note}
            bar.update(task, completed=done, **fields)

        yield advance


def read_model(folder: Path, device: torch.device | str = "cpu") -> Autoencoder:
    return Autoencoder.from_pretrained(folder, device)


def write_data(folder: Path, name: str, size: int, channels: int, odd: str) -> None:
    write_json(folder / DATA, {"data": name, "size": size, "channels": channels, "odd": odd})


def read_data(folder: Path) -> tuple[str, dict[str, Any]]:
    """(name, options of ``open_data``) of the pictures that a model was trained on."""
    if not (folder / DATA).is_file():
        raise ValueError(f"{folder} does not say what it was trained on ({DATA} is missing); give --data")
    described = read_json("fastvq", folder / DATA)
    return described.pop("data"), described


def read_priors(folder: Path, model: Autoencoder, device: torch.device | str = "cpu") -> list[Prior]:
    """The priors of all levels, ``folder/level0`` the top's."""
    return [Prior.from_pretrained(folder / f"level{level}", device) for level in range(model.levels)]


def show_skipped(source: Source | Shards) -> None:
    if source.skipped:
        console.print(f"[yellow]{len(source.skipped)} left out:[/]", highlight=False)
        for name, reason in list(source.skipped.items())[:10]:
            console.print(f"  {name}: {reason}", highlight=False, markup=False)


def some_pictures(name: str, n: int, **options: Any) -> tuple[Tensor, Tensor | None]:
    """(images [n, C, H, W], labels [n] or None): held-out ones where the data has any."""
    source = open_data(name, "held-out" if ".tar" not in name else "train", **options)
    if isinstance(source, Source):
        n = min(n, len(source))
    batch: Batch = next(Loader(source, n, seed=1, workers=0).batches())
    return batch.images, batch.labels


def picture_file(
    path: Path,
    model: Autoencoder,
    size: int | None,
) -> Tensor:
    """[1, C, H, W] of one file; the whole picture cut to multiples of the top level's stride where no size is given."""
    pixels = read_picture(path.read_bytes(), str(path), channels=model.in_channels, size=size, odd="convert")
    stride = model.strides[0]
    height, width = (side // stride * stride for side in pixels.shape[1:])
    return normalise(pixels[None, :, :height, :width])


def count_codes(model: Autoencoder, maps: list[Tensor]) -> list[Tensor]:
    """L tensors [K]: how often each code occurs."""
    return [torch.bincount(ids.flatten().cpu(), minlength=k) for ids, k in zip(maps, model.n_codes, strict=True)]
