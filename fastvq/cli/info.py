"""``fastvq info``: describes this installation, or the contents of a folder."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Annotated, Any

import typer

from fastvq._json import read_json
from fastvq.cli import installation, shared
from fastvq.cli.id_shards import (
    CONFIG,
    CONFIG_KIND,
    MANIFEST,
    MANIFEST_KIND,
    check_listed,
    find_manifest,
    load_shard,
)
from fastvq.models.checkpoints import WEIGHTS, Pretrained, check_config
from fastvq.training.state import STATE, saved_step

__all__ = ["info"]

OP = "fastvq info"


def info(
    folder: Annotated[Path | None, typer.Argument(help="a model, a folder of priors or encoded pictures")] = None,
    verify: Annotated[
        bool,
        typer.Option(
            "--verify", help="look recorded vectors up on every backend and instruction set here; status 1 if one errs"
        ),
    ] = False,
) -> None:
    """Describe the installation, or a folder: a model, a prior or maps that `encode` wrote. JSON on stdout. Status 2: a
    file of the folder is lost or damaged; one line names it."""
    with shared.report_errors():
        if verify:
            raise typer.Exit(installation.verify())
        described: dict[str, Any]
        if folder is None:
            described = installation.described()
        elif (folder / MANIFEST).is_file() or (folder / CONFIG).is_file():
            described = _maps(folder)
        elif (folder / "level0").is_dir() and not (folder / WEIGHTS).is_file():
            shared.check_data(OP, folder)
            levels = itertools.takewhile(Path.is_dir, (folder / f"level{level}" for level in itertools.count()))
            described = {"levels": [_model(level) for level in levels]}
        else:
            described = _model(folder)
        typer.echo(json.dumps(described, indent=2, default=str))


def _model(folder: Path) -> dict[str, Any]:
    """A model, or the prior of one level."""
    model = Pretrained.from_pretrained(folder)
    check_config(OP, folder)
    shared.check_data(OP, folder)
    described: dict[str, Any] = {
        "class": type(model).__name__,
        "config": model.config,
        "parameters": sum(p.numel() for p in model.parameters()),
    }
    if (folder / STATE).is_file():
        described["step"] = saved_step(folder)
    return described


def _maps(folder: Path) -> dict[str, Any]:
    """What the manifest of id maps says, after every file that it lists was checked."""
    manifest = read_json(OP, find_manifest(OP, folder), MANIFEST_KIND)
    if (folder / CONFIG).is_file():
        read_json(OP, folder / CONFIG, CONFIG_KIND)
    for listed in manifest["shards"]:
        path = folder / listed["name"]
        check_listed(OP, path, listed, load_shard(OP, path, manifest["n_codes"]))
    return {name: value for name, value in manifest.items() if name != "shards"}
