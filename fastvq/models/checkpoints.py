"""Weights on disk: safetensors files, written atomically, with a digest that is checked on load, and a JSON config.

Nothing is unpickled.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import mmap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from fastvq._files import write_atomically
from fastvq._json import Kind, anything, mapping_of, parse_json, text, write_json
from fastvq._shorten import shorten, shorten_text

__all__ = ["Pretrained", "check_config", "load_state", "load_tensors", "save_tensors"]

Model = TypeVar("Model", bound="Pretrained")
CONFIG, WEIGHTS = "config.json", "model.safetensors"
METADATA = "fastvq"
SHOWN = 200  # characters of the tensors of one fault in an error
DIGEST = "sha256"  # entry of the metadata: SHA-256 of the file, computed with zeros in the digest's place
ZEROS = "0" * 64
# Limits on the whole numbers of a config, checked before a tensor is made. A number may be as large as the number of
# elements in the weights, or SMALL_NUMBER if that is larger. A count of layers and the like (COUNTS) may be as large as
# the number of tensors, or SMALL_COUNT if that is larger.
SMALL_NUMBER, SMALL_COUNT = 1 << 16, 1 << 10
COUNTS = ("levels", "n_blocks", "depth", "n_layers", "n_heads")


def save_tensors(path: Path | str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Writes a safetensors file atomically. ``metadata["format"]`` names the kind of file; ``load_tensors`` checks it.

    The digest is inside the file, so that one rename commits both.
    """
    from safetensors.torch import save

    # Clones: safetensors refuses tensors that share memory, as tied codebooks do.
    whole = {name: t.detach().to("cpu", copy=True).contiguous() for name, t in tensors.items()}
    # One metadata entry: safetensors writes several in a varying order, and equal contents should give equal files.
    data = save(whole, {METADATA: json.dumps({**metadata, DIGEST: ZEROS})})
    at = _digest_place(data, ZEROS)
    digest = hashlib.sha256(data).hexdigest().encode()
    view = memoryview(data)
    write_atomically(path, [view[:at], digest, view[at + len(ZEROS) :]])


