"""What a report leaves behind: a CSV of every row, a plot, and one page that says it in words."""

from __future__ import annotations

import csv
import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path

from harness import describe_machine, describe_versions
from harness.machine import commit

HEADERS = ("case", "shape", "data", "who", "median ms", "over fastvq", "of the limit", "differ", "")


def read_rows(path: Path) -> list[dict[str, str]]:
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def _cell(row: Mapping[str, str], name: str) -> str:
    return row.get(name) or "-"


def summary(out: Path, parts: Mapping[str, str]) -> str:
    """The page: what ran and what did not, then a table a part."""
    lines = [f"# {out.name}", "", f"{describe_machine()}; {describe_versions()}; commit {commit()}", ""]
    lines += ["| part | outcome |", "|---|---|", *(f"| {name} | {outcome} |" for name, outcome in parts.items())]
    for name in parts:
        rows = read_rows(out / f"{name}.csv")
        if not rows:
            continue
        lines += [
            "",
            f"## {name}",
            "",
            "| case | shape | data | who | median ms | over fastvq | of the limit | differ | |",
        ]
        lines.append("|---|---|---|---|---|---|---|---|---|")
        for row in rows:
            share = row.get("ceiling_share")
            cells = (
                row["case"], row["shape"], row["data"], row["provider"], _cell(row, "p50_ms"), _cell(row, "ratio"),
                f"{float(share):.0%}" if share else "-", _cell(row, "differing"), row.get("note", ""),
            )  # fmt: skip
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def plot(out: Path, parts: Sequence[str]) -> None:
    """Median times over fastvq's, a bar a competitor and case; right of the line fastvq is faster."""
    rows = [r for name in parts for r in read_rows(out / f"{name}.csv") if r.get("ratio")]
    rows = [r for r in rows if not r["provider"].startswith("fastvq") and r["case"] != "ceilings"]
    if not rows or importlib.util.find_spec("matplotlib") is None:
        return
    import matplotlib

    matplotlib.use("Agg")  # no display is needed to write a file
    import matplotlib.pyplot as plt

    labels = [f"{r['case']} {r['shape']} {r['data']}: {r['provider']}" for r in rows]
    figure, axes = plt.subplots(figsize=(9, 1 + 0.22 * len(rows)))
    ratios = [float(r["ratio"]) for r in rows]
    axes.barh(range(len(rows)), ratios, color=["#3d6ea5" if v >= 1 else "#d1495b" for v in ratios])
    axes.set_yticks(range(len(rows)), labels, fontsize=7)
    axes.axvline(1, color="black", lw=1)
    axes.set(xscale="log", xlabel="its time over fastvq's, median")
    axes.invert_yaxis()
    figure.tight_layout()
    figure.savefig(out / "ratios.png", dpi=110, bbox_inches="tight")
    plt.close(figure)
