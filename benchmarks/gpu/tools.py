"""The CUDA C++ kernels under NVIDIA's tools, where those are installed: compute-sanitizer, and Nsight Compute."""

from __future__ import annotations

import csv
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import torch

from gpu.checks import ROOT, run_tool
from harness import Row

LAUNCHES = [sys.executable, str(Path(__file__).parent / "launches.py")]
CHECKS = ("memcheck", "racecheck", "synccheck")
# Of the multiprocessors' and the memory's most: per cent.
COMPUTE = "sm__throughput.avg.pct_of_peak_sustained_elapsed"
MEMORY = "gpu__compute_memory_throughput.avg.pct_of_peak_sustained_elapsed"
MOST_LAUNCHES = 400  # that are profiled, each of which is run several times


def _command(device: torch.device, *more: str) -> list[str]:
    return [*LAUNCHES, "cuda" if device.type == "cuda" else "cpu", "--device", device.type, *more]


def sanitizer(device: torch.device, out: Path, rehearse: bool) -> list[Row]:
    """memcheck, racecheck and synccheck over every kernel, at small sizes."""
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        return [Row("sanitizer", "", "", 0, "compute-sanitizer", note="not installed")]
    options = ["--error-exitcode", "9"]
    return [
        run_tool(check, [tool, "--tool", check, *options, *_command(device)], out / f"{check}.log") for check in CHECKS
    ]


def profile(device: torch.device, out: Path, rehearse: bool) -> list[Row]:
    """What Nsight Compute finds that each kernel takes of both ceilings, over its launches at large sizes."""
    tool = shutil.which("ncu")
    if tool is None:
        return [Row("profile", "", "", 0, "ncu", note="not installed")]
    command = [
        tool, "--csv", "--page", "raw", "--metrics", f"{COMPUTE},{MEMORY}", "--launch-count", str(MOST_LAUNCHES),
        *_command(device, *([] if rehearse else ["--large"])),
    ]  # fmt: skip
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    (out / "profile.log").write_text(run.stdout + run.stderr)
    if run.returncode:  # counters are often kept from users: no fault of a kernel
        last = ((run.stdout + run.stderr).strip().splitlines() or [""])[-1]
        return [Row("profile", "", "", 0, "ncu", note=f"ncu failed (exit {run.returncode}): {last[:200]}")]
    return shares(run.stdout.splitlines())


def shares(lines: Iterable[str]) -> list[Row]:
    """A row a kernel from ncu's CSV, whose second line holds units and which other output surrounds."""
    table = [line for line in lines if line.startswith('"')]
    found: dict[str, list[tuple[float, float]]] = {}
    for entry in csv.DictReader(table):
        if entry.get("ID"):
            values = (float(entry[m].replace(",", "")) for m in (COMPUTE, MEMORY))
            found.setdefault(entry["Kernel Name"].split("(")[0], []).append((*values,))  # type: ignore[arg-type]
    rows = []
    for name, pairs in found.items():
        compute, memory = (max(p[i] for p in pairs) for i in (0, 1))
        rows.append(
            Row("profile", "", "", 0, name, calls=len(pairs), ceiling_share=max(compute, memory) / 100,
                note=f"at best {compute:.0f} % of compute, {memory:.0f} % of memory")
        )  # fmt: skip
    return rows
