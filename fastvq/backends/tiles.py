"""Tile tables of the Triton kernels: which block sizes a kernel is launched with.

Each kernel's file holds its table; this module picks the row, and with ``FASTVQ_AUTOTUNE=1`` times the rows instead and
remembers the fastest on disk.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fastvq import _env
from fastvq.backends import triton as triton_backend

__all__ = ["Tile", "pick"]


class Tile(NamedTuple):
    """One row: for cards of ``capability`` (times ten) or later, widths up to ``dim`` and elements of ``dtype``.

    A comment at the row or its table names the card, the shape and the date of its measurement, if there was one.
    """

    capability: int
    dim: int
    dtype: torch.dtype  # of the operands as the tensor cores see them
    meta: Mapping[str, int]  # block sizes by their tl.constexpr names, num_warps, num_stages


def pick(
    kernel: str,
    table: Sequence[Tile],
    device: torch.device,
    dim: int,
    dtype: torch.dtype,
    launch: Callable[[Mapping[str, int]], Any] | None = None,
) -> Mapping[str, int]:
    """The ``meta`` of the row for a card, a width and a dtype.

    Of the rows that fit, those of the newest capability the card has, and of these the narrowest width. Under
    ``FASTVQ_AUTOTUNE=1`` every row that fits is timed with ``launch(meta)``, once a card, width and dtype, and the
    fastest is kept in ``tiles.json`` in the user's cache folder. All rows give the same result.

    Raises:
        ValueError: no row fits, which a refusal of the backend should have caught.
    """
    card = triton_backend.capability(device)
    rows = [t for t in table if t.capability <= card and t.dim >= dim and t.dtype == dtype]
    if not rows:
        raise ValueError(f"{kernel}: no tile for capability {card}, width {dim} and {dtype}")
    if launch is not None and _env.read("FASTVQ_AUTOTUNE") == "1" and device.type == "cuda":
        return rows[_tuned(kernel, rows, device, dim, dtype, launch)].meta
    return min(rows, key=lambda t: (-t.capability, t.dim)).meta


def _cache_file() -> Path:
    folder = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(folder) / "fastvq" / "tiles.json"


@cache
def _remembered() -> dict[str, int]:
    try:
        found = json.loads(_cache_file().read_text())
    except (OSError, ValueError):
        return {}
    if not isinstance(found, dict):
        return {}
    return {key: row for key, row in found.items() if isinstance(row, int)}


def _tuned(
    kernel: str,
    rows: Sequence[Tile],
    device: torch.device,
    dim: int,
    dtype: torch.dtype,
    launch: Callable[[Mapping[str, int]], Any],
) -> int:
    # The rows' own text is part of the key: a table that changes forgets what was timed for the old one.
    sizes = ";".join(str(sorted(t.meta.items())) for t in rows)
    key = f"{torch.cuda.get_device_name(device)}|{kernel}|{dim}|{dtype}|{sizes}"
    known = _remembered()
    if key not in known or not 0 <= known[key] < len(rows):
        from triton.testing import do_bench

        times = [do_bench(lambda meta=t.meta: launch(meta), warmup=5, rep=20) for t in rows]
        known[key] = times.index(min(times))
        _remember(known)
    return known[key]


def _remember(known: dict[str, int]) -> None:
    # Written beside and renamed: two processes that tune at once leave one whole file. A folder that cannot be written
    # costs the next process its tuning, not this one its result.
    path = _cache_file()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
            json.dump(known, file, indent=1)
        os.replace(file.name, path)
    except OSError:
        return
