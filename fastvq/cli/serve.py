"""``fastvq edit --serve``: finds the trained runs, and starts the page on them."""

from __future__ import annotations

import re
import socket
from collections.abc import Sequence
from ipaddress import ip_address
from pathlib import Path

from fastvq._json import read_json
from fastvq.cli import shared
from fastvq.data import Source, check_size, open_data
from fastvq.models.checkpoints import CONFIG
from fastvq.serve import LoadedRun, Run
from fastvq.training import find_device

__all__ = ["find_runs", "serve"]

LOOPBACK = ("127.0.0.1", "localhost", "::1")
MODELS = ("VQVAE", "VQVAE2")
NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*")
MAX_CONNECTIONS = 64  # of all browsers together, of which each holds about six; an upload takes up to 32 MiB


def serve(
    model: Path, prior: Path, *, size: int | None, device: str, host: str, port: int, allowed: Sequence[str] = ()
) -> None:
    """Serves the page until Ctrl-C. ``allowed`` are further names that browsers reach it by.

    Raises:
        ValueError: starlette or uvicorn is missing, there is no model, the address or a name cannot be used.
    """
    try:
        import uvicorn

        from fastvq.serve import server
    except ModuleNotFoundError as error:
        raise ValueError(
            f'fastvq edit --serve needs {error.name}, which is not installed; pip install "fastvq-kernels[serve]"'
        ) from None
    check_size("fastvq edit", size)
    for name in allowed:
        if not (NAME.fullmatch(name) or _is_address(name)):
            raise ValueError(f"--allow-host must be a name or an address without a port, as demo.local, got {name!r}")
    runs = find_runs(model, prior, str(find_device(device)))
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    with listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, port))
        except OSError as error:
            raise ValueError(f"--host {host} --port {port} cannot be used ({error.strerror}); take others") from None
        shown = f"[{host}]" if ":" in host else host
        names = f"{len(runs)} run{'s' if len(runs) > 1 else ''} ({', '.join(run.name for run in runs)})"
        address = f"http://{shown}:{listener.getsockname()[1]}"
        shared.console.print(f"{names} at {address}; Ctrl-C ends it", highlight=False, soft_wrap=True)
        if host not in LOOPBACK:
            shared.console.print("anyone who reaches this address can open and edit pictures here", highlight=False)
        app = server.make_app(runs, size=size, hosts=_hosts(host, listener.getsockname()[0], allowed))
        config = uvicorn.Config(app, log_level="warning", limit_concurrency=MAX_CONNECTIONS)
        uvicorn.Server(config).run(sockets=[listener])


def _hosts(given: str, bound: str, allowed: Sequence[str]) -> list[str]:
    """The host names that requests may use. Another site can let one of its names point at this machine,
    so every name is allowed only where the page listens on all addresses and no name is given."""
    if ip_address(bound.partition("%")[0]).is_unspecified:
        return [*LOOPBACK, *allowed] if allowed else ["*"]
    return [*LOOPBACK, given, bound, *allowed]


def _is_address(name: str) -> bool:
    try:
        return bool(ip_address(name.strip("[]")))
    except ValueError:
        return False


def find_runs(model: Path, prior: Path, device: str) -> list[Run]:
    """The model, and the other models in the folder that holds it, each with the priors that belong to it."""
    if not (model / CONFIG).is_file():
        raise ValueError(f"{model} must be a folder with a trained model; train one with `fastvq train vqvae`")
    others = sorted(path.parent for path in model.resolve().parent.glob(f"*/{CONFIG}"))
    folders = [model, *(path for path in others if path != model.resolve() and _is_model(path))]
    priors = [prior, *sorted(path.parent for path in model.resolve().parent.glob(f"*/{shared.PRIOR_MODEL}"))]

    def run(folder: Path) -> Run:
        return Run(folder.resolve().name, lambda: _load(folder, priors, device))

    return [run(folder) for folder in folders]


def _is_model(folder: Path) -> bool:
    try:
        return read_json("fastvq", folder / CONFIG).get("class") in MODELS
    except (ValueError, OSError, AttributeError):
        return False


def _load(folder: Path, priors: list[Path], device: str) -> LoadedRun:
    model = shared.read_model(folder, device)
    found = None
    why = f"no prior for {folder} is there; train one with `fastvq train prior --model {folder}`"
    for prior in priors:
        try:
            found = shared.read_priors(prior, model, folder, device)
            break
        except (ValueError, OSError) as error:  # damaged, of another model, or none at all
            if (prior / "level0").is_dir():
                why = str(error)
    held_out, size = None, None
    try:
        name, options = shared.read_data(folder)
        size = options.get("size")
        source = open_data(name, "held-out", **options)
        held_out = source if isinstance(source, Source) else None
    except (ValueError, OSError):  # the data moved away: pictures are uploaded
        pass
    return LoadedRun(model, found, why, held_out, size)
