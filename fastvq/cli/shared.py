"""Parts that several commands use: error messages, progress bars, opening models, priors and pictures."""

from __future__ import annotations

import contextlib
import hashlib
import os
import signal
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from PIL import Image
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from fastvq._json import any_of, nothing, read_json, record, text, whole, write_json
from fastvq._shorten import SHOWN_NOTE, printable, shorten, shorten_text
from fastvq.cli.encode_config import listing_digest, same_option
from fastvq.data import Batch, Loader, Shards, is_archive, normalise, open_data, read_fitting
from fastvq.data.sources import Digits, Photographs, Source
from fastvq.models.autoencoder import Autoencoder
from fastvq.models.checkpoints import WEIGHTS
from fastvq.models.prior import Prior
from fastvq.training import Stopped, find_device, handled
from fastvq.training.state import STATE

__all__ = [
    "MODEL",
    "PRIOR",
    "Field",
    "check_data",
    "check_label",
    "check_outside",
    "console",
    "count_codes",
    "fingerprint",
    "output_folder",
    "picture_file",
    "progress",
    "raise_on_sigterm",
    "read_data",
    "read_model",
    "read_priors",
    "report_errors",
    "show_skipped",
    "some_pictures",
    "write_data",
    "write_prior_model",
]

console = Console(stderr=True)
MODEL, PRIOR = Path("runs/vqvae"), Path("runs/prior")
LINE_SECONDS = 5.0  # between two lines of progress where there is no terminal
DATA = "data.json"  # in a model's folder: the data it was trained on
MAX_NAMED = 10  # at most this many of the pictures left out are printed
PRIOR_MODEL = "model.json"  # in the folder of priors: digest of the model whose ids they were trained on
DATA_KIND = record(
    {"data": text, "size": whole(1, 1 << 16), "channels": whole(1, 1 << 16), "odd": text},
    {"field": any_of(nothing, text), "listing": record({"entries": whole(0, 1 << 40), "sha256": text})},
)
Field = Annotated[
    str | None,
    typer.Option(help="which member of an archive's samples is the picture: jpg, seg.png; *.jpg: names hold periods"),
]
PRIOR_MODEL_KIND = record({"model_sha256": text})


@contextmanager
def report_errors(after_stop: str = "") -> Iterator[None]:
    """Prints an error that a user can mend as one line, and ends with exit status 2.

    Ctrl-C ends with status 130; SIGTERM, where it is handled, with 143. ``after_stop`` tells the user how to continue.
    """
    # ``read_picture`` refuses these pictures with a message, so Pillow need not warn of them.
    warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
    after_stop = after_stop and f"; {after_stop}"
    try:
        yield
    except (ValueError, TypeError, OSError) as error:
        console.print(f"[bold red]error:[/] {escape(printable(str(error)))}", highlight=False, soft_wrap=True)
        raise typer.Exit(2) from error
    except KeyboardInterrupt:
        console.print(f"stopped by Ctrl-C{after_stop}", highlight=False, markup=False, soft_wrap=True)
        raise typer.Exit(130) from None
    except Terminated:
        console.print(f"stopped by SIGTERM{after_stop}", highlight=False, markup=False, soft_wrap=True)
        raise typer.Exit(143) from None
    except Stopped as stop:
        said = f"stopped by SIGTERM after step {stop.step}, which is saved{after_stop}"
        console.print(said, highlight=False, markup=False, soft_wrap=True)
        raise typer.Exit(143) from None


class Terminated(BaseException):
    """SIGTERM was received by a command that ends at once."""


@contextmanager
def raise_on_sigterm() -> Iterator[None]:
    """Makes SIGTERM raise ``Terminated``, so that open files are closed."""

    def end(*_: Any) -> None:
        raise Terminated

    with handled(signal.SIGTERM, end):
        yield


