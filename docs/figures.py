"""Draws the README's plot from the results that it shows: ``python docs/figures.py``.

docs/images/lookup.png: time of one lookup by fastvq and its peers, from benchmarks/results/quantize.csv.
"""

from __future__ import annotations

import csv
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # no display is needed to write a file
import matplotlib.pyplot as plt

from results import digest

ROOT = Path(__file__).resolve().parent.parent
SHAPES = ("65536x1024x64", "65536x1024x256", "16384x8192x256", "65536x16384x8")
PROVIDERS = {  # name in the file: label, colour
    "fastvq avx512_vnni": ("fastvq, exact", "#d1495b"),
    "faiss": ("faiss flat L2", "#8d99ae"),
    "cdist": ("torch.cdist + argmin", "#2b2d42"),
}


def lookup(path: Path) -> None:
    with (ROOT / "benchmarks/results/quantize.csv").open(newline="") as file:
        rows = [r for r in csv.DictReader(file) if r["data"] == "gaussian" and r["threads"] == "1"]
    figure, panel = plt.subplots(figsize=(8, 3.2))
    width = 0.8 / len(PROVIDERS)
    for i, (name, (label, colour)) in enumerate(PROVIDERS.items()):
        times = [next(float(r["p50_ms"]) for r in rows if r["provider"] == name and r["shape"] == s) for s in SHAPES]
        bars = panel.bar([x + (i - 1) * width for x in range(len(SHAPES))], times, width, label=label, color=colour)
        panel.bar_label(bars, [f"{t:.3g}" if t < 100 else f"{t:.0f}" for t in times], fontsize=8, padding=2)
    panel.set_yscale("log")
    panel.set_ylim(top=panel.get_ylim()[1] * 1.8)
    panel.set_xticks(range(len(SHAPES)), [s.replace("x", " x ") for s in SHAPES])
    panel.set(xlabel="rows x codes x width", ylabel="milliseconds, one thread")
    panel.spines[["top", "right"]].set_visible(False)
    panel.legend(frameon=False, ncol=3, loc="upper left", fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=130, metadata={"Description": f"drawn from quantize.csv, sha256 {digest('quantize.csv')}"})
    plt.close(figure)


if __name__ == "__main__":
    lookup(ROOT / "docs/images/lookup.png")
