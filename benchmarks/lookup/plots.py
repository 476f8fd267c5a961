"""Pictures of bench_quantize.py: time against N, K and D, a roofline, photographs beside their quantized selves."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # no display is needed to write a file
import matplotlib.pyplot as plt
import numpy as np
import torch

from fastvq.ops import nearest
from harness import Row, photographs
from lookup.cases import SWEEP_CENTRE, THREADS_SHAPE, Case, photograph_codebook

COLOURS = {
    "fastvq amx": "#9b1d3a",
    "fastvq avx512": "#d1495b",
    "fastvq avx2": "#edae49",
    "fastvq generic": "#8d6b94",
    "cdist": "#00798c",
    "addmm": "#2e4057",
    "addmm bf16": "#66a182",
    "faiss": "#1f77b4",
    "vq-pytorch": "#7f7f7f",
    "cdist compiled": "#5fb8c6",
    "addmm compiled": "#7c8ba1",
}
AXIS_NAMES = {"N": "vectors N", "K": "codes K", "D": "width D", "threads": "threads"}
CROP = 256
PIXELS_PER_PATCH = 16


def colour(provider: str) -> str:
    return COLOURS.get(provider, "black")


def is_ours(provider: str) -> bool:
    return provider.startswith("fastvq")


def plot_speed(path: Path, results: Sequence[tuple[Case, Row]]) -> None:
    """Time against N, K, D and threads on log axes, one panel an axis."""
    axes_swept = [axis for axis in AXIS_NAMES if any(case.sweep == axis for case, _ in results)]
    figure, panels = plt.subplots(1, len(axes_swept), figsize=(4.6 * len(axes_swept), 4.4), sharey=True, squeeze=False)
    for axis, panel in zip(axes_swept, panels[0], strict=True):
        points: dict[str, list[tuple[int, float]]] = {}
        for case, row in results:
            if case.sweep == axis and row.p50_ms is not None:
                size = {"N": case.n_vectors, "K": case.n_codes, "D": case.dim, "threads": case.n_threads}[axis]
                points.setdefault(row.provider, []).append((size, row.p50_ms))
        for provider, line in points.items():
            ours = is_ours(provider)
            panel.plot(
                *zip(*sorted(line), strict=True),
                marker="o",
                markersize=5 if ours else 3.5,
                linewidth=2.6 if ours else 1.4,
                color=colour(provider),
                label=provider,
                zorder=3 if ours else 2,
            )
        centre = dict(zip("NKD", THREADS_SHAPE, strict=True)) if axis == "threads" else SWEEP_CENTRE
        fixed = ", ".join(f"{name} = {size}" for name, size in centre.items() if name != axis)
        panel.set(xscale="log", yscale="log", xlabel=AXIS_NAMES[axis], title=fixed)
        panel.set_xscale("log", base=2)
        panel.grid(True, which="major", color="#dddddd", linewidth=0.7)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0][0].set_ylabel("milliseconds, median")
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="upper center", ncol=len(labels), frameon=False, bbox_to_anchor=(0.5, 1.02))
    figure.tight_layout(rect=(0, 0, 1, 0.95))
    save(figure, path)


def plot_roofline(path: Path, results: Sequence[tuple[Case, Row]], bandwidth: float) -> None:
    """GFLOP/s over FLOP per byte that any implementation must move: vectors and codes in, indices out; one thread."""
    figure, panel = plt.subplots(figsize=(8.4, 5.2))
    shown = [(case, row) for case, row in results if case.sweep in ("", "K")]  # the other sweeps crowd one place
    rows = [(case, row) for case, row in shown if row.gflops is not None and row.threads == 1]
    ceilings: dict[str, list[float]] = {}
    for _, row in rows:
        if is_ours(row.provider) and row.ceiling_gflops:
            ceilings.setdefault(row.provider.split()[1], []).append(row.ceiling_gflops)
    intensities = [intensity(case) for case, _ in rows]
    span = np.geomspace(min(intensities) / 2, max(intensities) * 2, 200)
    for isa, measured in ceilings.items():
        peak = float(np.median(measured))
        line = colour(f"fastvq {isa}")
        panel.plot(
            span,
            np.minimum(peak, span * bandwidth),
            color=line,
            linewidth=1.4,
            linestyle="--",
            label=f"{isa} ceiling, {peak:.0f} GFLOP/s",
            zorder=1,
        )
    for provider in dict.fromkeys(row.provider for _, row in rows):
        points = [(intensity(case), row.gflops) for case, row in rows if row.provider == provider]
        ours = is_ours(provider)
        panel.scatter(
            *zip(*points, strict=True),
            s=46 if ours else 22,
            color=colour(provider),
            edgecolors="white",
            linewidths=0.6,
            label=provider,
            zorder=3 if ours else 2,
        )
    panel.set(
        xscale="log",
        yscale="log",
        xlabel="FLOP per byte of vectors, codes and indices",
        ylabel="GFLOP/s (2 N K D / median time)",
        title=f"One thread; ceilings measured in the same run (reads {bandwidth:.1f} GB/s)",
    )
    panel.grid(True, which="major", color="#dddddd", linewidth=0.7)
    panel.spines[["top", "right"]].set_visible(False)
    panel.legend(frameon=False, fontsize=9, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.tight_layout()
    save(figure, path)


def intensity(case: Case) -> float:
    moved = 4 * (case.n_vectors + case.n_codes) * case.dim + 8 * case.n_vectors
    return 2 * case.n_vectors * case.n_codes * case.dim / moved


def plot_photographs(path: Path, n_codes: Sequence[int], n_photographs: int = 4) -> None:
    """Photographs, and the same with every 4x4 patch replaced by the nearest of K codes."""
    shown = photographs.load()[:n_photographs]
    columns = 1 + len(n_codes)
    figure, panels = plt.subplots(
        len(shown), columns, figsize=(2.6 * columns, 2.86 * len(shown)), facecolor="white", squeeze=False
    )
    for line, photograph in zip(panels, shown, strict=True):
        pixels = detail(photograph)
        show(line[0], pixels, "24 bits per pixel")
        patches = torch.from_numpy(photographs.cut(pixels, 4))
        for panel, k in zip(line[1:], n_codes, strict=True):
            codebook = photograph_codebook("4x4x3", k)
            coded = codebook[nearest(patches, codebook)]
            picture = photographs.join(coded.numpy(), pixels.shape, 4).clip(0, 1)
            bits = math.log2(k) / PIXELS_PER_PATCH
            show(panel, picture, f"{bits:g} bits per pixel · {photographs.psnr(pixels, picture):.1f} dB")
    for panel, title in zip(panels[0], ["photograph", *(f"{k} codes" for k in n_codes)], strict=True):
        panel.set_title(title, fontsize=13, pad=8)
    figure.tight_layout(w_pad=0.4, h_pad=0.6)
    save(figure, path)


def detail(photograph: photographs.Photograph) -> np.ndarray:
    """A square of the photograph, its corner on the grid of patches."""
    height, width = photograph.pixels.shape[:2]
    middle = ((height - CROP) // 8 * 4, (width - CROP) // 8 * 4)
    top, left = photographs.CORNERS.get(photograph.name, middle)
    return np.ascontiguousarray(photograph.pixels[top : top + CROP, left : left + CROP])


def show(panel: plt.Axes, pixels: np.ndarray, caption: str) -> None:
    panel.imshow(pixels, interpolation="nearest")
    panel.set(xticks=[], yticks=[])
    panel.spines[:].set_visible(False)
    panel.set_xlabel(caption, fontsize=9, labelpad=3)


def save(figure: plt.Figure, path: Path) -> None:
    figure.savefig(path, dpi=130, bbox_inches="tight")
    plt.close(figure)
