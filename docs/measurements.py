"""The page of all measurements, from the CSV files in benchmarks/results: tables and plots, with machine and commit.

``make_pages.py`` calls ``write`` when the site is built.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # no display is needed to write a file
import matplotlib.pyplot as plt

from results import H100, Result, mib, ms, percent, rows, times

__all__ = ["write"]

OURS, THEIRS = "#d1495b", "#8d99ae"
FILES = {  # file: title, and what stands in it
    "quantize.csv": ("Lookups, Ice Lake", "`bench_quantize.py`: `fastvq.ops.nearest` against torch and faiss."),
    "quantize_zen4.csv": ("Lookups, Zen 4", "The same on a Zen 4 EPYC, with every size varied alone."),
    "quantize_amx.csv": ("Lookups, Emerald Rapids", "The same on a processor with AMX, other work on its other cores."),
    "train_step.csv": (
        "Training steps, Ice Lake",
        "`bench_train_step.py`: forward, backward, update.",
    ),
    "train_step_amx.csv": ("Training steps, Emerald Rapids", "The same on a processor with AMX."),
    "ema.csv": (
        "Statistics, Ice Lake",
        "`bench_ema.py`: `fastvq.ops.code_statistics`. `read` is one read of x: a limit.",
    ),
    "masked_conv.csv": ("Masked convolutions, Ice Lake", "`bench_masked_conv.py`, float32."),
    "masked_conv_amx.csv": ("Masked convolutions, Emerald Rapids", "`bench_masked_conv.py --bf16`."),
    "sampling.csv": ("Sampling, Ice Lake", "`bench_sampling.py`: `PixelCNN.sample`."),
    "drop_in.csv": ("Patched quantizers, Ice Lake", "`bench_drop_in.py`: before and after `fastvq.patch`."),
    f"{H100}lookup.csv": ("Lookups, H100", "`gpu_report.py`."),
    f"{H100}residual.csv": ("Residual quantizers, H100", "`gpu_report.py`."),
    f"{H100}statistics.csv": ("Statistics, H100", "`gpu_report.py`. `read` is one read of x: a limit."),
    f"{H100}training_step.csv": ("Training steps, H100", "`gpu_report.py`, launch by launch."),
    f"{H100}sampling.csv": ("Sampling, H100", "`gpu_report.py`."),
}
COLUMNS = "| case | data | who | ms | 20 % to 80 % | of the limit | MiB | indices that differ | time over fastvq's |"


def write(folder: Path) -> None:
    lines: list[str] = []
    for file, (title, about) in FILES.items():
        found = rows(file)
        lines += [f"## {title}", "", f"{about} [{Path(file).name}](../benchmarks/results/{file})", ""]
        lines += [f"- {origin}" for origin in dict.fromkeys(map(_origin, found))]
        name = Path(file).with_suffix(".png").as_posix().replace("/", "_")
        if _plot(found, folder / name):
            lines += ["", f"![Times of the peers over fastvq's, a bar each: {title}](generated/{name})", ""]
            lines += [f"*{title}: how many times longer each takes than fastvq, on a logarithmic axis.*"]
        lines += ["", "{.compact}", COLUMNS, "|" + "---|" * 9]
        lines += ["| " + " | ".join(_cells(row)) + " |" for row in found]
        lines.append("")
    (folder / "measurements.md").write_text("\n".join(lines))


def _origin(row: Result) -> str:
    return f"{row['machine']}; {row['versions']}; commit {row['commit']}; {row['date'][:10]}"


def _cells(row: Result) -> tuple[str, ...]:
    timed, scaled = bool(row["p50_ms"]), "~" if float(row["subset"] or 1) < 1 else ""
    threads = {"0": "", "1": ", 1 thread"}.get(row["threads"], f", {row['threads']} threads")
    return (
        ("" if "N " in row["case"] else f"{row['case']}, ") + row["shape"] + threads,
        row["data"],
        row["provider"],
        scaled + ms(row) if timed else "-",
        f"{ms(row, 'p20_ms')} to {ms(row, 'p80_ms')}" if timed else "-",
        percent(row) if row["ceiling_share"] else "-",
        mib(row) if row["extra_mib"] else "-",
        f"{row['differing']} of {row['compared']}" if row["compared"] else "-",
        times(row) if row["ratio"] else "-",
    )


def _plot(found: Sequence[Result], path: Path) -> bool:
    """A bar a competitor, the cases one below the other; at most the first eight cases."""
    peers = [r for r in found if r["ratio"] and not r["provider"].startswith("fastvq") and r["provider"] != "after"]
    shown = [
        (case, list(group))
        for case, group in groupby(peers, key=lambda r: (r["case"], r["shape"], r["data"], r["threads"]))
    ]
    shown = shown[: max(8, sum(1 for _, group in shown if len(group) == 1))]
    bars = [(key, row) for key, group in shown for row in group]
    if not bars:
        return False
    figure, panel = plt.subplots(figsize=(8, 0.8 + 0.24 * len(bars)))
    ratios = [float(row["ratio"]) for _, row in bars]
    drawn = panel.barh(range(len(bars)), ratios, color=[OURS if v >= 1 else THEIRS for v in ratios])
    panel.bar_label(drawn, [f"{v:.3g}" for v in ratios], fontsize=8, padding=2)
    panel.set_yticks(range(len(bars)), [_label(key, row) for key, row in bars], fontsize=8)
    panel.axvline(1, color="black", lw=1)
    panel.set(xscale="log", xlim=(min(*ratios, 0.9) / 1.3, max(*ratios, 1.1) * 1.8), xlabel="time over fastvq's")
    panel.spines[["top", "right"]].set_visible(False)
    panel.invert_yaxis()
    figure.tight_layout()
    figure.savefig(path, dpi=90)
    plt.close(figure)
    return True


def _label(key: tuple[str, ...], row: Result) -> str:
    case, shape, data, _ = key
    parts = [case if row["provider"] == "before" else row["provider"], shape]
    if row["provider"] != "before" and "N " not in case:
        parts.insert(1, case)
    if data.lower() not in ("gaussian", "gaussian bfloat16"):
        parts.append(data)
    return ", ".join(parts)
