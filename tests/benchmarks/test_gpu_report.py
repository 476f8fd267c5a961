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
    assert functions.keys() == (report.PARTS | report.TOOLS).keys() and sum(report.PARTS.values()) <= 10 * 60
    from gpu.report import summary
    from harness import write_csv

    for name in ("ceilings", "rounding", "residual", "statistics", "training_step", "sampling"):
        rows = functions[name](device, tmp_path, True)
        assert rows and not any(r.differing for r in rows if r.provider.startswith("fastvq") or r.compared == 1)
        write_csv(tmp_path / f"{name}.csv", rows)
    page = summary(tmp_path, {"ceilings": "ran, 1 s", "residual": "FAILED: why"})
    assert "| residual | FAILED: why |" in page
    assert "fastvq cpu, residual_quantize" in page and "| 256^3 |" in page


def test_a_part_that_fails_costs_the_others_nothing(report, tmp_path, monkeypatch):
    monkeypatch.setitem(report.PARTS, "residual", 60)  # without its ceilings it fails
    monkeypatch.setenv("PATH", str(tmp_path))
    outcomes = report.run_all(["residual", "sanitizer"], tmp_path, rehearse=True, minutes=3)
    assert outcomes["residual"].startswith("FAILED: FileNotFoundError")
    assert outcomes["sanitizer"].startswith("ran")
    assert report.run_all(["lookup"], tmp_path, rehearse=True, minutes=0) == {
        "lookup": "left out: the 0 minutes were over"
    }


CSV = """==PROF== Connected to process 1
"ID","Process ID","Kernel Name","gpu__compute_memory_throughput.avg.pct_of_peak_sustained_elapsed",\
"sm__throughput.avg.pct_of_peak_sustained_elapsed"
"","","","%","%"
"0","1","void lookup_kernel<1>(Call)","20.5","70.0"
"1","1","void lookup_kernel<1>(Call)","30","61.5"
"2","1","pack(Codes)","88","3"
==PROF== Disconnected
""".replace("\\\n", "")
# In the place of compute-sanitizer: leaves out its options, runs the command, and says what it would say.
SANITIZER = """#!{python}
import subprocess, sys
run = subprocess.run(sys.argv[sys.argv.index({python!r}):], capture_output=True, text=True)
print(run.stdout + run.stderr + "ERROR SUMMARY: 0 errors")
sys.exit(run.returncode)
"""


def test_tools_are_given_every_launch(report, tmp_path, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    for name, text in (
        ("compute-sanitizer", SANITIZER.format(python=sys.executable)),
        ("ncu", f"#!/bin/sh\necho '{CSV}'"),
    ):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    from gpu import tools

    monkeypatch.setattr(tools, "CHECKS", ("memcheck",))
    rows = tools.sanitizer(torch.device("cpu"), tmp_path, True)
    assert [(r.case, r.differing, r.note) for r in rows] == [("memcheck", 0, "ERROR SUMMARY: 0 errors")]
    # The CPU's convolutions take float32 alone, and say so.
    assert (tmp_path / "memcheck.log").read_text().startswith("5 of 6 ran; refused: masked_conv2d (")
    rows = tools.profile(torch.device("cpu"), tmp_path, True)
    assert [(r.provider, r.calls, r.ceiling_share, r.note) for r in rows] == [
        ("void lookup_kernel<1>", 2, 0.7, "at best 70 % of compute, 30 % of memory"),
        ("pack", 1, 0.88, "at best 3 % of compute, 88 % of memory"),
    ]


def test_tools_that_fail_or_are_not_there_say_so(report, tmp_path, monkeypatch):
    from gpu import tools

    monkeypatch.setenv("PATH", str(tmp_path))
    device = torch.device("cpu")
    assert [r.note for part in (tools.sanitizer, tools.profile) for r in part(device, tmp_path, True)] == 2 * [
        "not installed"
    ]
    for name in ("compute-sanitizer", "ncu"):
        (tmp_path / name).write_text("#!/bin/sh\necho no permission\nexit 9\n")
        (tmp_path / name).chmod(0o755)
    found = tools.sanitizer(device, tmp_path, True)
    assert len(found) == 3 and all(r.differing == 1 and r.note == "no permission (exit 9)" for r in found)
    (row,) = tools.profile(device, tmp_path, True)
    assert row.differing is None and row.note == "ncu failed (exit 9): no permission"
