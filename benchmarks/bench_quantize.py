"""The nearest-codebook lookup against its peers, on photographs and on Gaussian vectors.

    python benchmarks/bench_quantize.py

Indices are compared with float64 first; then the times of all providers are taken side by side. Writes a CSV file and
pictures to ./out (--out DIR). See benchmarks/README.md for what each column means.
"""

from __future__ import annotations

import argparse
import importlib.util
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import fastvq
from harness import Progress, Row, missing_extras, photographs, print_notes, print_table, write_csv
from harness.machine import Ceilings, commit, describe_machine, describe_versions, read_bandwidth
from harness.report import print_cells
from harness.timing import thread_count
from lookup.cases import PICTURE_CODES, QUICK_CODES, Case, chosen_cases
from lookup.measure import DEFAULT, FULL, QUICK, SWEEP, Budget, measure
from lookup.providers import Provider, all_providers

OPTIONAL = {
    "matplotlib": "plots and the picture",
    "skimage": "photographs",
    "rich": "tables with rules and a progress bar",
}
DATA = ("photographs", "gaussian")
# The lines of the plots; every other provider is in the tables.
SWEPT_PEERS = ("cdist", "addmm", "addmm bf16", "faiss", "vq-pytorch")


def shape(text: str) -> tuple[int, int, int]:
    if not re.fullmatch(r"[1-9]\d*x[1-9]\d*x[1-9]\d*", text):
        raise argparse.ArgumentTypeError(f"{text!r}: a shape is NxKxD, for example 65536x1024x64")
    n_vectors, n_codes, dim = map(int, text.split("x"))
    return n_vectors, n_codes, dim


def positive(text: str) -> int:
    if not re.fullmatch(r"[1-9]\d*", text):
        raise argparse.ArgumentTypeError(f"{text!r}: a number of threads is 1 or more")
    return int(text)


def list_of(item):  # type: ignore[no-untyped-def]
    """An argparse type: items between commas."""
    return lambda text: [item(part.strip()) for part in text.split(",")]


def data_kind(text: str) -> str:
    if text not in DATA:
        raise argparse.ArgumentTypeError(f"{text!r}: data is one of {', '.join(DATA)}")
    return text


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="fastvq.ops.nearest against its peers; without arguments under 4 minutes on 2 cores"
    )
    parser.add_argument("--shapes", type=list_of(shape), metavar="NxKxD,...", help="Gaussian shapes; leaves sweeps out")
    parser.add_argument("--providers", metavar="NAME,...", help="names, or their first words, for example fastvq,faiss")
    parser.add_argument("--threads", type=list_of(positive), default=[], metavar="T,...", help="default: 1")
    parser.add_argument("--data", type=list_of(data_kind), default=list(DATA), metavar="KIND,...", help=", ".join(DATA))
    parser.add_argument("--quick", action="store_true", help="small shapes, few repeats: seconds")
    parser.add_argument("--full", action="store_true", help="every vector timed, every index compared: much longer")
    parser.add_argument("--out", type=Path, default=Path("out"), metavar="DIR", help="default: ./out")
    options = parser.parse_args(arguments)
    if options.quick and options.full:
        parser.error("--quick and --full exclude each other; drop one")
    table = all_providers()
    if options.providers is None:
        options.chosen = list(table.values())
    else:
        words = [word.strip() for word in options.providers.split(",")]
        for word in words:
            if not any(matches(word, name) for name in table):
                parser.error(f"--providers: {word!r} is none of {', '.join(table)}")
        options.chosen = [p for name, p in table.items() if any(matches(word, name) for word in words)]
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--out: {options.out} cannot be made a folder: {error.strerror}")
    return options


def matches(word: str, name: str) -> bool:
    """A provider's whole name; or ``fastvq`` for all of ours."""
    return word == name or (word == "fastvq" and name.startswith("fastvq "))


def budget_of(case: Case, options: argparse.Namespace) -> Budget:
    if options.quick:
        return QUICK
    if options.full:
        return FULL
    return SWEEP if case.sweep else DEFAULT


