"""Quantizers that people have, before and after ``fastvq.patch``: step time, peak memory, indices.

    python benchmarks/bench_drop_in.py

Both sides in turn in one run, medians, one thread unless --threads says otherwise. Writes drop_in.csv, drop_in.png and
drop_in.md, the README's table, to ./out (--out DIR). "(double)": a repository that is no package, by the plain
quantizer that the tests compare with.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import os
import sys
import time
from pathlib import Path

import torch

import fastvq
from drop_in.cases import CASES, Prepared
from harness import Call, PeakMemory, Progress, Row, interleave, paired_ratio, print_notes, write_csv
from harness.machine import commit, describe_machine, describe_versions
from harness.report import print_cells
from harness.timing import thread_count

# Peaks below this are the noise of the allocator, and a quotient of them says nothing.
SMALLEST_MIB = 1.0
# "differ": where the peer's own rounding chose another code than float64, and what follows from it at later levels.
HEADERS = ("quantizer", "shape", "ms before", "after", "faster", "MiB before", "after", "less", "differ")


def measure(name: str, prepared: Prepared, seconds: float, threads: int) -> list[Row]:
    """Two rows: the peer's own, and the same after the patch, from the same state."""
    before = prepared.model
    after = copy.deepcopy(before)
    fastvq.patch(after)
    same = [prepared.indices(copy.deepcopy(model)) for model in (before, after)]
    differing, compared = int((same[0] != same[1]).sum()), same[0].numel()
    calls, memory = {}, {}
    for label, model in (("before", before), ("after", after)):
        start = time.perf_counter()
        with PeakMemory() as peak:
            prepared.step(model)
        memory[label] = peak
        calls[label] = Call(lambda model=model: prepared.step(model), time.perf_counter() - start)
    # Processes that want a turn, these few seconds' own included: a reader sees whether the machine was quiet.
    note = f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} processors" if hasattr(os, "getloadavg") else ""
    times = interleave(calls, seconds=seconds, min_rounds=3)
    rows = []
    for label, t in times.items():
        rows.append(
            Row(
                case=name, shape=prepared.shape, data="gaussian", threads=threads, provider=label, calls=len(t.calls),
                p20_ms=t.quantile(0.2) * 1e3, p50_ms=t.quantile(0.5) * 1e3, p80_ms=t.quantile(0.8) * 1e3,
                extra_mib=memory[label].mib, memory_method=memory[label].method, differing=differing,
                compared=compared, ratio=paired_ratio(t, times["after"]), cores=t.cores, note=note,
            )
        )  # fmt: skip
    return rows


def cells(before: Row, after: Row) -> list[str]:
    less = "-"
    if before.extra_mib is not None and after.extra_mib is not None:
        less = f"{before.extra_mib / max(after.extra_mib, SMALLEST_MIB):.0f}x"
    memory = [
        "-" if row.extra_mib is None else "< 1" if row.extra_mib < SMALLEST_MIB else f"{row.extra_mib:.0f}"
        for row in (before, after)
    ]
    times = [f"{row.p50_ms:.0f}" for row in (before, after)]
    return [
        before.case,
        before.shape,
        *times,
        f"{before.ratio:.1f}x",
        *memory,
        less,
        f"{before.differing}/{before.compared}",
    ]


def markdown(rows: list[tuple[Row, Row]]) -> str:
    """The README's table; lookups that float64 decides and the peer's rounding did not are in the last column."""
    lines = ["| quantizer | N x levels x K x D | ms | faster | MiB | other codes |", "|---|---|---|---|---|---|"]
    for before, after in rows:
        name, shape, old, new, faster, *memory, _, differing = cells(before, after)
        lines.append(f"| {name} | {shape} | {old} -> {new} | {faster} | {' -> '.join(memory)} | {differing} |")
    return "\n".join(lines) + "\n"


def plot(path: Path, rows: list[tuple[Row, Row]]) -> None:
    """How many times faster and smaller, a point each on a logarithmic axis; the line at 1 is the peer itself."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 0.42 * len(rows) + 1.4), sharey=True)
    names = [f"{before.case}\n{before.shape}" for before, _ in rows]
    faster = [before.ratio for before, _ in rows]
    smaller = [(before.extra_mib or 0) / max(after.extra_mib or 0, SMALLEST_MIB) for before, after in rows]
    for axis, values, title in zip(axes, (faster, smaller), ("times faster", "times less extra memory"), strict=True):
        axis.plot(values, names, "o", color="#3b6ea5")
        for name, value in zip(names, values, strict=True):
            text = f"{value:.0f}" if value >= 10 else f"{value:.1f}"
            axis.annotate(text, (value, name), (8, -3), textcoords="offset points", fontsize=8)
        axis.axvline(1, color="#888888", linewidth=0.8)
        axis.grid(axis="y", color="#dddddd", linewidth=0.6)
        axis.set_xscale("log")
        axis.set_xlim(min(1, *values) / 1.3, max(values) * 4)  # room for the last label
        axis.set_title(f"fastvq.patch: {title}", fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=7)
    axes[0].invert_yaxis()
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main() -> int:
    parser = argparse.ArgumentParser(description="quantizers before and after fastvq.patch; about 5 minutes")
    parser.add_argument("--only", metavar="WORD", help="cases whose name holds WORD")
    parser.add_argument("--seconds", type=float, default=3.0, help="for each case; slow ones take three rounds")
    parser.add_argument("--threads", type=int, default=1, help="of torch and of fastvq; default 1")
    parser.add_argument("--out", type=Path, default=Path("out"), metavar="DIR", help="default: ./out")
    options = parser.parse_args()
    chosen = {name: make for name, make in CASES.items() if (options.only or "") in name}
    if not chosen:
        parser.error(f"--only: no case holds {options.only!r}; they are {', '.join(CASES)}")
    if options.threads < 1:
        parser.error(f"--threads: at least 1, got {options.threads}")
    print(f"{describe_machine()}\n{describe_versions()}; commit {commit()}\n", flush=True)
    pairs, absent = [], []
    with Progress(len(chosen)) as progress, thread_count(options.threads):
        for name, make in chosen.items():
            progress.step(name)
            try:
                torch.manual_seed(0)
                prepared = make()
            except ImportError as error:
                absent.append(f"{name}: {error}")
                continue
            before, after = measure(name, prepared, options.seconds, options.threads)
            pairs.append((before, after))
    print_notes("Left out", absent)
    print_cells(f"Before and after fastvq.patch, threads: {options.threads}", HEADERS, [cells(*pair) for pair in pairs])
    options.out.mkdir(parents=True, exist_ok=True)
    files = [options.out / "drop_in.csv", options.out / "drop_in.md"]
    write_csv(files[0], [row for pair in pairs for row in pair])
    files[1].write_text(markdown(pairs))
    if pairs and importlib.util.find_spec("matplotlib"):
        files.append(options.out / "drop_in.png")
        plot(files[-1], pairs)
    print(f"Wrote {', '.join(map(str, files))}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
