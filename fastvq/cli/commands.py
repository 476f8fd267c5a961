"""Puts the commands of ``fastvq`` together; the other modules of this package implement them."""

from __future__ import annotations

from typing import Annotated

import typer

from fastvq._version import VERSION
from fastvq.cli.decode import decode
from fastvq.cli.encode import encode
from fastvq.cli.generate import edit_command, sample
from fastvq.cli.info import info
from fastvq.cli.train import train_prior, train_vqvae

__all__ = ["app"]

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Pictures to maps of code ids and back: train a model and its prior, encode, decode, sample, edit.",
)
train = typer.Typer(no_args_is_help=True, help="Train a model of pictures, or a prior over its id maps.")
train.command("vqvae")(train_vqvae)
train.command("prior")(train_prior)
app.add_typer(train, name="train")
app.command("encode")(encode)
app.command("decode")(decode)
app.command("sample")(sample)
app.command("edit")(edit_command)
app.command("info")(info)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(VERSION)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="print the version and end")
    ] = False,
) -> None:
    pass
