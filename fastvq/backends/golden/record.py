"""Lookups with recorded indices: the same on every machine, backend and instruction set, or something there is wrong.

The vectors come from a counter (``_counter``), so that the record holds indices alone. Those were found by the
definition in NumPy float64, without fastvq.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterator
from importlib import resources
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastvq import _counter
from fastvq._options import Metric

__all__ = ["RECORD", "Lookup", "decode", "digest", "encode", "lookups", "recorded"]

RECORD = "golden_indices.json"
_F32, _F64, _F16, _BF16 = torch.float32, torch.float64, torch.float16, torch.bfloat16
# (kind, N, K, D, dtype of x, dtype of the codebook): odd and even sizes, each filter's width and beyond, enough rows
# for tiles and for several threads.
_SHAPES: tuple[tuple[str, int, int, int, torch.dtype, torch.dtype], ...] = (
    ("plain", 300, 257, 64, _F32, _F32),
    ("plain", 129, 1000, 33, _BF16, _BF16),
    ("plain", 127, 512, 8, _F16, _F16),
    ("plain", 64, 96, 40, _F64, _F64),
    ("plain", 65, 300, 128, _BF16, _F32),
    ("plain", 8200, 64, 32, _F32, _F32),
    ("plain", 7, 3, 4099, _F32, _F32),
    ("plain", 500, 2, 1, _F32, _F16),
    ("offset", 200, 300, 64, _F32, _F32),
    ("offset", 100, 300, 24, _F64, _F32),
    ("one bit apart", 200, 256, 48, _F32, _F32),
    ("one bit apart", 200, 256, 17, _BF16, _BF16),
    ("ties", 300, 200, 31, _F32, _F32),
    ("ties", 300, 200, 8, _F16, _F16),
    ("pairs", 200, 400, 65, _F32, _F32),
    ("collapsed", 200, 512, 64, _F32, _F32),
    ("norms", 200, 300, 16, _F32, _F32),
    ("denormal", 100, 100, 9, _F32, _F32),
    ("not finite", 200, 100, 12, _F32, _F32),
)
_METRICS: tuple[Metric, ...] = ("euclidean", "cosine", "dot")


class Lookup(NamedTuple):
    name: str
    metric: Metric
    x: Tensor  # [N, D]
    codebook: Tensor  # [K, D]


def lookups() -> Iterator[Lookup]:
    """Every recorded call, on the CPU."""
    for number, (kind, n, k, d, x_dtype, codes_dtype) in enumerate(_SHAPES):
        x, codes = (torch.from_numpy(t) for t in _vectors(kind, 3 * number, n, k, d))
        x, codes = x.to(x_dtype), codes.to(codes_dtype)
        if kind == "one bit apart":
            codes = codes[:1].repeat(k, 1)
            size = codes.element_size()
            as_integers = codes.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[size])
            as_integers += torch.from_numpy(_counter.integers(3 * number + 2, (k, d), 0, 2)).to(as_integers.dtype)
        if kind == "not finite":
            x[::7, 3], x[::11, 0], codes[5, 1], codes[::9, 2] = torch.nan, -torch.inf, torch.inf, torch.nan
        for metric in _METRICS if n < 8192 else _METRICS[:1]:
            name = f"{kind}, {n} x {k} x {d}, {_short(x_dtype)} and {_short(codes_dtype)}, {metric}"
            yield Lookup(name, metric, x, codes)


def _vectors(kind: str, key: int, n: int, k: int, d: int) -> tuple[np.ndarray, np.ndarray]:
    """x and codebook, float64."""
    if kind == "ties":
        return tuple(_counter.integers(key + i, (m, d), -1, 2).astype(np.float64) for i, m in enumerate((n, k)))  # type: ignore[return-value]
    x, codes = (_counter.normal_like(key + i, (m, d)) for i, m in enumerate((n, k)))
    if kind == "offset":
        x, codes = x + 1024, codes + 1024
    elif kind == "pairs":
        codes[k // 2 :] = codes[: k - k // 2]
    elif kind == "collapsed":
        codes = codes / 4096
    elif kind == "norms":
        scale = 2.0 ** _counter.integers(key + 2, (n + k, 1), -90, 91)
        x, codes = x * scale[:n], codes * scale[n:]
    elif kind == "denormal":
        x, codes = x * 2.0**-140, codes * 2.0**-140
    return x, codes


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def digest(lookup: Lookup) -> str:
    """SHA-256 of the bits of what goes in."""
    hashed = hashlib.sha256()
    for t in (lookup.x, lookup.codebook):
        hashed.update(t.contiguous().view(torch.uint8).numpy().tobytes())
    return hashed.hexdigest()


def encode(indices: Tensor) -> str:
    """Indices below 2^16 as text."""
    return base64.b64encode(indices.numpy().astype("<u2").tobytes()).decode()


def decode(text: str) -> Tensor:
    return torch.from_numpy(np.frombuffer(base64.b64decode(text), "<u2").astype(np.int64))


def recorded() -> dict[str, dict[str, Any]]:
    """Name of a lookup -> its "inputs", a digest, and its "indices", encoded."""
    record: dict[str, dict[str, Any]] = json.loads(
        resources.files("fastvq.backends.golden").joinpath(RECORD).read_text()
    )
    return record
