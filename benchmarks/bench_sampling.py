"""Sampling from a PixelCNN: every position once, against recomputing.

    python benchmarks/bench_sampling.py

- one forward: the network over the whole map once, the limit that sampling is compared with;
- cached: PixelCNN.sample(cached=True), the whole map;
- full recompute: the network over the whole map for every position, timed at some positions and scaled;
- rows recompute: for every position only the rows that it needs (its own and the receptive field above), likewise.

The cached samples are compared with cached=False on a small map first. Writes sampling.csv and sampling.png, time
against the side of the map, to ./out (--out DIR).
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from conv.sampling import measure, samples_agree
from fastvq.models import PixelCNN
from harness import Progress, Row, print_table, write_csv
from harness.machine import commit, describe_machine, describe_versions


def plot(path: Path, rows: Sequence[Row]) -> None:
    import matplotlib

    matplotlib.use("Agg")  # no display is needed to write a file
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4.5))
    for name in dict.fromkeys(r.provider for r in rows):
        line = [(int(r.shape.split("x")[1]), (r.p50_ms or 0) / 1e3) for r in rows if r.provider == name]
        mine = name.startswith("fastvq")
        axes.plot(*zip(*line, strict=True), marker="o", lw=2.6 if mine else 1.4, label=name,
                  color="#d1495b" if mine else None)  # fmt: skip
    axes.set_xscale("log", base=2)
    axes.set(yscale="log", xlabel="side of the map", ylabel="seconds for the whole batch, median")
    axes.grid(True, which="major", color="#dddddd", linewidth=0.7)
    axes.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="sampling from a PixelCNN, every position once, against recomputing")
    parser.add_argument("--sides", default="8,16,32", help="of the maps, with commas; default: 8,16,32")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--channels", type=int, default=128)
    parser.add_argument("--layers", type=int, default=15)
    parser.add_argument("--codes", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("out"), metavar="DIR", help="default: ./out")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    print(f"{describe_machine()}\n{describe_versions()}; commit {commit()}\n", flush=True)
    torch.manual_seed(0)
    model = PixelCNN(options.codes, options.channels, options.layers).eval()
    sides = [int(side) for side in options.sides.split(",")]
    if not samples_agree(model):
        print("WRONG: cached and uncached samples differ", file=sys.stderr)
        return 1
    rows: list[Row] = []
    with Progress(len(sides)) as progress:
        for side in sides:
            progress.step(f"{side} x {side}")
            found = measure(model, options.batch, side, options.rounds, options.threads)
            rows += found
            size = f"{options.layers} layers, {options.channels} channels"
            print_table(f"{options.batch} maps of {side} x {side}, {size} (recompute: scaled from 3 positions)", found)
    write_csv(options.out / "sampling.csv", rows)
    if importlib.util.find_spec("matplotlib"):
        plot(options.out / "sampling.png", rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
