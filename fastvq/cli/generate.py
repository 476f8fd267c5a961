"""``fastvq sample`` and ``fastvq edit``: samples new pictures, and changes a part of a picture."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from fastvq._files import remove_leftovers
from fastvq._shorten import SHOWN_NOTE, shorten_text
from fastvq.cli import shared
from fastvq.cli.pictures import check_picture_path, edit_picture, grid, save_image, save_picture
from fastvq.cli.serve import serve
from fastvq.data import Source, check_size, normalise, open_data
from fastvq.models import edit
from fastvq.models.autoencoder import Autoencoder
from fastvq.models.editing import region_mask
from fastvq.training import find_device
from fastvq.training.log import write_line

__all__ = ["edit_command", "sample"]

COLUMNS = 8
Model = Annotated[Path, typer.Option(help="folder of the trained model")]
PriorFolder = Annotated[Path, typer.Option(help="folder of its priors")]
Temperature = Annotated[float, typer.Option(help="below 1: likelier ids")]
TopP = Annotated[float | None, typer.Option(help="draw from the likeliest ids that add up to this probability")]


def sample(
    label: Annotated[int | None, typer.Option(help="one class; a row of each unless given")] = None,
    n: Annotated[int, typer.Option(min=1, help="pictures, of each class where no label is given")] = 16,
    model: Model = shared.MODEL,
    prior: PriorFolder = shared.PRIOR,
    out: Annotated[Path, typer.Option(help="the grid of samples")] = Path("samples.png"),
    each: Annotated[Path | None, typer.Option(help="folder that gets each picture as a file, too")] = None,
    temperature: Temperature = 0.8,
    top_p: TopP = None,
    size: Annotated[int | None, typer.Option(help="side of the pictures; the prior's unless given")] = None,
    seed: int = 0,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda")] = "cpu",
) -> None:
    """Draw new pictures."""
    with shared.report_errors():
        autoencoder, device = _begin("fastvq sample", out, size, model, device)
        priors = shared.read_priors(prior, autoencoder, model, device)
        n_classes = priors[0].n_classes
        names: list[str] = []
        labels = None
        if label is not None:
            shared.check_label(label, priors[0])
            labels = torch.full((n,), label)
        elif n_classes is not None:
            labels = torch.arange(n_classes).repeat_interleave(n)
            names = [str(c) for c in range(n_classes)]
        start = time.perf_counter()
        images = autoencoder.generate(
            n if labels is None else len(labels),
            labels,
            priors=priors,
            temperature=temperature,
            top_p=top_p,
            size=None if size is None else (size, size),
            generator=torch.Generator(device).manual_seed(seed),
            progress=shared.console.is_terminal,
        )
        seconds = time.perf_counter() - start
        columns = n if names else min(n, COLUMNS)
        title = f"label {label}" if label is not None else ""
        save_image(out, grid(images, columns, title=title, rows=names))
        if each is not None:
            for i, image in enumerate(images):
                save_picture(each / f"{i:05d}.png", image)
        write_line(
            out.with_suffix(".jsonl"),
            {
                "pictures": len(images),
                "label": label,
                "temperature": temperature,
                "top_p": top_p,
                "seed": seed,
                "model_sha256": shared.fingerprint(model),
                "seconds": round(seconds, 3),
                "file": out.name,
            },
        )
        shared.console.print(f"{out}: {len(images)} pictures", highlight=False, soft_wrap=True)


def edit_command(
    image: Annotated[Path | None, typer.Argument(help="a picture; one that was held out unless given")] = None,
    index: Annotated[int, typer.Option(min=0, help="which held-out picture, where no file is given")] = 0,
    box: Annotated[str | None, typer.Option(help="region x0,y0,x1,y1 in pixels; the middle unless given")] = None,
    source: Annotated[Path | None, typer.Option(help="transplant the region from this picture")] = None,
    source_index: Annotated[int | None, typer.Option(help="transplant it from this held-out picture")] = None,
    code: Annotated[
        str | None, typer.Option(help="set the region to these ids, one a level, top first: 3 or 3,17")
    ] = None,
    swap: Annotated[str | None, typer.Option(help="swap ids in the region: 3:17,4:2")] = None,
    label: Annotated[int | None, typer.Option(help="draw the region again, as this class")] = None,
    n: Annotated[int, typer.Option(min=1, help="how many different redrawings")] = 4,
    candidates: Annotated[int, typer.Option(min=1, help="drafts for each, weighed by the ids that follow")] = 8,
    temperature: Temperature = 1.0,
    blend: Annotated[
        int, typer.Option(min=0, help="put the original back outside, over a ramp of this many pixels; 0: no")
    ] = 0,
    model: Model = shared.MODEL,
    prior: PriorFolder = shared.PRIOR,
    size: Annotated[int | None, typer.Option(help="bring the picture to this side")] = None,
    out: Annotated[Path, typer.Option(help="picture, reconstruction, edit and change, side by side")] = Path(
        "edit.png"
    ),
    seed: int = 0,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda")] = "cpu",
    page: Annotated[
        bool,
        typer.Option(
            "--serve",
            help="open a page in the browser instead; it needs [serve], and takes --model, "
            "--prior, --size, --device, --host, --port and --allow-host",
        ),
    ] = False,
    host: Annotated[str, typer.Option(help="address of the page; 0.0.0.0: all of this machine's")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="port of the page; 0: any free one")] = 8765,
    allow_host: Annotated[
        list[str] | None, typer.Option(help="a further name that browsers reach the page by; may repeat")
    ] = None,
) -> None:
    """Change a part of a picture: transplant, set or swap its codes, or (else) let the prior draw it again."""
    with shared.report_errors():
        if page:
            serve(model, prior, size=size, device=device, host=host, port=port, allowed=allow_host or ())
            return
        autoencoder, device = _begin("fastvq edit", out, size, model, device)
        if image is not None:
            picture = shared.picture_file(image, autoencoder, size)
            own_label = None
        else:
            picture, own_label = _held_out(model, index)
        picture = picture.to(device)
        height, width = picture.shape[2:]
        region = (
            _numbers("--box", box, 4) if box else [width // 4, height // 4, width - width // 4, height - height // 4]
        )
        way: dict[str, Any] = {}
        if source is not None or source_index is not None:
            other = (
                shared.picture_file(source, autoencoder, (height, width))
                if source
                else _held_out(model, source_index or 0)[0]
            )
            way["source"] = other.to(device)
        if code is not None:
            way["codes"] = _numbers("--code", code, autoencoder.levels)
        if swap is not None:
            way["swap"] = {
                old: new for old, new in (_numbers("--swap", pair.replace(":", ","), 2) for pair in swap.split(","))
            }
        if not way:
            priors = shared.read_priors(prior, autoencoder, model, device)
            if label is not None:
                shared.check_label(label, priors[0])
            label = own_label if label is None else label
            if label is None and priors[0].n_classes:
                raise ValueError(f"--label must be given, 0 .. {priors[0].n_classes - 1}: {prior} draws for a label")
            way = {
                "prior": priors,
                "labels": label if priors[0].n_classes else None,
                "n_candidates": candidates,
                "temperature": temperature,
            }
        repeats = n if "prior" in way else 1
        paths = [out if i == 0 else out.with_name(f"{out.stem}-{i}{out.suffix}") for i in range(repeats)]
        alone = [path.with_name(f"{path.stem}-picture{path.suffix}") for path in paths]
        for given in (image, source):
            if given is not None and given.resolve() in {path.resolve() for path in (*paths, *alone)}:
                raise ValueError(f"--out must not write to {given}, which is read; take another --out than {out}")
        edited = edit(
            autoencoder,
            picture.expand(repeats, -1, -1, -1),
            region,
            blend=blend,
            generator=torch.Generator(device).manual_seed(seed),
            **way,
        )
        for i, path in enumerate(paths):
            title = f"change inside {edited.inside_change[i]:.4f}, outside {edited.outside_change[i]:.4f}"
            mask = region_mask(region, picture)[0]
            save_image(path, edit_picture(picture[0], edited.reconstruction[i], edited.image[i], mask, title))
            save_picture(alone[i], edited.image[i])
        line = {
            "region": list(region),
            "changed_ids": [int(c[0].sum()) for c in edited.changed],
            "inside_change": [round(float(v), 6) for v in edited.inside_change],
            "outside_change": [round(float(v), 6) for v in edited.outside_change],
            "pixels_in_reach": int(edited.reach[0].sum()),
            "pixels": height * width,
        }
        asked = {"picture": str(image or f"held-out {index}"), "code": code, "swap": swap, "label": label, "seed": seed}
        write_line(out.with_suffix(".jsonl"), {**asked, **line, "file": out.name})
        typer.echo(json.dumps(line))
        shared.console.print(
            f"{', '.join(map(str, paths))}; each alone in *-picture{out.suffix}", highlight=False, soft_wrap=True
        )


def _begin(command: str, out: Path, size: int | None, model: Path, device: str) -> tuple[Autoencoder, str]:
    """Checks where a picture goes and the size, removes what a killed command left there: (model, its device)."""
    check_picture_path("--out", out)
    remove_leftovers(out.parent)
    check_size(command, size)
    device = str(find_device(device))
    return shared.read_model(model, device), device


def _held_out(model: Path, index: int) -> tuple[torch.Tensor, int | None]:
    """One held-out picture [1, C, H, W] of the model's training data, and its label."""
    name, options = shared.read_data(model)
    source = open_data(name, "held-out", **options)
    if not isinstance(source, Source):
        raise ValueError(f"{shorten_text(name)} holds no pictures out; give a picture's file")
    if not 0 <= index < len(source):
        raise ValueError(f"{shorten_text(name)} holds out pictures 0 .. {len(source) - 1}, got {index}")
    found = source.get(index)
    if found is None:
        reason = shorten_text(next(iter(source.skipped.values())), SHOWN_NOTE)
        raise ValueError(f"picture {index} of {shorten_text(name)} cannot be used: {reason}")
    return normalise(found.pixels[None]), found.label


def _numbers(option: str, text: str, n: int) -> list[int]:
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if len(numbers) != n:
        raise ValueError(f"{option} must be {n} whole numbers, got {text!r}")
    return numbers
