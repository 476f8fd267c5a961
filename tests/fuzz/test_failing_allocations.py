"""Every allocation of the CPU kernels fails once: a MemoryError each time, and the next call is right."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fastvq.backends import cpu as cpu_backend

HERE = Path(__file__).parent
COMPILER = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)


@pytest.mark.skipif(sys.platform != "linux", reason="replaces the allocator with LD_PRELOAD, which is Linux's")
@pytest.mark.skipif("san.so" in os.environ.get("LD_PRELOAD", ""), reason="a sanitizer has replaced the allocator")
@pytest.mark.skipif(COMPILER is None, reason="compiles a small C library, and there is no cc, gcc or clang")
@pytest.mark.skipif(cpu_backend.unavailable() is not None, reason=f"{cpu_backend.unavailable()}")
def test_failing_allocations(tmp_path):
    library = tmp_path / "failing_allocator.so"
    source = HERE / "failing_allocator.c"
    subprocess.run([COMPILER, "-O2", "-shared", "-fPIC", source, "-o", library, "-ldl", "-pthread"], check=True)
    done = subprocess.run(
        [sys.executable, "-m", "tests.fuzz.failing_allocations", library],
        env=os.environ | {"LD_PRELOAD": str(library), "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        cwd=HERE.parents[1], capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    tail = "\n".join([*done.stdout.splitlines()[-3:], *done.stderr.splitlines()[-15:]])
    assert done.returncode == 0, f"exit status {done.returncode}, last lines:\n{tail}"
    print(tail)
    raised = int(done.stdout.splitlines()[-2].split()[0])
    assert raised >= 200, tail
    assert "functions that no call reaches: []" in done.stdout, tail
