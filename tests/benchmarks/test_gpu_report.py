"""gpu_report.py where there is no GPU: it says so; and rehearsed on the CPU, its parts hold together."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def report(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import gpu_report

    return gpu_report


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_it_says_so():
    run = subprocess.run([sys.executable, BENCHMARKS / "gpu_report.py"], capture_output=True, text=True, env=os.environ)
    assert run.returncode == 3
    assert "there is no GPU to report on: torch" in run.stderr and "Traceback" not in run.stderr


def test_its_parts_hold_together(report, tmp_path, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)  # the kernels have tests of their own
    device = torch.device("cpu")
    functions = report.functions()
    assert functions.keys() == report.PARTS.keys() and sum(report.PARTS.values()) <= 11 * 60
    from gpu.report import summary
    from harness import write_csv

    for name in ("ceilings", "rounding", "residual", "statistics", "training_step", "sampling", "sanitizer"):
        rows = functions[name](device, tmp_path, True)
        assert rows and not any(r.differing for r in rows if r.provider.startswith("fastvq") or r.compared == 1)
        write_csv(tmp_path / f"{name}.csv", rows)
    page = summary(tmp_path, {"ceilings": "ran, 1 s", "residual": "FAILED: why"})
    assert "| residual | FAILED: why |" in page
    assert "fastvq cpu, residual_quantize" in page and "| 256^3 |" in page


def test_a_part_that_fails_costs_the_others_nothing(report, tmp_path, monkeypatch):
    monkeypatch.setitem(report.PARTS, "residual", 60)  # without its ceilings it fails
    outcomes = report.run_all(["residual", "sanitizer"], tmp_path, rehearse=True, minutes=3)
    assert outcomes["residual"].startswith("FAILED: FileNotFoundError")
    assert outcomes["sanitizer"].startswith("ran")
    assert report.run_all(["lookup"], tmp_path, rehearse=True, minutes=0) == {
        "lookup": "left out: the 0 minutes were over"
    }
