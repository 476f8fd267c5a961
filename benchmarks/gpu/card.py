"""The card: its name, and the ceilings that the other parts' figures are held against, measured once a report."""

from __future__ import annotations

import json
import re
import statistics
from pathlib import Path
from typing import NamedTuple

import torch

from gpu.timing import rows_of, timed
from harness import Row

# 32-bit minima, comparisons and the like, per multiprocessor and clock, of compute capability 8.0 to 10.0 (CUDA C++
# programming guide, table of arithmetic throughput).
LANES = 64


class Ceilings(NamedTuple):
    read: float  # bytes a second, of a copy: read and written
    bf16: float  # operations a second of a bf16 product
    alu: float  # 32-bit operations a second, from the clock the driver names


def folder_name(device: torch.device) -> str:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "rehearsal"
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")


def ceilings(device: torch.device, out: Path, rehearse: bool) -> list[Row]:
    """Measures a large copy and a large product of random bf16 numbers, and leaves both for the other parts."""
    side, n = (256, 1 << 20) if rehearse else (8192, 1 << 30)
    source, target = torch.randint(0, 255, (2, n), dtype=torch.uint8, device=device)
    a, b = torch.randn(2, side, side, device=device).bfloat16()
    times = timed({"copy": lambda: target.copy_(source), "bf16 product": lambda: a @ b}, device, 1.5)
    copy, product = (statistics.median(t.calls) for t in times.values())
    clock, n_multiprocessors = 1e9, 1
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        n_multiprocessors = properties.multi_processor_count
        clock = getattr(properties, "clock_rate", 1_700_000) * 1e3
    found = Ceilings(2 * n / copy, 2 * side**3 / product, LANES * n_multiprocessors * clock)
    (out / "ceilings.json").write_text(json.dumps(found._asdict()))
    rows = rows_of("ceilings", f"{n} bytes", "uint8", {"copy": times["copy"]}, {}, "copy", 2.0 * n)
    return rows + rows_of(
        "ceilings", f"{side}^3", "bf16", {"bf16 product": times["bf16 product"]}, {}, "bf16 product", 2.0 * side**3
    )


def read_ceilings(out: Path) -> Ceilings:
    return Ceilings(**json.loads((out / "ceilings.json").read_text()))


def lookup_seconds(n: int, k: int, d: int, element_bytes: int, at: Ceilings) -> float:
    """The limit of an exact lookup: x read once, one 16-bit product, one and a half operations a score."""
    memory = (n * d * element_bytes + 8.0 * n) / at.read
    tensor = 2.0 * n * k * max(16, -(-d // 16) * 16) / at.bf16
    return max(memory, tensor, 1.5 * n * k / at.alu)
