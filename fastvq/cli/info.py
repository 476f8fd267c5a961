"""``fastvq info``: describes this installation, or the contents of a folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

import fastvq
from fastvq import _verify as verification
from fastvq._json import read_json
from fastvq.cli import shared
from fastvq.cli.id_shards import (
    CONFIG,
    CONFIG_KIND,
    MANIFEST,
    MANIFEST_KIND,
    check_listed,
    find_manifest,
    load_shard,
)
from fastvq.models.checkpoints import Pretrained, check_config
from fastvq.training.state import STATE, saved_step

__all__ = ["info"]

OP = "fastvq info"


def info(
    folder: Annotated[Path | None, typer.Argument(help="a model, a prior or encoded pictures")] = None,
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
            _verify()
            return
        described: dict[str, Any]
        if folder is None:
            described = {"version": fastvq.__version__, "build": fastvq.build_info()}
        elif (folder / MANIFEST).is_file() or (folder / CONFIG).is_file():
            described = _maps(folder)
        else:
            model = Pretrained.from_pretrained(folder)
            check_config(OP, folder)
            shared.check_data(OP, folder)
            described = {
                "class": type(model).__name__,
                "config": model.config,
                "parameters": sum(p.numel() for p in model.parameters()),
            }
            if (folder / STATE).is_file():
                described["step"] = saved_step(folder)
        typer.echo(json.dumps(described, indent=2, default=str))


def _maps(folder: Path) -> dict[str, Any]:
    """What the manifest of id maps says, after every file that it lists was checked."""
    manifest = read_json(OP, find_manifest(OP, folder), MANIFEST_KIND)
    if (folder / CONFIG).is_file():
        read_json(OP, folder / CONFIG, CONFIG_KIND)
    for listed in manifest["shards"]:
        path = folder / listed["name"]
        check_listed(OP, path, listed, load_shard(OP, path, manifest["n_codes"]))
    return {name: value for name, value in manifest.items() if name != "shards"}


def _verify() -> None:
    """Prints one line for each backend and instruction set, and a verdict. Exit status 1 if an index is wrong."""
    verdicts, missing = verification.verify()
    for v in verdicts:
        found = f"{v.indices:,} indices as recorded" if v.fault is None else f"WRONG: {v.fault}"
        typer.echo(f"{v.what}: {found} ({v.seconds:.1f} s)")
    for name, reason in missing.items():
        typer.echo(f"{name}: not verified, it cannot run here: {reason}")
    faults = sum(v.fault is not None for v in verdicts)
    if faults:
        typer.echo(
            f"verdict: {faults} of {len(verdicts)} ways to look up are wrong on this machine; please report this"
        )
        raise typer.Exit(1)
    typer.echo("verdict: every index is the recorded one")