def load_tensors(
    op: str, path: Path | str, kind: str, entries: Sequence[str] = ()
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors, metadata) of a file that ``save_tensors`` wrote with ``metadata["format"] == kind``.

    Args:
        entries: names that the metadata must have besides the format; a name that ends in "?" may be absent.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not safetensors, is truncated, was changed after it was written, has another format or
            other metadata entries; the message says which.
    """
    tensors, metadata = _read_tensors(op, path)
    _check_format(op, path, metadata, kind, entries)
    return tensors, metadata


def _read_tensors(op: str, path: Path | str) -> tuple[dict[str, Tensor], dict[str, str]]:
    from safetensors import safe_open

    if not Path(path).is_file():
        raise FileNotFoundError(f"{op}: there is no file {path}")
    Path(path).open("rb").close()  # raises PermissionError where the file may not be read
    try:
        with safe_open(str(path), framework="pt") as file:
            described = (file.metadata() or {}).get(METADATA, "{}")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except Exception as error:  # safetensors and torch raise many types for a damaged header
        raise ValueError(
            f"{op}: {path} must be a safetensors file, and cannot be read as one ({shorten_text(error)}); "
            "it is truncated or of another format: take an older checkpoint or write it again"
        ) from None
    metadata, _ = parse_json(op, f"the metadata of {path}", described, mapping_of(text))
    if DIGEST in metadata and not _is_intact(Path(path), metadata[DIGEST]):
        raise ValueError(
            f"{op}: {path} was damaged after it was written: its digest differs; "
            "copy it again, take an older one or write it again"
        )
    return tensors, metadata


def _check_format(op: str, path: Path | str, metadata: Mapping[str, str], kind: str, entries: Sequence[str]) -> None:
    if metadata.get("format") != kind:
        raise ValueError(
            f"{op}: {path} must hold a {kind}, got format {shorten(metadata.get('format'))}; "
            "it is a safetensors file of something else"
        )
    needed = {"format", *(name for name in entries if not name.endswith("?"))}
    known = {*needed, DIGEST, *(name.rstrip("?") for name in entries)}
    if not needed <= metadata.keys() <= known:
        missing, unknown = sorted(needed - metadata.keys()), sorted(metadata.keys() - known)
        raise ValueError(
            f"{op}: {path} must have the metadata {', '.join(sorted(needed))} (missing: {missing}, not known: "
            f"{shorten(unknown[:3])}); it is damaged or of another version"
        )


def _digest_place(data: bytes | mmap.mmap, digest: str) -> int:
    """Position of the digest in the bytes of a file; -1 where the file has no such digest."""
    entry = json.dumps(json.dumps({DIGEST: digest})[1:-1])[1:-1].encode()  # as text inside the header's JSON
    at = data.find(entry, 0, 8 + int.from_bytes(data[:8], "little"))
    return -1 if at < 0 else at + entry.index(digest.encode())


def _is_intact(path: Path, digest: str) -> bool:
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        at = _digest_place(data, digest)
        if len(digest) != len(ZEROS) or at < 0:
            return False
        with memoryview(data) as view:
            found = hashlib.sha256(view[:at])
            found.update(ZEROS.encode())
            found.update(view[at + len(ZEROS) :])
        return found.hexdigest() == digest


def load_state(op: str, path: Path | str, module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """``module.load_state_dict``, with an error that names the file and the tensors that do not fit."""
    expected = module.state_dict()
    missing = [name for name in expected if name not in tensors]
    unknown = [name for name in tensors if name not in expected]
    both = [(name, tensors[name], t) for name, t in expected.items() if name in tensors]
    shapes = [f"{name} is {list(a.shape)}, not {list(b.shape)}" for name, a, b in both if a.shape != b.shape]
    types = [
        f"{name} is {a.dtype}, not {b.dtype}"
        for name, a, b in both
        if a.dtype != b.dtype and not (b.is_floating_point() and (a.is_floating_point() or _was_bool(name, a)))
    ]
    if missing or unknown or shapes or types:
        parts = [("missing", missing), ("not known", unknown), ("of another shape", shapes), ("of another type", types)]
        said = "; ".join(f"{what}: {shorten_text(', '.join(names[:3]), SHOWN)}" for what, names in parts if names)
        raise ValueError(
            f"{op}: {path} must hold the weights of this {type(module).__name__}, and does not ({said}); "
            "it belongs to a model of another configuration"
        )
    if not any(t.is_meta for t in expected.values()):
        module.load_state_dict(dict(tensors))


def _was_bool(name: str, tensor: Tensor) -> bool:
    """Whether a tensor is the mark of a codebook that k-means started, as earlier versions wrote it."""
    return name.endswith("initialised") and tensor.dtype == torch.bool


class Pretrained(nn.Module):
    """A module that keeps its constructor's arguments in ``config`` and can be saved and loaded."""

    config: dict[str, Any]
    _kinds: ClassVar[dict[str, type[Pretrained]]] = {}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        Pretrained._kinds[cls.__name__] = cls

    def save_pretrained(self, folder: Path | str) -> None:
        """Writes ``folder/model.safetensors``, config included, and the config again as ``folder/config.json``.

        The first file alone is a whole model, so a crash between the two writes loses nothing.
        """
        folder = Path(folder)
        config = self._described()
        save_tensors(folder / WEIGHTS, self.state_dict(), {"format": config["class"], "config": json.dumps(config)})
        write_json(folder / CONFIG, config, seal=True)

    def is_saved_in(self, folder: Path | str) -> bool:
        """Whether ``folder`` holds this model bit for bit, undamaged."""
        op = f"fastvq.models.{type(self).__name__}"
        try:
            config, tensors = _read_model(op, Path(folder))
        except (ValueError, OSError):
            return False
        state = self.state_dict()
        return (
            (Path(folder) / CONFIG).is_file()
            and config == json.loads(json.dumps(self._described()))
            and tensors.keys() == state.keys()
            and all(t.dtype == state[name].dtype and torch.equal(t, state[name].cpu()) for name, t in tensors.items())
        )

    def _described(self) -> dict[str, Any]:
        return {"class": type(self).__name__, **self.config}

    @classmethod
    def from_pretrained(cls: type[Model], folder: Path | str, device: torch.device | str = "cpu") -> Model:
        """Loads the model that ``save_pretrained`` wrote, in ``eval()`` mode. A base class loads any of its subclasses.

        Raises:
            FileNotFoundError: there is no such model.
            ValueError: the config names another class, or the weights are truncated, damaged, of another format or do
                not fit the config.
        """
        op = f"fastvq.models.{cls.__name__}.from_pretrained"
        folder = Path(folder)
        config, tensors = _read_model(op, folder)
        kind = config.pop("class")
        made = Pretrained._kinds[kind]
        if not issubclass(made, cls):
            raise ValueError(f"{op}: {folder / CONFIG} must describe a {cls.__name__}, got class {kind!r}")
        _check_sizes(op, folder, config, tensors)
        try:
            # First on the meta device: the shapes must be those of the file before any memory is allocated.
            with torch.device("meta"), _config_errors(op, folder, kind):
                load_state(op, folder / WEIGHTS, made(**config), tensors)
        except NotImplementedError:  # the constructor reads values, which meta tensors do not have
            pass
        with _config_errors(op, folder, kind):
            model = made(**config)
        load_state(op, folder / WEIGHTS, model, tensors)
        return model.to(device).eval()


