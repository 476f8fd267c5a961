"""The command ``fastvq``."""

from fastvq.cli.main import app, main

__all__ = ["app", "main"]
