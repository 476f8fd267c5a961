"""bench_masked_conv.py, bench_sampling.py and bench_prior.py end to end, as a user starts them, on small sizes."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run(script, out, *arguments):
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, str(ROOT / "benchmarks" / script), "--out", str(out), *arguments]
    # One thread: on small tensors torch's own threads would only wait for each other.
    env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=env)
    assert done.returncode == 0, done.stderr
    return done.stdout


def rows_of(path):
    with path.open() as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("options, name", [((), "masked_conv"), (("--bf16",), "masked_conv_bf16")])
def test_masked_conv(tmp_path, options, name):
    run("bench_masked_conv.py", tmp_path, "--quick", "--seconds", "0.2", *options)
    rows = rows_of(tmp_path / f"{name}.csv")
    assert {r["case"] for r in rows} == {"forward", "forward+backward", "gated eval"}
    assert all(r["p50_ms"] and r["differing"] == "0" for r in rows if r["provider"].startswith("fastvq"))


def test_sampling(tmp_path):
    out = run(
        "bench_sampling.py", tmp_path, "--sides", "4,6", "--batch", "2", "--channels", "8", "--layers", "2",
        "--codes", "11", "--rounds", "2",
    )  # fmt: skip
    rows = rows_of(tmp_path / "sampling.csv")
    assert len(rows) == 8 and all(float(r["p50_ms"]) > 0 for r in rows)
    assert "fastvq cached" in out


def test_prior(tmp_path):
    pytest.importorskip("skimage")
    pytest.importorskip("matplotlib")
    run("bench_prior.py", tmp_path, "--seconds", "1", "--channels", "8", "--layers", "2", "--batch", "2")
    notes = [r["note"] for r in rows_of(tmp_path / "prior.csv")]
    assert len(notes) == 3 and all(n.endswith("bits") for n in notes)
    assert (tmp_path / "prior.png").stat().st_size > 1000
