"""Times learners side by side, compares their results first, and draws them."""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from harness import Call, PeakMemory, Progress, Row, interleave, missing_extras, paired_ratio, print_notes, print_table
from harness.machine import commit, describe_machine, describe_versions
from harness.report import write_csv
from harness.timing import thread_count
from learning.providers import Learner

OURS, THEIRS = "#d1495b", "#00798c"


def measure(
    title: str,
    shape: str,
    n_threads: int,
    learners: Sequence[Learner],
    arguments: Sequence[object],
    judge: Callable[[object], tuple[int, int]],
    seconds: float,
) -> list[Row]:
    """One row a learner; ``judge`` gives (entries that differ, entries compared) of its first result."""
    rows, calls = [], {}
    with thread_count(n_threads):
        for learner in learners:
            row = Row(title, shape, "gaussian", n_threads, learner.name)
            rows.append(row)
            if reason := learner.unavailable():
                row.note = reason
                continue
            call = learner.prepare(*arguments)
            if learner.name != "read":
                row.differing, row.compared = judge(call())
                if learner.ours and row.differing:
                    row.note = "WRONG, not timed"
                    continue
            gc.collect()
            with PeakMemory() as memory:
                start = time.perf_counter()
                call()
                estimate = time.perf_counter() - start
            row.extra_mib, row.memory_method = memory.mib, memory.method
            calls[learner.name] = Call(call, estimate)
        measured = interleave(calls, seconds=seconds, min_rounds=3)
    base = measured.get("fastvq")
    for row in rows:
        if times := measured.get(row.provider):
            row.calls, row.cores = len(times.calls), times.cores
            row.p20_ms, row.p50_ms, row.p80_ms = (1e3 * times.quantile(q) for q in (0.2, 0.5, 0.8))
            row.ratio = None if base is None else paired_ratio(times, base)
    return rows


def parse(description: str, arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help="small shapes, few repeats: seconds")
    parser.add_argument("--full", action="store_true", help="the largest shapes too: minutes")
    parser.add_argument("--out", type=Path, default=Path("out"), metavar="DIR", help="default: ./out")
    options = parser.parse_args(arguments)
    if options.quick and options.full:
        parser.error("--quick and --full exclude each other; drop one")
    options.out.mkdir(parents=True, exist_ok=True)
    return options


def run(
    name: str,
    options: argparse.Namespace,
    cases: Sequence[tuple[str, Callable[[], list[Row]]]],
    settings: Sequence[str],
) -> int:
    """Measures the cases, prints their tables, writes NAME.csv and NAME.png; 1 where a result of ours was wrong."""
    print(f"{describe_machine()}\n{describe_versions()}; commit {commit()}\n", flush=True)
    absent = missing_extras({"matplotlib": "plots", "rich": "tables with rules and a progress bar"}, "bench")
    print_notes("Left out", absent)
    results: list[list[Row]] = []
    with Progress(len(cases)) as progress:
        for title, case in cases:
            progress.step(title)
            results.append(case())
            print_table(title, results[-1])
    rows = [row for case in results for row in case]
    write_csv(options.out / f"{name}.csv", rows)
    written = [options.out / f"{name}.csv"]
    if not any(line.startswith("matplotlib") for line in absent):
        plot(options.out / f"{name}.png", results)
        written.append(options.out / f"{name}.png")
    print_notes("Settings", settings)
    print(f"Wrote {', '.join(map(str, written))}")
    return int(any(row.note.startswith("WRONG") for row in rows))


def plot(path: Path, results: Sequence[Sequence[Row]]) -> None:
    """One panel a case: the time of every competitor, logarithmic, with its ratio to fastvq's."""
    import matplotlib

    matplotlib.use("Agg")  # no display is needed to write a file
    import matplotlib.pyplot as plt

    n_columns = min(3, len(results))
    n_rows = -(-len(results) // n_columns)
    figure, panels = plt.subplots(n_rows, n_columns, figsize=(5.4 * n_columns, 2.9 * n_rows), squeeze=False)
    for panel in panels.flat[len(results) :]:
        panel.set_visible(False)
    for panel, rows in zip(panels.flat, results, strict=False):
        # Points rather than bars: on a logarithmic axis a bar's length says nothing.
        timed = [row for row in rows if row.p50_ms is not None][::-1]
        for height, row in enumerate(timed):
            colour = OURS if row.provider.startswith("fastvq") else THEIRS
            panel.plot([row.p20_ms, row.p80_ms], [height, height], color=colour, linewidth=2, alpha=0.6)
            panel.plot(row.p50_ms, height, marker="o", markersize=8, color=colour)
            digits = 0 if row.p50_ms >= 100 else 1 if row.p50_ms >= 10 else 2
            ratio = "" if row.ratio is None else f"   {row.ratio:.{0 if row.ratio >= 10 else 2}f}x"
            panel.text(row.p80_ms, height + 0.2, f" {row.p50_ms:,.{digits}f} ms{ratio}", va="bottom", fontsize=8)
        panel.set(xscale="log", xlabel="milliseconds, median; a line from p20 to p80", ylim=(-0.6, len(timed) - 0.1))
        panel.set_yticks(range(len(timed)), [row.provider for row in timed])
        low, high = panel.get_xlim()
        panel.set_xlim(low / 1.5, high * 6)  # room for the labels
        panel.grid(True, axis="x", color="#dddddd", linewidth=0.7)
        panel.set_title(rows[0].case, fontsize=9)
        panel.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=130, bbox_inches="tight")
    plt.close(figure)
