"""Everything that only a GPU can tell, in one command: correctness, ceilings, every op against its peers.

    python benchmarks/gpu_report.py [--parts lookup,statistics] [--sanitize] [--minutes 8] [--out DIR]

Needs no network: what is missing of the peers is left out and named. Each part runs in a process of its own, so a part
that fails, or hangs, costs the others nothing. Writes one CSV a part, ratios.png and summary.md to
benchmarks/results/<card>/. Exit code 0: every part ran and nothing was wrong; 1: a part failed or a result was wrong;
3: there is no GPU.

--sanitize adds what takes longer: compute-sanitizer over every CUDA C++ kernel, and what Nsight Compute says that each
achieves, where these tools are installed.

--rehearse goes through the same steps on the CPU, tiny sizes, to see that they hold together; its times mean nothing.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results"
# Seconds each part may take; together less than the eight minutes.
PARTS = {
    "ceilings": 40, "rounding": 30, "tests": 150, "lookup": 110, "residual": 40, "statistics": 40,
    "training_step": 30, "masked_conv": 60, "sampling": 50,
}  # fmt: skip
TOOLS = {"sanitizer": 500, "profile": 300}  # those of --sanitize, after the others
MINUTES, MINUTES_WITH_TOOLS = 8.0, 22.0
NO_GPU = 3


def functions():  # type: ignore[no-untyped-def]
    """The parts' functions. Imported in the process that runs a part: some of them start CUDA."""
    from gpu import card, checks, convolution, learning, lookup, tools

    return {
        "ceilings": card.ceilings, "rounding": checks.rounding, "tests": checks.tests, "lookup": lookup.lookups,
        "residual": lookup.residuals, "statistics": learning.statistics, "training_step": learning.training_step,
        "masked_conv": convolution.convolutions, "sampling": convolution.sampling, "sanitizer": tools.sanitizer,
        "profile": tools.profile,
    }  # fmt: skip


def run_part(name: str, out: Path, rehearse: bool) -> int:
    import torch

    from harness import print_table, write_csv

    device = torch.device("cpu") if rehearse else torch.device("cuda", 0)
    rows = functions()[name](device, out, rehearse)
    write_csv(out / f"{name}.csv", rows)
    print_table(name, rows)
    ours_wrong = [r for r in rows if r.differing and (r.provider.startswith("fastvq") or r.compared == 1)]
    return 1 if ours_wrong else 0


def run_all(names: Sequence[str], out: Path, rehearse: bool, minutes: float) -> dict[str, str]:
    """Outcome of each part, in words."""
    end = time.monotonic() + 60 * minutes
    outcomes = {}
    for name in names:
        allowed = min((PARTS | TOOLS)[name] * 1.5, end - time.monotonic())
        if allowed < 5:
            outcomes[name] = f"left out: the {minutes:g} minutes were over"
            continue
        command = [sys.executable, __file__, "--part", name, "--out", str(out), *(["--rehearse"] if rehearse else [])]
        start = time.monotonic()
        # A group of its own: what a part has started goes with it when its time is over.
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
        ) as run:
            try:
                output, errors = run.communicate(timeout=allowed)
            except subprocess.TimeoutExpired:
                os.killpg(run.pid, signal.SIGKILL)
                outcomes[name] = f"FAILED: not done after {allowed:.0f} s"
                continue
            finally:
                print(f"{name}: {time.monotonic() - start:.0f} s", flush=True)
        print(output, flush=True)
        if run.returncode:
            print(errors[-4000:], file=sys.stderr, flush=True)
            last = (errors.strip().splitlines() or ["a result of fastvq's was wrong; see its table"])[-1]
            outcomes[name] = f"FAILED: {last[:200]}"
        else:
            outcomes[name] = f"ran, {time.monotonic() - start:.0f} s"
    return outcomes


def missing_gpu() -> str | None:
    if importlib.util.find_spec("torch") is None:
        return "torch is not installed"
    import torch

    return None if torch.cuda.is_available() else f"torch {torch.__version__} sees no GPU"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", help=f"by commas; default: {','.join(PARTS)}")
    parser.add_argument("--sanitize", action="store_true", help=f"adds {' and '.join(TOOLS)}")
    parser.add_argument(
        "--minutes", type=float, help=f"at most; default: {MINUTES:g}, or {MINUTES_WITH_TOOLS:g} with --sanitize"
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="default: benchmarks/results/<card>")
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, tiny sizes, to see that it holds together")
    parser.add_argument("--part", choices=PARTS | TOOLS, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    wanted = set(options.parts.split(",")) if options.parts else set(PARTS)
    if options.sanitize:
        wanted |= TOOLS.keys()
    if unknown := wanted - (PARTS | TOOLS).keys():
        parser.error(f"--parts must be some of {', '.join(PARTS | TOOLS)}, got {', '.join(sorted(unknown))}")
    minutes = options.minutes or (MINUTES_WITH_TOOLS if wanted & TOOLS.keys() else MINUTES)
    if options.part:
        return run_part(options.part, options.out, options.rehearse)
    missing = None if options.rehearse else missing_gpu()
    if missing:
        print(f"gpu_report: there is no GPU to report on: {missing}", file=sys.stderr)
        return NO_GPU
    if importlib.util.find_spec("fastvq") is None:
        install = [sys.executable, "-m", "pip", "install", "-q", "--no-build-isolation", "--no-deps", "-e", str(ROOT)]
        subprocess.run(install, check=True)
    import torch

    from gpu.card import folder_name
    from gpu.report import plot, summary

    device = torch.device("cpu") if options.rehearse else torch.device("cuda", 0)
    out = options.out or RESULTS / folder_name(device)
    out.mkdir(parents=True, exist_ok=True)
    names = [name for name in PARTS | TOOLS if name in wanted]
    if "ceilings" not in names and not (out / "ceilings.json").exists():
        names.insert(0, "ceilings")  # the others are held against it
    outcomes = run_all(names, out, options.rehearse, minutes)
    plot(out, names)
    page = summary(out, outcomes)
    (out / "summary.md").write_text(page)
    print(page)
    return int(any(outcome.startswith("FAILED") for outcome in outcomes.values()))


if __name__ == "__main__":
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # kernels that must not fuse say so themselves
    sys.exit(main())
