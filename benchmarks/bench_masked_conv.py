"""Masked convolution against torch's ways to do it: forward, forward and backward, and gated.

    python benchmarks/bench_masked_conv.py

Results are compared with float64 first, within the bound that float32 sums obey; then the times of all are taken side
by side. Writes masked_conv.csv and masked_conv.png to ./out (--out DIR).

- dense: conv2d with the masked weight; dense channels-last: the same, everything channels-last;
- cropped: two convolutions, rows above and the row itself, each with nothing masked in it; cropped channels-last;
- one crop: one convolution with the rows from the centre's down cut off, which wastes the taps to the right only.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from conv.masked import CASES, PASSES, PLAIN_WAYS, PROVIDERS, QUICK, measure
from harness import Progress, Row, print_table, write_csv
from harness.machine import commit, describe_machine, describe_versions


def plot(path: Path, rows: Sequence[Row]) -> None:
    import matplotlib

    matplotlib.use("Agg")  # no display is needed to write a file
    import matplotlib.pyplot as plt

    kinds = list(dict.fromkeys(r.case for r in rows))
    figure, panels = plt.subplots(1, len(kinds), figsize=(5 * len(kinds), 5), squeeze=False)
    for kind, panel in zip(kinds, panels[0], strict=True):
        for name, _, last in PROVIDERS:
            line = [(r.shape, r.p50_ms) for r in rows if r.case == kind and r.provider == name and r.p50_ms]
            if line:
                mine = name.startswith("fastvq")
                panel.plot(*zip(*line, strict=True), marker="o", lw=2.6 if mine else 1.3, ls="--" if last else "-",
                           color="#d1495b" if mine else None, label=name)  # fmt: skip
        panel.set(yscale="log", title=kind, ylabel="milliseconds, median")
        for label in panel.get_xticklabels():
            label.set(rotation=30, ha="right")
        panel.grid(True, which="both", axis="y", color="#dddddd", linewidth=0.7)
    panels[0][0].legend(frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="masked convolution against torch's ways to do it")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=6.0, help="of timing a case and pass; default: 6")
    parser.add_argument("--quick", action="store_true", help="one small case")
    parser.add_argument("--bf16", action="store_true", help="all tensors in bfloat16 rather than float32")
    parser.add_argument("--out", type=Path, default=Path("out"), metavar="DIR", help="default: ./out")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    print(f"{describe_machine()}\n{describe_versions()}; commit {commit()}\n", flush=True)
    dtype = torch.bfloat16 if options.bf16 else torch.float32
    cases = [case._replace(dtype=dtype) for case in (QUICK if options.quick else CASES)]
    rows: list[Row] = []
    with Progress(len(cases) * len(PASSES)) as progress:
        for case in cases:
            for kind in PASSES:
                progress.step(f"{case.shape}, {kind}")
                found = measure(case, kind, options.threads, options.seconds)
                rows += found
                print_table(f"{case.shape}, {kind}", found)
                plain = min((r.ratio for r in found if r.provider in PLAIN_WAYS and r.ratio), default=0.0)
                every = min((r.ratio for r in found if not r.provider.startswith("fastvq") and r.ratio), default=0.0)
                print(f"best of dense, dense channels-last, cropped: {plain:.2f}x; of all: {every:.2f}x\n", flush=True)
    name = "masked_conv_bf16" if options.bf16 else "masked_conv"
    write_csv(options.out / f"{name}.csv", rows)
    if importlib.util.find_spec("matplotlib"):
        plot(options.out / f"{name}.png", rows)
    wrong = [r for r in rows if r.note]
    for row in wrong:
        print(f"WRONG: {row.provider} at {row.shape}, {row.case}: {row.note}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