def providers_of(case: Case, runnable: Sequence[Provider]) -> list[Provider]:
    if not case.sweep:
        return list(runnable)
    best = [p for p in runnable if p.ours][:1]
    return best + [p for p in runnable if p.name in SWEPT_PEERS]


def print_sweep(axis: str, results: Sequence[tuple[Case, Row]]) -> None:
    """Medians of one sweep, a line a size; a number in brackets counts indices that differ from float64."""
    swept = [(case, row) for case, row in results if case.sweep == axis]
    names = list(dict.fromkeys(row.provider for _, row in swept))
    lines: dict[str, dict[str, str]] = {}
    for case, row in swept:
        text = "-" if row.p50_ms is None else f"{row.p50_ms:.3g}"
        text += f" ({row.differing})" if row.differing else ""
        size = f"{case.shape}, {case.n_threads}" if axis == "threads" else case.shape
        lines.setdefault(size, {})[row.provider] = ("~" if row.subset < 1 else "") + text
    cells = [[size, *(line.get(name, "-") for name in names)] for size, line in lines.items()]
    sizes = "N x K x D, threads" if axis == "threads" else "N x K x D"
    print_cells(f"Sweep over {axis}, ms (indices that differ)", [sizes, *names], cells)


def draw(out: Path, results: Sequence[tuple[Case, Row]], options: argparse.Namespace) -> list[Path]:
    from lookup import plots

    written = []
    if any(case.sweep for case, _ in results):
        plots.plot_speed(out / "speed.png", results)
        written.append(out / "speed.png")
    if any(row.gflops is not None and row.threads == 1 for _, row in results):
        with thread_count(1):
            bandwidth = read_bandwidth()
        plots.plot_roofline(out / "roofline.png", results, bandwidth)
        written.append(out / "roofline.png")
    if "photographs" in options.data:
        codes = QUICK_CODES if options.quick else PICTURE_CODES
        plots.plot_photographs(out / "photographs.png", codes)
        written.append(out / "photographs.png")
    return written


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    start = time.monotonic()
    print(f"{describe_machine()}\n{describe_versions()}; commit {commit()}\n", flush=True)
    absent = missing_extras(OPTIONAL, "bench")
    if "photographs" in options.data and (reason := photographs.unavailable()):
        options.data.remove("photographs")
        if reason not in absent and importlib.util.find_spec("skimage"):
            absent.append(reason)
    if reason := Ceilings.unavailable():
        absent.append(reason)
    reasons = {p.name: p.unavailable() for p in options.chosen}
    print_notes("Left out", absent + [f"{name}: {reason}" for name, reason in reasons.items() if reason])
    runnable = [p for p in options.chosen if reasons[p.name] is None]
    cases = chosen_cases(
        shapes=options.shapes, data=options.data, threads=options.threads, quick=options.quick, full=options.full
    )
    if not cases or not runnable:
        print("nothing to measure: no data or no provider is left; see what was left out above", file=sys.stderr)
        return 2
    results: list[tuple[Case, Row]] = []
    with Progress(len(cases) + 1) as progress:
        for case in cases:
            progress.step(case.title)
            rows = measure(case, providers_of(case, runnable), budget_of(case, options))
            results += [(case, row) for row in rows]
            if not case.sweep:
                print_table(case.title, rows)
        for axis in dict.fromkeys(case.sweep for case in cases if case.sweep):
            print_sweep(axis, results)
        progress.step("files")
        files = [options.out / "quantize.csv"]
        write_csv(files[0], [row for _, row in results])
        if importlib.util.find_spec("matplotlib"):
            files += draw(options.out, results, options)
    print_notes("Settings", [f"{p.name}: {p.setting}" for p in runnable])
    wrong = [row for _, row in results if row.provider.startswith("fastvq") and (row.differing or row.compared is None)]
    for row in wrong:
        print(f"WRONG: {row.provider} at {row.case}: {row.note}", file=sys.stderr)
    print(f"Wrote {', '.join(map(str, files))} in {time.monotonic() - start:.0f} s with fastvq {fastvq.__version__}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
