"""benchmarks/bench_quantize.py end to end, as a user starts it, on small shapes."""

import csv
import importlib
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

import fastvq

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "benchmarks" / "bench_quantize.py"
COLUMNS = {
    "case", "shape", "data", "threads", "provider", "subset", "calls", "p20_ms", "p50_ms", "p80_ms", "gflops",
    "ceiling_gflops", "ceiling_share", "extra_mib", "differing", "compared", "ratio", "date", "machine", "versions",
    "commit",
}  # fmt: skip
# Runs the script with these packages as good as not installed.
BLOCKED = ("faiss", "vector_quantize_pytorch", "skimage", "matplotlib", "rich")
WITHOUT_PEERS = f"""
import importlib.util, runpy, sys
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name in {BLOCKED} else find_spec(name, *rest)
sys.modules.update(dict.fromkeys({BLOCKED}))  # None there makes an import fail
sys.argv = sys.argv[1:]
sys.path.insert(0, {str(SCRIPT.parent)!r})
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def run(*arguments, code=None):
    command = [sys.executable, *(["-c", code] if code else []), str(SCRIPT), *map(str, arguments)]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env={**os.environ, "PYTHONPATH": path})


@pytest.fixture
def benchmarks(monkeypatch):
    """Imports a module of benchmarks/, as its scripts do."""
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    return importlib.import_module


def rows_of(folder):
    with (folder / "quantize.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def assert_indices_compared(rows):
    for row in rows:
        assert row["compared"], f"{row['provider']} at {row['case']} did not run: {row['note']}"
        if row["provider"].startswith("fastvq"):
            assert row["differing"] == "0", row
        assert float(row["p20_ms"]) <= float(row["p50_ms"]) <= float(row["p80_ms"])


def test_quick_run_writes_table_csv_and_pictures(tmp_path, benchmarks):
    done = run("--quick", "--providers", "fastvq,cdist,addmm bf16", "--out", tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = rows_of(tmp_path)
    assert set(rows[0]) >= COLUMNS
    assert_indices_compared(rows)
    ours = {row["provider"] for row in rows if row["provider"].startswith("fastvq")}
    assert ours == {f"fastvq {isa}" for isa in fastvq.build_info()["cpu"]["available"] if isa != "emulated"}
    assert "gaussian: N 4096, K 512, D 64" in done.stdout and "Sweep over K" in done.stdout
    data = {row["data"] for row in rows}
    kinds = {"gaussian"}
    if benchmarks("harness.photographs").unavailable() is None:
        kinds |= {"photographs 4x4x3", "photographs 8x8"}
    assert data == kinds
    if importlib.util.find_spec("matplotlib"):
        pictures = ["speed.png", "roofline.png", *(["photographs.png"] if len(data) > 1 else [])]
        for name in pictures:
            assert (tmp_path / name).read_bytes().startswith(b"\x89PNG"), name


def test_runs_without_optional_packages_and_names_them(tmp_path):
    shapes = "--shapes", "257x31x7,64x17x3"
    chosen = "--providers", "fastvq,cdist,faiss,vq-pytorch"
    done = run("--quick", *shapes, *chosen, "--out", tmp_path, code=WITHOUT_PEERS)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = rows_of(tmp_path)
    assert_indices_compared(rows)
    assert {row["shape"] for row in rows} == {"257x31x7", "64x17x3"}
    assert not {"faiss", "vq-pytorch"} & {row["provider"] for row in rows}
    for name in BLOCKED:
        assert name in done.stdout, f"{name} is not named as missing"
    assert 'pip install -e ".[bench]"' in done.stdout
    assert not list(tmp_path.glob("*.png"))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--shapes", "64x8"), "'64x8': a shape is NxKxD"),
        (("--shapes", "64x0x8"), "'64x0x8': a shape is NxKxD"),
        (("--providers", "fiass"), "'fiass' is none of fastvq amx, fastvq avx512_vnni, fastvq avx512"),
        (("--threads", "0"), "'0': a number of threads is 1 or more"),
        (("--data", "photos"), "data is one of photographs, gaussian"),
        (("--quick", "--full"), "exclude each other"),
        (("--out", "/dev/null/out"), "cannot be made a folder"),
    ],
)
def test_bad_arguments_are_readable(arguments, said, benchmarks, capsys):
    with pytest.raises(SystemExit) as stopped:
        benchmarks("bench_quantize").parse(arguments)
    assert stopped.value.code == 2
    assert said in capsys.readouterr().err.replace("\n", " ")
