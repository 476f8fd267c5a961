"""The command ``fastvq``."""

try:
    from fastvq.cli.main import app, main
except ModuleNotFoundError as error:
    if error.name is None or error.name.partition(".")[0] not in ("typer", "rich", "PIL", "safetensors"):
        raise
    raise SystemExit(f'the command fastvq needs {error.name}: pip install "fastvq-kernels[models]"') from error

__all__ = ["app", "main"]
