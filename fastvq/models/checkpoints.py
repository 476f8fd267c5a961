"""Weights on disk: safetensors written whole or not at all, and a JSON config beside them. Nothing is unpickled."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

__all__ = ["Pretrained", "load_state", "load_tensors", "read_json", "save_tensors", "write_atomically", "write_json"]

Model = TypeVar("Model", bound="Pretrained")
CONFIG, WEIGHTS = "config.json", "model.safetensors"
METADATA = "fastvq"


def write_atomically(path: Path | str, data: bytes) -> None:
    """Writes a file so that whoever reads it, after a crash too, finds the whole old one or the whole new one.

    Raises:
        OSError: it could not be written (a full disk, say); a file that was there stays as it was.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        # mkstemp makes files that only their owner may read.
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(name, 0o666 & ~umask)
        os.replace(name, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            os.unlink(name)
        if isinstance(error, OSError) and error.filename is None:
            error.filename = str(path)  # a full disk does not say what it was asked to hold
        raise
    with contextlib.suppress(OSError):  # a file system that has no fsync of folders
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def write_json(path: Path | str, value: Any) -> None:
    write_atomically(path, (json.dumps(value, indent=2) + "\n").encode())


def read_json(op: str, path: Path | str, *, entries: Sequence[str] | None = None) -> Any:
    """What a JSON file holds; with ``entries`` that must be an object which has them.

    Raises:
        ValueError: it is no JSON or not such an object; the message names the file.
        FileNotFoundError: it is not there.
    """
    try:
        value = json.loads(Path(path).read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{op}: {path} must be JSON, and is not ({error}); it may be truncated") from None
    if entries is not None and not (isinstance(value, dict) and all(entry in value for entry in entries)):
        raise ValueError(f"{op}: {path} must be an object with {', '.join(entries)}; it is a file of something else")
    return value


def save_tensors(path: Path | str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """A safetensors file, atomically: ``metadata["format"]`` names what it is, and ``load_tensors`` asks for it."""
    from safetensors.torch import save

    # Clones: safetensors refuses tensors that share memory, as tied codebooks do.
    whole = {name: t.detach().to("cpu", copy=True).contiguous() for name, t in tensors.items()}
    # One entry: safetensors writes several in an order that changes, and equal contents should be equal files.
    write_atomically(path, save(whole, {METADATA: json.dumps(dict(metadata))}))


def load_tensors(op: str, path: Path | str, kind: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors, metadata) of a file that ``save_tensors`` wrote with ``metadata["format"] == kind``.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no safetensors file, it is cut off, or it is one of something else; the message says which.
    """
    from safetensors import SafetensorError, safe_open

    if not Path(path).is_file():
        raise FileNotFoundError(f"{op}: there is no file {path}")
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = json.loads((file.metadata() or {}).get(METADATA, "{}"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except (SafetensorError, OSError, json.JSONDecodeError) as error:
        raise ValueError(
            f"{op}: {path} must be a safetensors file, and cannot be read as one ({error}); "
            "it is truncated or of another format: take an older checkpoint or write it again"
        ) from None
    if metadata.get("format") != kind:
        raise ValueError(
            f"{op}: {path} must hold a {kind}, got format {metadata.get('format')!r}; "
            "it is a safetensors file of something else"
        )
    return tensors, metadata


def load_state(op: str, path: Path | str, module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """``module.load_state_dict`` with an error that names the file and what does not fit."""
    expected = module.state_dict()
    missing = [name for name in expected if name not in tensors]
    unknown = [name for name in tensors if name not in expected]
    differing = [
        f"{name} is {list(tensors[name].shape)}, not {list(t.shape)}"
        for name, t in expected.items()
        if name in tensors and tensors[name].shape != t.shape
    ]
    if missing or unknown or differing:
        parts = [("missing", missing), ("not known", unknown), ("of another shape", differing)]
        said = "; ".join(f"{what}: {', '.join(names[:3])}" for what, names in parts if names)
        raise ValueError(
            f"{op}: {path} must hold the weights of this {type(module).__name__}, and does not ({said}); "
            "it belongs to a model of another configuration"
        )
    module.load_state_dict(dict(tensors))


class Pretrained(nn.Module):
    """A module whose constructor's arguments are kept in ``config``, and which can be written and read back."""

    config: dict[str, Any]
    _kinds: ClassVar[dict[str, type[Pretrained]]] = {}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        Pretrained._kinds[cls.__name__] = cls

    def save_pretrained(self, folder: Path | str) -> None:
        """Writes ``folder/model.safetensors`` and ``folder/config.json``, each atomically."""
        folder = Path(folder)
        kind = type(self).__name__
        config = {"class": kind, **self.config}
        save_tensors(folder / WEIGHTS, self.state_dict(), {"format": kind, "config": json.dumps(config)})
        write_json(folder / CONFIG, config)

    @classmethod
    def from_pretrained(cls: type[Model], folder: Path | str, device: torch.device | str = "cpu") -> Model:
        """The model that ``save_pretrained`` wrote, in ``eval()`` mode; of a base class, whichever model it is.

        Raises:
            FileNotFoundError: there is no such model.
            ValueError: the config is of another class, or the weights are truncated, foreign or do not fit it.
        """
        op = f"fastvq.models.{cls.__name__}.from_pretrained"
        folder = Path(folder)
        if not (folder / CONFIG).is_file():
            raise FileNotFoundError(f"{op}: {folder} must be a folder with {CONFIG} and {WEIGHTS}; train a model first")
        config = read_json(op, folder / CONFIG)
        kind = config.pop("class", None) if isinstance(config, dict) else None
        made = Pretrained._kinds.get(kind) if isinstance(kind, str) else None
        if made is None or not issubclass(made, cls):
            raise ValueError(f"{op}: {folder / CONFIG} must describe a {cls.__name__}, got class {kind!r}")
        try:
            model = made(**config)
        except TypeError as error:
            raise ValueError(f"{op}: {folder / CONFIG} does not fit this version of {kind} ({error})") from None
        tensors, _ = load_tensors(op, folder / WEIGHTS, str(kind))
        load_state(op, folder / WEIGHTS, model, tensors)
        return model.to(device).eval()
