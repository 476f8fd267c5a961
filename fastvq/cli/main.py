"""Puts the commands of ``fastvq`` together; the other modules of this package implement them."""

from __future__ import annotations

import typer

from fastvq.cli.decode import decode
from fastvq.cli.encode import encode
from fastvq.cli.generate import edit_command, sample
from fastvq.cli.info import info
from fastvq.cli.train import train_prior, train_vqvae

__all__ = ["app", "main"]

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
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


def main() -> None:
    app()
