"""The command ``fastvq``: its parts are imported when it runs, so that an import of this package needs no extra."""

from __future__ import annotations

import sys
from typing import Any

__all__ = ["app", "main"]

EXTRA = ("typer", "rich", "PIL", "safetensors")  # packages of the extra [models]


def main() -> None:
    try:
        from fastvq.cli.commands import app
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in EXTRA:
            raise
        from fastvq.cli.installation import run

        sys.exit(run(sys.argv[1:], package))
    app()


def __getattr__(name: str) -> Any:
    if name == "app":
        from fastvq.cli.commands import app

        return app
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
