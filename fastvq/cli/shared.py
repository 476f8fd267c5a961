"""What the commands share: how errors look, progress bars, opening models, priors and pictures."""

from __future__ import annotations

import hashlib
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

from fastvq._json import read_json, record, text, whole, write_json
from fastvq.data import Batch, Loader, Shards, normalise, open_data, read_picture
from fastvq.data.sources import Source
from fastvq.models.autoencoder import Autoencoder
from fastvq.models.checkpoints import WEIGHTS
from fastvq.models.prior import Prior
from fastvq.training import find_device
from fastvq.training.state import STATE

__all__ = [
    "MODEL", "PRIOR", "check_label", "console", "count_codes", "fingerprint", "picture_file", "progress", "read_data",
    "read_model", "read_priors", "reported", "show_skipped", "some_pictures", "write_data", "write_made_for",
]  # fmt: skip

console = Console(stderr=True)
MODEL, PRIOR = Path("runs/vqvae"), Path("runs/prior")
DATA = "data.json"  # beside a model: what it was trained on
MADE_FOR = "model.json"  # beside priors: the model whose ids they were trained on
DATA_KIND = record({"data": text, "size": whole(1, 1 << 16), "channels": whole(1, 1 << 16), "odd": text})
MADE_FOR_KIND = record({"model_sha256": text})


@contextmanager
def reported() -> Iterator[None]:
    """Turns errors that a user can do something about into one line and exit status 2."""
    try:
        yield
    except (ValueError, TypeError, OSError) as error:
        # Names from files may hold line breaks and terminal codes.
        said = "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in " ".join(str(error).split()))
        console.print(f"[bold red]error:[/] {escape(said)}", highlight=False, soft_wrap=True)
        raise typer.Exit(2) from error


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
    return Autoencoder.from_pretrained(folder, find_device(str(device)))


def fingerprint(folder: Path) -> str:
    """Of a model's weights: ids mean something to the model that made them, and to no other."""
    return hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest()


def write_data(folder: Path, name: str, size: int, channels: int, odd: str) -> None:
    """Writes what a run is trained on; ValueError where the folder holds a run on something else."""
    described = {"data": name, "size": size, "channels": channels, "odd": odd}
    if (folder / STATE).is_file() and (folder / DATA).is_file():
        before = read_json("fastvq", folder / DATA, DATA_KIND)
        if before != described:
            raise ValueError(f"{folder} holds a run on other data ({before}, not {described}); take another --out")
        return
    write_json(folder / DATA, described, seal=True)


def write_made_for(folder: Path, model: Path) -> None:
    """Writes whose ids priors are trained on; ValueError where the folder holds priors of another model."""
    if (folder / MADE_FOR).is_file() and any(folder.glob(f"level*/{STATE}")):
        _check_made_for(folder, model)
    else:
        write_json(folder / MADE_FOR, {"model_sha256": fingerprint(model)}, seal=True)


def _check_made_for(folder: Path, model: Path) -> None:
    if read_json("fastvq", folder / MADE_FOR, MADE_FOR_KIND)["model_sha256"] != fingerprint(model):
        raise ValueError(
            f"{folder} was trained on the ids of another model than {model}, which mean nothing to this one; "
            f"train a prior for it with `fastvq train prior --model {model} --out` another folder"
        )


def read_data(folder: Path) -> tuple[str, dict[str, Any]]:
    """(name, options of ``open_data``) of the pictures that a model was trained on."""
    if not (folder / DATA).is_file():
        raise ValueError(f"{folder} does not say what it was trained on ({DATA} is missing); give --data")
    described = read_json("fastvq", folder / DATA, DATA_KIND)
    return described.pop("data"), described


def read_priors(folder: Path, model: Autoencoder, made_for: Path, device: torch.device | str = "cpu") -> list[Prior]:
    """The priors of all levels, ``folder/level0`` the top's; ValueError where ``model``, which ``made_for`` holds, is
    not the one whose ids they were trained on."""
    if (folder / MADE_FOR).is_file():
        _check_made_for(folder, made_for)
    return [Prior.from_pretrained(folder / f"level{level}", device) for level in range(model.levels)]


def check_label(label: int, prior: Prior) -> None:
    if prior.n_classes is None or not 0 <= label < prior.n_classes:
        classes = f"0 .. {prior.n_classes - 1}" if prior.n_classes else "it has none"
        raise ValueError(f"--label must be one of the prior's classes ({classes}), got {label}")


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
