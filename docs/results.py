"""Reads the CSV files in benchmarks/results and formats their figures. ``tables.py``, ``measurements.py`` and
``history.py`` use it."""

from __future__ import annotations

import csv
import functools
import hashlib
from pathlib import Path

__all__ = ["H100", "RESULTS", "Result", "best", "digest", "fastest_two", "mib", "ms", "one", "percent", "rows", "times"]

RESULTS = Path(__file__).resolve().parent.parent / "benchmarks" / "results"
H100 = "nvidia_h100_80gb_hbm3/"
Result = dict[str, str]


@functools.cache
def rows(file: str) -> tuple[Result, ...]:
    """The rows of benchmarks/results/``file``."""
    with (RESULTS / file).open(newline="") as opened:
        return tuple(csv.DictReader(opened))


def digest(file: str) -> str:
    """Of the file's content; a plot carries it, so that a plot of an earlier file is found."""
    return hashlib.sha256((RESULTS / file).read_bytes()).hexdigest()


def one(file: str, **wanted: str) -> Result:
    """The first row of ``file`` whose columns have these values: later ones measure the same case again."""
    for row in rows(file):
        if all(row[name] == value for name, value in wanted.items()):
            return row
    raise ValueError(f"{file}: there is no row with {wanted}")


def best(file: str, *but: str, **wanted: str) -> Result:
    """The fastest row that is not fastvq's and none of the providers ``but``."""
    found = [
        row
        for row in rows(file)
        if all(row[name] == value for name, value in wanted.items())
        and row["p50_ms"]
        and not row["provider"].startswith("fastvq")
        and row["provider"] not in but
    ]
    return min(found, key=lambda row: float(row["p50_ms"]))


def ms(row: Result, column: str = "p50_ms") -> str:
    """Three digits, or all digits before the point."""
    value = float(row[column])
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def mib(row: Result) -> str:
    value = float(row["extra_mib"])
    return f"{value:.0f}" if value >= 1 else "< 1"


def times(row: Result) -> str:
    """How many times longer it takes than fastvq."""
    value = float(row["ratio"])
    return f"{value:.2f}x" if value < 2 else f"{value:.1f}x" if value < 100 else f"{value:.0f}x"


def percent(row: Result) -> str:
    return f"{float(row['ceiling_share']):.0%}".replace("%", " %")


def fastest_two(file: str, shape: str, case: str) -> tuple[Result, Result]:
    """fastvq's row in the memory layout that is faster, and the best of torch's ways in either layout."""
    ours = [r for r in rows(file) if (r["shape"], r["case"]) == (shape, case) and r["provider"].startswith("fastvq")]
    return min(ours, key=lambda r: float(r["p50_ms"])), best(file, shape=shape, case=case)
