"""The reference model: what it achieves on digits and photographs, and how fast it trains and draws.

    python benchmarks/bench_model.py [--only digits,photographs,steps,generate] [--quick] [--threads N] [--out DIR]

Writes model.csv and pictures to DIR (benchmarks/results). Needs the extras "models" and "bench", and mlxtend.
A training that was stopped is gone on with when --runs names the same folder.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

from harness.machine import commit, describe_machine, describe_versions
from model.quality import digits, photographs
from model.speed import drawings, training_steps

RESULTS = Path(__file__).parent / "results"
PARTS = ("digits", "photographs", "steps", "generate")
FIELDS = ("what", "value", "wanted", "met", "note")
HOLDS = {">=": float.__ge__, ">": float.__gt__, "<=": float.__le__}


def main() -> None:
    options = _options()
    torch.set_num_threads(options.threads)
    options.out.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, object]] = []

    def report(what: str, value: float, relation: str = "", bound: float = 0.0, note: str = "") -> None:
        met = "" if not relation else "yes" if HOLDS[relation](float(value), float(bound)) else "NO"
        wanted = f"{relation} {bound:g}" if relation else ""
        rows.append(dict(zip(FIELDS, (what, f"{value:.5g}", wanted, met, note), strict=True)))
        print(f"{what}: {value:.5g}  {wanted}  {met}  {note}", flush=True)

    share = 0.02 if options.quick else 1.0
    seconds = 2.0 if options.quick else 12.0
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.runs or Path(temporary)
        parts: dict[str, Callable[[], None]] = {
            "digits": lambda: digits(folder, options.out, report, share=share),
            "photographs": lambda: photographs(folder, options.out, report, share=share),
            "steps": lambda: training_steps(report, threads=options.threads, seconds=seconds),
            "generate": lambda: drawings(report, threads=options.threads, seconds=seconds),
        }
        for name in options.only:
            parts[name]()
            _write(options.out / "model.csv", rows, name, options.threads)
            rows.clear()


def _write(path: Path, rows: list[dict[str, object]], part: str, threads: int) -> None:
    """Replaces the rows of one part in the file; the others stay, each line with its own machine and commit."""
    origin = {
        "part": part,
        "threads": threads,
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "machine": describe_machine(),
        "versions": describe_versions(),
        "commit": commit(),
    }
    kept = []
    if path.is_file():
        with path.open(newline="") as file:
            kept = [row for row in csv.DictReader(file) if row["part"] != part]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*FIELDS, *origin])
        writer.writeheader()
        writer.writerows([*kept, *({**row, **origin} for row in rows)])


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", type=lambda s: s.split(","), default=list(PARTS), help="parts, by commas")
    parser.add_argument("--quick", action="store_true", help="a fiftieth of the training, to see that it runs")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--runs", type=Path, default=None, help="folder that keeps the trained models")
    options = parser.parse_args()
    unknown = sorted(set(options.only) - set(PARTS))
    if unknown:
        parser.error(f"--only must name parts among {', '.join(PARTS)}, got {', '.join(unknown)}")
    return options


if __name__ == "__main__":
    main()
