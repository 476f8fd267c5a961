"""This installation in words: what ``fastvq info`` prints with the base packages alone, without the extra [models]."""

from __future__ import annotations

import json
import sys
from typing import Any

import fastvq
from fastvq import _verify as verification
from fastvq.cli.machine import machine

__all__ = ["described", "run", "verify"]

USAGE = "usage: fastvq info [--verify], fastvq --version"


def described() -> dict[str, Any]:
    """Version, machine and build, as JSON can hold them: what a report of a fault needs."""
    return {"version": fastvq.__version__, "machine": machine(), "build": fastvq.build_info()}


def verify() -> int:
    """Prints one line for each backend and instruction set, and a verdict. Exit status: 1 if an index is wrong."""
    verdicts, missing = verification.verify()
    for v in verdicts:
        found = f"{v.indices:,} indices as recorded" if v.fault is None else f"WRONG: {v.fault}"
        print(f"{v.what}: {found} ({v.seconds:.1f} s)", flush=True)
    for name, reason in missing.items():
        print(f"{name}: not verified, it cannot run here: {reason}")
    faults = sum(v.fault is not None for v in verdicts)
    if faults:
        print(f"verdict: {faults} of {len(verdicts)} ways to look up are wrong on this machine; please report this")
        return 1
    print("verdict: every index is the recorded one")
    return 0


def run(arguments: list[str], missing: str) -> int:
    """The command where the package ``missing`` is not installed. Returns the exit status."""
    if arguments == ["--version"]:
        print(fastvq.__version__)
        return 0
    if arguments == ["info"]:
        print(json.dumps(described(), indent=2, default=str))
        return 0
    if arguments == ["info", "--verify"]:
        return verify()
    print(
        f'fastvq: this command needs {missing}: pip install "fastvq-kernels[models]"; without it: {USAGE}',
        file=sys.stderr,
    )
    return 2
