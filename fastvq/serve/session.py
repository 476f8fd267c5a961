"""One picture that is being edited: its states, the drafts of the last edit, and undo."""

from __future__ import annotations

import io
import secrets
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from fastvq.data import Source, normalise, read_fitting, to_pixels
from fastvq.data.pictures import FORMATS
from fastvq.models import Prior, edit
from fastvq.models.autoencoder import Autoencoder
from fastvq.serve import views

__all__ = ["MAX_CANDIDATES", "MAX_DRAFTS", "MAX_SIDE", "MAX_SOFT", "LoadedRun", "Run", "Session", "mask_of"]

MAX_SIDE = 1024  # pixels of a side: a picture is edited in one piece, and several states of it are kept
MAX_STATES = 30  # of one picture
MAX_DRAFTS, MAX_CANDIDATES, MAX_SOFT = 12, 32, 64
MAX_LOGITS = 1 << 28  # of all drafts of a level together: 1 GiB
PREFIX = "fastvq edit --serve"


class LoadedRun(NamedTuple):
    """A trained model, ready to edit with."""

    model: Autoencoder
    priors: Sequence[Prior] | None  # one a level
    why_no_prior: str  # what to do, where priors is None
    held_out: Source | None  # pictures that were not trained on
    size: int | None  # side of the pictures that it was trained on


@dataclass(frozen=True)
class Run:
    """A trained model that the page offers; ``load`` reads it."""

    name: str
    load: Callable[[], LoadedRun]


class State(NamedTuple):
    """A picture, its ids, and what its ids decode to."""

    pixels: Tensor  # [C, H, W] uint8, on the CPU
    maps: list[Tensor]  # L maps [1, h, w] (or [1, h, w, Q]), on the model's device
    reconstruction: Tensor  # [C, H, W] uint8, on the CPU


