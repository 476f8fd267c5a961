"""The page of measurements over time, from benchmarks/results/history.csv: a table for each subject.

``python docs/history.py`` adds what the other files of benchmarks/results hold by now. Run it after a new measurement,
which replaces the one before in its own file. ``make_pages.py`` calls ``write`` when the site is built.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

from results import H100, RESULTS, Result, ms, rows, times

__all__ = ["FILES", "HISTORY", "headline", "write"]

HISTORY = "history.csv"
COLUMNS = ("subject", "date", "commit", "machine", "measured", "p50_ms", "peer", "ratio")
FILES = {  # file: its subject
    "quantize.csv": "Lookups",
    "quantize_amx.csv": "Lookups",
    "quantize_zen4.csv": "Lookups",
    f"{H100}lookup.csv": "Lookups",
    "train_step.csv": "Training steps",
    "train_step_amx.csv": "Training steps",
    f"{H100}training_step.csv": "Training steps",
    f"{H100}residual.csv": "Residual quantizers",
    "ema.csv": "Statistics",
    f"{H100}statistics.csv": "Statistics",
    "masked_conv.csv": "Masked convolutions",
    "masked_conv_amx.csv": "Masked convolutions",
    "sampling.csv": "Sampling",
    f"{H100}sampling.csv": "Sampling",
    "drop_in.csv": "Patched quantizers",
    "model.csv": "The reference model",
}
LIMITS = ("read", "one forward", "one forward pass")  # no way to do the work, but the least time that any takes


def headline(file: str, found: Sequence[Result]) -> Result:
    """The first case of ``file``: fastvq's time, and the fastest peer."""
    if "what" in found[0]:
        step = found[0]["what"].removesuffix(": milliseconds")
        peer = next(r for r in found if r["what"] == f"{step}: vector-quantize-pytorch over fastvq")
        ours = {**found[0], "measured": step, "p50_ms": found[0]["value"]}
        peer = {"provider": "vector-quantize-pytorch", "ratio": peer["value"]}
    else:
        ours = next(r for r in found if r["ratio"] == "1" and (r["provider"] == "after" or "fastvq" in r["provider"]))
        same = [r for r in found if all(r[c] == ours[c] for c in ("case", "shape", "data", "threads"))]
        peers = [r for r in same if r["ratio"] and "fastvq" not in r["provider"] and r["provider"] not in LIMITS]
        none = {"provider": "", "ratio": ""}
        peer = min((r for r in peers if r is not ours), key=lambda r: float(r["ratio"]), default=none)
        shape = "" if "N " in ours["case"] else f", {ours['shape']}"
        data = "" if ours["data"].lower() == "gaussian" else f", {ours['data']}"
        ours = {**ours, "measured": f"{ours['case']}{shape}{data}"}
    machine = ours["machine"].split(";")[0].replace(", Linux", "")
    machine = f"NVIDIA H100 80GB HBM3; {machine}" if file.startswith(H100) else machine
    kept = {"subject": FILES[file], "machine": machine, "peer": peer["provider"], "ratio": peer["ratio"]}
    return {column: {**ours, **kept}[column] for column in COLUMNS}


def record() -> None:
    """Adds the present headline of every file to the history."""
    known = list(rows(HISTORY))
    known += [new for file in FILES if (new := headline(file, rows(file))) not in known]
    known.sort(key=lambda row: (list(FILES.values()).index(row["subject"]), row["date"]))
    with (RESULTS / HISTORY).open("w", newline="") as opened:
        writer = csv.DictWriter(opened, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(known)


def write(folder: Path) -> None:
    lines: list[str] = []
    for subject in dict.fromkeys(FILES.values()):
        lines += [f"## {subject}", "", "{.compact}"]
        lines += ["| date | commit | machine | measured | fastvq ms | fastest peer | its time over fastvq's |"]
        lines += ["|" + "---|" * 7]
        lines += ["| " + " | ".join(_cells(row)) + " |" for row in rows(HISTORY) if row["subject"] == subject]
        lines.append("")
    (folder / "history.md").write_text("\n".join(lines))


def _cells(row: Result) -> tuple[str, ...]:
    peer = (row["peer"], times(row)) if row["peer"] else ("-", "-")
    return row["date"][:10], row["commit"], row["machine"], row["measured"], ms(row), *peer


if __name__ == "__main__":
    record()