def check_outside(folder: Path, data: str) -> None:
    """ValueError if the output ``folder`` lies in the folder of pictures that ``data`` names.

    Pictures written there would count as data in the next call, and could overwrite pictures of the data.
    """
    pictures = Path(data)
    is_folder = data not in (Digits.name, Photographs.name) and os.path.isdir(data)  # Path's raises for long names
    if is_folder and folder.resolve().is_relative_to(pictures.resolve()):
        raise ValueError(
            f"--out must lie outside the folder of pictures {data}, got {folder}; what is written there would count as "
            "its pictures: take another --out"
        )


@contextmanager
def output_folder(folder: Path, data: str | None = None) -> Iterator[None]:
    """At the end of the block, removes ``folder`` and its parents if the block created them and they are empty.

    Raises:
        ValueError: ``folder`` is no folder, or lies in the folder ``data``.
    """
    if blocking := next((path for path in (folder, *folder.parents) if path.is_file()), None):
        raise ValueError(f"--out must be a folder, got {folder}, and {blocking} is a file: take another --out")
    if data is not None:
        check_outside(folder, data)
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # not empty, or never created
            for path in made:
                path.rmdir()


@contextmanager
def progress(total: int, description: str, *, shown: bool = True) -> Iterator[Any]:
    """Yields ``advance(done, note)``. A bar on a terminal, elsewhere a line every few seconds."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    lines = shown and not console.is_terminal
    with Progress(*columns, console=console, disable=lines or not shown) as bar:
        task = bar.add_task(description, total=total, note="")
        start = last = time.monotonic()
        first: int | None = None
        noted = ""

        def advance(done: int, note: str | None = None) -> None:
            nonlocal last, noted, first
            fields: dict[str, Any] = {} if note is None else {"note": note}
            noted = noted if note is None else note
            bar.update(task, completed=done, **fields)
            first = done if first is None else first
            now = time.monotonic()
            if lines and now - last >= LINE_SECONDS:
                last = now
                left = "" if done == first else f", {(now - start) * (total - done) / (done - first):.0f} s left"
                said = f"{description}: {done} of {total}{left}{noted and '; ' + noted}"
                console.print(said, highlight=False, markup=False, soft_wrap=True)

        yield advance


def read_model(folder: Path, device: torch.device | str = "cpu") -> Autoencoder:
    return Autoencoder.from_pretrained(folder, find_device(str(device)))


def fingerprint(folder: Path) -> str:
    """Digest of a model's weights. Ids have a meaning only for the model that made them."""
    return hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest()


def write_data(folder: Path, name: str, source: Source | Shards, odd: str, field: str | None) -> None:
    """Writes the description of a run's data. ValueError if the folder holds a run on other data."""
    described = {
        "data": name,
        "size": source.size,
        "channels": source.channels,
        "odd": odd,
        "field": field,
        "listing": listing_digest(source.listing()),
    }
    begun = (folder / STATE).is_file() or any(folder.glob(f"level*/{STATE}"))
    if begun and (folder / DATA).is_file():
        before = read_json("fastvq", folder / DATA, DATA_KIND)
        differing = [
            f"{key} was {_shown(before[key])}, is {_shown(described[key])}"
            for key in described
            if key in before and not same_option(key, before[key], described[key])
        ]
        if differing:
            raise ValueError(f"{folder} holds a run on other data ({'; '.join(differing)}); take another --out")
        return
    write_json(folder / DATA, described, seal=True)


def _shown(entry: Any) -> str:
    return f"of {entry['entries']} files ({entry['sha256'][:8]})" if isinstance(entry, dict) else shorten(entry)


def write_prior_model(folder: Path, model: Path) -> None:
    """Writes which model's ids priors are trained on. ValueError if the folder holds priors of another model."""
    if (folder / PRIOR_MODEL).is_file() and any(folder.glob(f"level*/{STATE}")):
        _check_prior_model(folder, model)
    else:
        write_json(folder / PRIOR_MODEL, {"model_sha256": fingerprint(model)}, seal=True)