@dataclass
class Session:
    """Methods that compute (``open``, ``edit``, ``set_source``, ``swatches``) run in the worker's thread only."""

    run: LoadedRun
    run_name: str
    name: str  # of the picture
    label: int | None
    states: list[State]
    drafts: list[State] = field(default_factory=list)
    base: int = 0  # the drafts change states[base]
    chosen: int | None = None
    seed: int | None = None  # of the drafts
    source: Tensor | None = None  # [C, H, W] uint8, the picture to transplant from
    version: int = 0  # counts changes, so that a browser knows when a picture is another one
    lock: threading.RLock = field(default_factory=threading.RLock)
    _swatches: dict[int, Tensor] = field(default_factory=dict)

    @classmethod
    def open(
        cls, run: LoadedRun, run_name: str, *, data: bytes | None, name: str, index: int, size: int | None
    ) -> Session:
        """A session on an uploaded picture, or (without ``data``) on held-out picture ``index``."""
        pixels, label = _read(run, data, name, index, size)
        with torch.no_grad():
            maps = run.model.encode_maps(normalise(pixels[None]).to(_device(run.model)))
            reconstruction = to_pixels(run.model.decode_maps(maps))[0].cpu()
        return cls(run, run_name, name if data else f"held-out {index}", label, [State(pixels, maps, reconstruction)])

    @property
    def current(self) -> State:
        with self.lock:
            return self.states[-1]

    @property
    def before(self) -> State:
        """The state before the last edit; the current one where there was none."""
        with self.lock:
            return self.states[-2] if len(self.states) > 1 else self.states[-1]

    def set_source(self, data: bytes | None, name: str, index: int) -> None:
        """The picture to transplant from, scaled and cut to this one's size."""
        height, width = self.current.pixels.shape[1:]
        source = _read(self.run, data, name, index, (height, width))[0]
        with self.lock:
            self.source = source
            self.version += 1

    def edit(
        self,
        way: str,
        mask: Tensor,  # [H, W] bool
        report: Callable[[float], object],
        *,
        label: int | None = None,
        temperature: float = 1.0,
        drafts: int = 1,
        candidates: int = 1,
        seed: int | None = None,
        codes: Sequence[int | None] | None = None,
        soft: int = 0,
    ) -> None:
        """Edits the region, and takes the first draft as the current state.

        Args:
            way: "resample" (by the prior), "paint" (with ``codes``, one a level or None) or "transplant" (from the
                source).
            report: called with the share that is done; an exception that it raises ends the edit.
            soft: inside the region's edge the result fades in over this many pixels. Outside no pixel changes.
        """
        with self.lock:
            base, position = self.current, len(self.states) - 1
        options = self._options(way, codes)
        if way == "resample":
            seed = secrets.randbelow(1 << 31) if seed is None else seed
            options |= self._sampling(label, temperature, drafts, candidates, seed, report)
        n = drafts if way == "resample" else 1
        device = _device(self.run.model)
        image = normalise(base.pixels[None]).to(device).expand(n, -1, -1, -1)
        edited = edit(self.run.model, image, mask.to(device), maps=base.maps, **options)
        decoded = to_pixels(edited.image).cpu()
        found = [
            State(_paste(base.pixels, decoded[i], mask, soft), [ids[i : i + 1] for ids in edited.maps], decoded[i])
            for i in range(n)
        ]
        report(1.0)
        with self.lock:
            if len(self.states) - 1 != position or self.current is not base:
                raise ValueError(f"{PREFIX}: the picture was changed while this edit was made; make it again")
            self.drafts, self.base, self.seed = found, position, seed if way == "resample" else None
            self.choose(0)

    def choose(self, draft: int) -> None:
        """Takes a draft of the last edit in the place of the one before."""
        with self.lock:
            if not 0 <= draft < len(self.drafts):
                raise ValueError(f"{PREFIX}: there is no draft {draft}, of {len(self.drafts)}")
            del self.states[self.base + 1 :]
            self.states.append(self.drafts[draft])
            if len(self.states) > MAX_STATES:
                del self.states[1]  # the picture as it was opened stays
                self.base = len(self.states) - 2
            self.chosen = draft
            self.version += 1

    def undo(self) -> None:
        """Goes back by one edit. The drafts of that edit can still be chosen."""
        with self.lock:
            if len(self.states) == 1:
                raise ValueError(f"{PREFIX}: there is no edit to undo")
            self.states.pop()
            self.chosen = None
            if len(self.states) - 1 < self.base:
                self.drafts = []
            self.version += 1

    def swatches(self, level: int) -> Tensor:
        """What each code of a level looks like, in the colours that this picture has on the other levels."""
        if level not in self._swatches:
            self._swatches[level] = views.swatches(self.run.model, self.states[0].maps, level)
        return self._swatches[level]

    def _options(self, way: str, codes: Sequence[int | None] | None) -> dict[str, Any]:
        if way == "transplant":
            if self.source is None:
                raise ValueError(f"{PREFIX}: choose a picture to transplant from")
            return {"source": normalise(self.source[None]).to(_device(self.run.model))}
        if way == "paint":
            if not codes or all(code is None for code in codes):
                raise ValueError(f"{PREFIX}: choose a code to paint with")
            if self.run.model.depth > 1:
                raise ValueError(f"{PREFIX}: this model has {self.run.model.depth} ids a position; transplant instead")
            return {"codes": list(codes)}
        return {}

    def _sampling(
        self,
        label: int | None,
        temperature: float,
        drafts: int,
        candidates: int,
        seed: int,
        report: Callable[[float], object],
    ) -> dict[str, Any]:
        priors = self.run.priors
        if priors is None:
            raise ValueError(f"{PREFIX}: {self.run.why_no_prior}")
        n_classes = priors[0].n_classes
        if n_classes and (label is None or not 0 <= label < n_classes):
            raise ValueError(f"{PREFIX}: label must be one of the prior's classes, 0 .. {n_classes - 1}, got {label}")
        largest = max(ids[0].numel() * k for ids, k in zip(self.current.maps, self.run.model.n_codes, strict=True))
        if drafts * candidates > max(1, MAX_LOGITS // largest):
            raise ValueError(
                f"{PREFIX}: {drafts} drafts of {candidates} tries each need too much memory for a picture of this "
                f"size; take at most {max(1, MAX_LOGITS // largest)} in all"
            )
        done = {"level": 0, "at": 0}

        def follow(at: int, total: int) -> None:
            if at <= done["at"]:
                done["level"] += 1  # the next level's map begins
            done["at"] = at
            report(min(1.0, (done["level"] + at / total) / len(priors)))

        return {
            "prior": list(priors),
            "labels": label if n_classes else None,
            "temperature": temperature,
            "n_candidates": candidates,
            "generator": torch.Generator(_device(self.run.model)).manual_seed(seed),
            "progress": follow,
        }


def mask_of(
    height: int, width: int, *, box: Sequence[int] | None = None, runs: Sequence[int] | None = None
) -> Tensor:  # [H, W] bool
    """The region: a box (x0, y0, x1, y1), or the lengths of runs in raster order, outside and inside in turn.

    Raises:
        ValueError: not exactly one of the two is given, a box that does not fit, runs of another number of pixels, no
            pixel inside.
    """
    if (box is None) == (runs is None):
        raise ValueError(f"{PREFIX}: the region must be given as a box or as runs")
    mask = torch.zeros(height, width, dtype=torch.bool)
    if box is not None:
        if len(box) != 4 or not (0 <= box[0] < box[2] <= width and 0 <= box[1] < box[3] <= height):
            raise ValueError(
                f"{PREFIX}: the box must be x0, y0, x1, y1 with x0 < x1 <= {width} and y0 < y1 <= {height}, "
                f"got {list(box)[:5]}"
            )
        mask[box[1] : box[3], box[0] : box[2]] = True
        return mask
    lengths = torch.tensor(list(runs or ()), dtype=torch.int64)
    if int(lengths.sum()) != height * width:
        raise ValueError(f"{PREFIX}: the region must have {width} x {height} pixels, got {int(lengths.sum())}")
    inside = torch.arange(len(lengths)) % 2 == 1
    mask = inside.repeat_interleave(lengths).view(height, width)
    if not mask.any():
        raise ValueError(f"{PREFIX}: the region is empty: draw a box or paint on the picture")
    return mask


def _device(model: Autoencoder) -> torch.device:
    return model.decoder.mix.weight.device


def _read(
    run: LoadedRun, data: bytes | None, name: str, index: int, size: int | tuple[int, int] | None
) -> tuple[Tensor, int | None]:
    """(pixels [C, H, W] uint8, label) of an upload, or of a held-out picture where ``data`` is None."""
    model, label = run.model, None
    if model.in_channels not in (1, 3):
        raise ValueError(f"{PREFIX}: the model takes {model.in_channels} channels, and pictures have 1 or 3")
    if data is None:
        if run.held_out is None:
            raise ValueError(f"{PREFIX}: this run holds no pictures out; upload one")
        if not 0 <= index < len(run.held_out):
            raise ValueError(f"{PREFIX}: held-out pictures are 0 .. {len(run.held_out) - 1}, got {index}")
        found = run.held_out.read(index)
        label = found.label
        data = views.png(found.pixels)
        size = size if isinstance(size, tuple) else None
    stride = model.strides[0]
    width, height = _sides(data) if size is None else (size, size) if isinstance(size, int) else size[::-1]
    if max(width, height) // stride * stride > MAX_SIDE:  # before any pixel is decoded or scaled
        raise ValueError(
            f"{PREFIX}: the picture has {width} x {height} pixels, more than {MAX_SIDE} a side; "
            "choose a side to scale it to"
        )
    return read_fitting(data, name, channels=model.in_channels, stride=stride, size=size), label


def _sides(data: bytes) -> tuple[int, int]:
    """Width and height by the picture's header; (0, 0) where it has none, and ``read_fitting`` says what is wrong."""
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as picture:
            return picture.size
    except Exception:  # decoders raise many types on foreign bytes
        return 0, 0


def _paste(
    before: Tensor,  # [C, H, W] uint8
    after: Tensor,
    mask: Tensor,  # [H, W] bool
    soft: int,
) -> Tensor:
    """``after`` inside the mask, ``before`` outside, every bit of it. With ``soft`` > 0 the change fades in over that
    many pixels inside the edge."""
    depth = mask.float()
    grown = ~mask[None, None]
    for _ in range(soft):
        grown = F.max_pool2d(grown.float(), 3, stride=1, padding=1) > 0
        depth += (mask & ~grown[0, 0]).float()
    change = (after.float() - before.float()) * (depth / (soft + 1))
    faded = (before.float() + change).round().clamp(0, 255).to(torch.uint8)
    return torch.where(mask, faded, before)
