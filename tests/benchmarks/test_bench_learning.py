"""benchmarks/bench_ema.py and bench_train_step.py end to end, on small shapes."""

import csv
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name,providers", [("ema", 5), ("train_step", 5)])
def test_quick(name, providers, tmp_path):
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    run = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / f"bench_{name}.py"), "--quick", "--out", str(tmp_path)],
        capture_output=True, text=True, timeout=180, env={**os.environ, "PYTHONPATH": path},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    with (tmp_path / f"{name}.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len({row["provider"] for row in rows}) >= providers
    for row in rows:
        if row["provider"].startswith("fastvq"):
            assert row["differing"] == "0" and float(row["p50_ms"]) > 0
            assert "WRONG" not in row["note"]
    assert (tmp_path / f"{name}.png").exists() == bool(importlib.util.find_spec("matplotlib"))


def test_quick_and_full_exclude_each_other():
    run = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "bench_ema.py"), "--quick", "--full"], capture_output=True, text=True
    )
    assert run.returncode == 2 and "exclude each other" in run.stderr