def _check_prior_model(folder: Path, model: Path) -> None:
    if read_json("fastvq", folder / PRIOR_MODEL, PRIOR_MODEL_KIND)["model_sha256"] != fingerprint(model):
        raise ValueError(
            f"{folder} was trained on the ids of another model than {model}, which mean nothing to this one; "
            f"train a prior for it with `fastvq train prior --model {model} --out` another folder"
        )


def check_data(op: str, folder: Path) -> None:
    """ValueError where a file that says what a model or its priors were trained on is damaged. It may be absent."""
    if (folder / DATA).is_file():
        read_json(op, folder / DATA, DATA_KIND)
    if (folder / PRIOR_MODEL).is_file():
        read_json(op, folder / PRIOR_MODEL, PRIOR_MODEL_KIND)


def read_data(folder: Path) -> tuple[str, dict[str, Any]]:
    """(name, options of ``open_data``) of the data that a model was trained on."""
    if not (folder / DATA).is_file():
        raise ValueError(f"{folder} does not say what it was trained on ({DATA} is missing); give --data")
    described = read_json("fastvq", folder / DATA, DATA_KIND)
    described.pop("listing", None)
    return described.pop("data"), described


def read_priors(
    folder: Path, model: Autoencoder, model_folder: Path, device: torch.device | str = "cpu"
) -> list[Prior]:
    """The priors of all levels; ``folder/level0`` is the top level's. ``model`` was read from ``model_folder``.
    ValueError if the priors were trained on the ids of another model."""
    if (folder / PRIOR_MODEL).is_file():
        _check_prior_model(folder, model_folder)
    return [Prior.from_pretrained(folder / f"level{level}", device) for level in range(model.levels)]


def check_label(label: int, prior: Prior) -> None:
    if prior.n_classes is None or not 0 <= label < prior.n_classes:
        classes = f"0 .. {prior.n_classes - 1}" if prior.n_classes else "it has none"
        raise ValueError(f"--label must be one of the prior's classes ({classes}), got {label}")


def show_skipped(skipped: Mapping[str, str]) -> None:
    if skipped:
        console.print(f"[yellow]{len(skipped)} left out:[/]", highlight=False)
        for name, reason in list(skipped.items())[:MAX_NAMED]:
            line = shorten_text(f"{name}: {reason}", SHOWN_NOTE)
            console.print(f"  {line}", highlight=False, markup=False, soft_wrap=True)


def some_pictures(name: str, n: int, **options: Any) -> tuple[Tensor, Tensor | None]:
    """(images [n, C, H, W], labels [n] or None): held-out pictures if the data has any, else training pictures."""
    try:
        source = open_data(name, "train" if is_archive(name) else "held-out", **options)
        return _first_batch(source, n)
    except ValueError:
        console.print("no picture is held out: training pictures are shown", highlight=False)
        return _first_batch(open_data(name, "train", **options), n)


def _first_batch(source: Source | Shards, n: int) -> tuple[Tensor, Tensor | None]:
    if isinstance(source, Source):
        n = min(n, len(source))
    batch: Batch = next(Loader(source, n, seed=1, workers=0).batches())
    return batch.images, batch.labels


def picture_file(
    path: Path,
    model: Autoencoder,
    size: int | tuple[int, int] | None,
) -> Tensor:
    """[1, C, H, W] of one file. Without ``size`` the picture is cut to multiples of the top level's stride."""
    pixels = read_fitting(path.read_bytes(), str(path), channels=model.in_channels, stride=model.strides[0], size=size)
    return normalise(pixels[None])


def count_codes(model: Autoencoder, maps: list[Tensor]) -> list[Tensor]:
    """L tensors [K]: number of uses of each code."""
    return [torch.bincount(ids.flatten().cpu(), minlength=k) for ids, k in zip(maps, model.n_codes, strict=True)]
