"""What only a card can tell of correctness: the tests marked needs_gpu, the tensor cores' rounding."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import torch

from harness import Row

ROOT = Path(__file__).parent.parent.parent
TAIL = 8000  # characters of a failed run that are kept
MOST_PROCESSES = 10  # side by side: each has a context of its own on the card


def tests(device: torch.device, out: Path, rehearse: bool) -> list[Row]:
    """pytest over every test that runs on a card; a rehearsal only collects them."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "needs_gpu", "-p", "no:cacheprovider", "tests"]
    if importlib.util.find_spec("xdist") is not None:  # most of the time is compiling, a kernel after another
        command += ["-n", str(min(MOST_PROCESSES, os.cpu_count() or 1)), "--dist", "worksteal"]
    return [run_tool("tests on the card", [*command, *(["--collect-only"] if rehearse else [])], out / "tests.log")]


def run_tool(name: str, command: list[str], log: Path) -> Row:
    """A row that says how a command ended and what it said last; its output goes to ``log``."""
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    log.write_text((run.stdout + run.stderr)[-TAIL:])
    lines = [line for line in run.stdout.splitlines() if line.strip()]
    # 5: pytest found nothing to run
    note = (lines[-1] if lines else "") + ("" if run.returncode in (0, 5) else f" (exit {run.returncode})")
    return Row(
        name, "", "", 0, Path(command[0]).name, differing=int(run.returncode not in (0, 5)), compared=1, note=note
    )


def rounding(device: torch.device, out: Path, rehearse: bool) -> list[Row]:
    """Error of a 16-bit product with float32 sums, over the bound of the index contract: must stay below 1.

    The bound is gamma |x| |c| with gamma = (1.25 D16 + 16) 2^-23, D16 = D rounded up to 16.
    """
    rows = []
    for dtype in (torch.float16, torch.bfloat16):
        for d in (16, 64, 256, 1024):
            n = 64 if rehearse else 2048
            g = torch.Generator(device).manual_seed(d)
            worst = 0.0
            for kind in ("gaussian", "positive", "cancelling"):
                x, c = (torch.randn(n, d, generator=g, device=device) for _ in range(2))
                if kind == "positive":
                    x, c = x.abs(), c.abs()
                elif kind == "cancelling":  # large terms that take each other away, and small ones that are left
                    x[:, 1::2], c[:, 1::2] = x[:, ::2], -c[:, ::2] * (1 + 2**-6)
                x, c = x.to(dtype), c.to(dtype)
                exact = x.double() @ c.double().t()
                bound = (1.25 * d + 16) * 2**-23 * (x.double().norm(dim=1)[:, None] * c.double().norm(dim=1))
                got = product(x, c)
                worst = max(worst, float(((got.double() - exact).abs() / bound).max()))
            rows.append(
                Row("rounding of the tensor cores", f"{n}x{n}x{d}", str(dtype).removeprefix("torch."), 0, "tl.dot",
                    differing=int(worst > 1), compared=1, note=f"largest error over the bound: {worst:.3g}")
            )  # fmt: skip
    return rows


def product(x: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    """x c^T with float32 sums, by the instruction that the kernels use."""
    if x.device.type == "cuda":
        from gpu.product import product as on_tensor_cores

        return on_tensor_cores(x, c)
    return x.float() @ c.float().t()
