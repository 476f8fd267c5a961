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
from fastvq.cli.id_shards import CONFIG, MANIFEST, MANIFEST_KIND, find_manifest
from fastvq.models.checkpoints import Pretrained
from fastvq.training.state import STATE, saved_step

__all__ = ["info"]


def info(
    folder: Annotated[Path | None, typer.Argument(help="a model, a prior or encoded pictures")] = None,
    verify: Annotated[
        bool,
        typer.Option(
            "--verify", help="look recorded vectors up on every backend and instruction set here; status 1 if one errs"
        ),
    ] = False,
) -> None:
    """Describe the installation, or a folder: a model, a prior or maps that `encode` wrote. JSON on stdout."""
    with shared.report_errors():
        if verify:
            _verify()
            return
        described: dict[str, Any]
        if folder is None:
            described = {"version": fastvq.__version__, "build": fastvq.build_info()}
        elif (folder / MANIFEST).is_file() or (folder / CONFIG).is_file():
            manifest = read_json("fastvq info", find_manifest("fastvq info", folder), MANIFEST_KIND)
            described = {name: value for name, value in manifest.items() if name != "shards"}
        else:
            model = Pretrained.from_pretrained(folder)
            described = {
                "class": type(model).__name__,
                "config": model.config,
                "parameters": sum(p.numel() for p in model.parameters()),
            }
            if (folder / STATE).is_file():
                described["step"] = saved_step(folder)
        typer.echo(json.dumps(described, indent=2, default=str))


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