def _read_model(op: str, folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(config with its class, tensors) of a folder. The config stored with the weights is used, unless ``config.json``
    has no digest: then a user edited it, or an older version wrote it."""
    described: Kind = mapping_of(anything)
    path, config, sealed = folder / CONFIG, None, True
    if path.is_file():
        config, sealed = parse_json(op, str(path), path.read_bytes(), described)
    elif not (folder / WEIGHTS).is_file():
        raise FileNotFoundError(f"{op}: {folder} must be a folder with {CONFIG} and {WEIGHTS}; train a model first")
    tensors, metadata = _read_tensors(op, folder / WEIGHTS)
    if sealed and "config" in metadata:
        config, _ = parse_json(op, f"the config in {folder / WEIGHTS}", metadata["config"], described)
    kind = (config or {}).get("class")
    if not isinstance(kind, str) or kind not in Pretrained._kinds:
        raise ValueError(f"{op}: {path} must describe a model of this version, got class {shorten(kind)}")
    _check_format(op, folder / WEIGHTS, metadata, kind, ["config?"])
    assert config is not None
    return config, tensors


def check_config(op: str, folder: Path) -> None:
    """ValueError where ``config.json`` of a model that can be loaded describes another model. Loading takes the config
    inside the weights' file, but other readers of ``config.json`` are misled."""
    from safetensors import safe_open

    if not (folder / CONFIG).is_file():
        return
    config, sealed = parse_json(op, str(folder / CONFIG), (folder / CONFIG).read_bytes())
    with safe_open(str(folder / WEIGHTS), framework="pt") as file:
        inside = json.loads((file.metadata() or {}).get(METADATA, "{}")).get("config")
    if sealed and inside is not None and config != json.loads(inside):
        raise ValueError(
            f"{op}: {folder / CONFIG} must describe the model in {WEIGHTS}, and describes another one; "
            "load the model and save it again"
        )


def _check_sizes(op: str, folder: Path, config: dict[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """ValueError for a number of a config that is too large for its weights, before a tensor of that size is made."""
    most = max(SMALL_NUMBER, sum(t.numel() for t in tensors.values()))
    most_count = max(SMALL_COUNT, len(tensors))
    for name, value in config.items():
        limit = most_count if name in COUNTS else most
        for number in _numbers(value):
            if abs(number) > limit:
                raise ValueError(
                    f"{op}: the config of {folder} must fit its weights, got {shorten_text(name)} {str(number)[:20]}, "
                    f"which no part of them can have (at most {limit}); it is damaged"
                )
        if isinstance(value, list) and len(value) > most_count:
            raise ValueError(
                f"{op}: the config of {folder} must fit its weights, got {shorten_text(name)} with {len(value)} "
                f"elements, and {WEIGHTS} has {len(tensors)} tensors; it is damaged"
            )


def _numbers(value: Any) -> Iterator[int]:
    """The whole numbers in a value and in its lists."""
    waiting = [value]
    while waiting:
        value = waiting.pop()
        if isinstance(value, int):
            yield value
        elif isinstance(value, list):
            waiting += value


@contextlib.contextmanager
def _config_errors(op: str, folder: Path, kind: str) -> Iterator[None]:
    """Turns any error of a constructor that was called with a loaded config into one line that names the folder."""
    try:
        yield
    except NotImplementedError:
        raise
    except Exception as error:
        if isinstance(error, ValueError) and str(error).startswith(op):
            raise
        if isinstance(error, RuntimeError) and "meta" in str(error):
            raise NotImplementedError from error
        raise ValueError(
            f"{op}: the config of {folder} does not fit this version of {kind} ({shorten_text(error)})"
        ) from None
