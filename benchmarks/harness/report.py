"""Rows of results, their table and CSV file, and the progress bar; by rich where it is installed, else plain text."""

from __future__ import annotations

import csv
import datetime
import functools
import importlib.util
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import TracebackType

from harness.machine import commit, describe_machine, describe_versions

# rich cuts columns off where the output is no terminal and it does not know the width.
PIPE_WIDTH = 130


@dataclass
class Row:
    """One competitor on one case. Times are None where its indices forbid printing one, or it did not run."""

    case: str
    shape: str
    data: str
    threads: int
    provider: str
    subset: float = 1.0  # share of the vectors that was timed; times below are scaled up to all of them
    calls: int = 0
    p20_ms: float | None = None
    p50_ms: float | None = None
    p80_ms: float | None = None
    gflops: float | None = None
    ceiling_gflops: float | None = None
    ceiling_share: float | None = None
    extra_mib: float | None = None  # of the call that was made, so of the subset
    memory_method: str = ""
    differing: int | None = None
    compared: int | None = None
    rescored: float | None = None  # share of the vectors that the filter left to the definition (fastvq's CPU kernels)
    ratio: float | None = None  # its time over fastvq's, median over rounds
    cores: float | None = None  # processor seconds per second
    note: str = ""


def write_csv(path: Path, rows: Sequence[Row]) -> None:
    """One line a row, each with the machine, the versions and the commit, so that a line means something by itself."""
    origin = {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "machine": describe_machine(),
        "versions": describe_versions(),
        "commit": commit(),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*(f.name for f in fields(Row)), *origin])
        writer.writeheader()
        for row in rows:
            values = {name: f"{v:.5g}" if isinstance(v, float) else v for name, v in asdict(row).items()}
            writer.writerow({**values, **origin})


def _number(value: float | None, digits: int = 3) -> str:
    if value is None:
        return "-"
    return f"{value:.0f}" if abs(value) >= 10**digits else f"{value:.{digits}g}"


def _cells(row: Row) -> list[str]:
    scaled = "~" if row.subset < 1 and row.p50_ms is not None else ""
    return [
        row.provider,
        "-" if row.differing is None else f"{row.differing} of {row.compared}",
        *(scaled + _number(value) for value in (row.p20_ms, row.p50_ms, row.p80_ms)),
        _number(row.gflops),
        "-" if row.ceiling_share is None else f"{row.ceiling_share:.0%}",
        "-" if row.rescored is None else f"{row.rescored:.2%}",
        "-" if row.extra_mib is None else scaled + f"{row.extra_mib:.1f}",
        "-" if row.ratio is None else f"{row.ratio:.2f}x",
        row.note,
    ]


HEADERS = (
    "provider",
    "differ",
    "p20 ms",
    "p50 ms",
    "p80 ms",
    "GFLOP/s",
    "ceiling",
    "re-scored",
    "extra MiB",
    "vs fastvq",
    "note",
)


def print_table(title: str, rows: Sequence[Row]) -> None:
    """The rows of one case."""
    cells = [_cells(row) for row in rows]
    n_columns = len(HEADERS) if any(row.note for row in rows) else len(HEADERS) - 1
    print_cells(title, HEADERS[:n_columns], [line[:n_columns] for line in cells])


def print_cells(title: str, headers: Sequence[str], cells: Sequence[Sequence[str]]) -> None:
    """A table of text: the first column and a last one named note to the left, the others to the right."""
    left = {0} | ({len(headers) - 1} if headers[-1] == "note" else set())
    if importlib.util.find_spec("rich"):
        from rich import box
        from rich.table import Table

        table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
        for i, header in enumerate(headers):
            table.add_column(header, justify="left" if i in left else "right", no_wrap=header != "note")
        for line in cells:
            table.add_row(*line)
        rich_console().print(table)
        return
    widths = [max(map(len, column)) for column in zip(headers, *cells, strict=True)]
    print(f"\n{title}")
    for line in (headers, ["-" * w for w in widths], *cells):
        padded = (c.ljust(w) if i in left else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True)))
        print("  ".join(padded).rstrip())
    print(flush=True)


@functools.cache
def rich_console():  # type: ignore[no-untyped-def]
    """rich's console for standard output, wide enough for the tables where it is a pipe.

    One for tables and bar: the bar can then step aside for what is printed.
    """
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else PIPE_WIDTH, highlight=False)


def missing_extras(packages: dict[str, str], extra: str) -> list[str]:
    """A line for each import name that is not installed, saying what is left out and what brings it."""
    return [
        f'{what}: not installed ({name}); pip install -e ".[{extra}]"'
        for name, what in packages.items()
        if importlib.util.find_spec(name) is None
    ]


def print_notes(title: str, lines: Sequence[str]) -> None:
    if lines:
        print(f"{title}:")
        for line in lines:
            print(f"  {line}")
        print(flush=True)


class Progress:
    """A bar on a terminal; elsewhere one line a step, on standard error, so that a log shows where a run stands."""

    def __init__(self, n_steps: int) -> None:
        self._n_steps = n_steps
        self._done = 0
        self._start = time.monotonic()
        self._bar = None
        if sys.stdout.isatty() and importlib.util.find_spec("rich"):
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
            from rich.progress import Progress as RichProgress

            columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
            self._bar = RichProgress(*columns, console=rich_console(), transient=True)
            self._task = self._bar.add_task("", total=n_steps)

    def __enter__(self) -> Progress:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()

    def step(self, what: str) -> None:
        """``what`` starts now; whatever was named before is done."""
        if self._bar is not None:
            self._bar.update(self._task, completed=self._done, description=what)
        else:
            seconds = time.monotonic() - self._start
            print(f"[{self._done + 1}/{self._n_steps}] {seconds:5.0f} s  {what}", file=sys.stderr, flush=True)
        self._done += 1
