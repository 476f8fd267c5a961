"""How threads share work (csrc/cpu/common/parallel.h), in a program of its own: a fault there ends the process."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def compile_program(name: str, folder: Path, *flags: str) -> Path:
    compiler = os.environ.get("CXX") or next(filter(shutil.which, ("c++", "g++", "clang++")), None)
    if compiler is None:
        pytest.skip("no C++ compiler on this machine")
    program = folder / name
    sources = [str(HERE / f"{name}.cpp"), str(HERE.parent.parent / "csrc/cpu/common/checkpoint.cpp")]
    options = ["-std=c++17", "-O1", "-pthread", *flags, "-o", str(program)]
    done = subprocess.run([*compiler.split(), *sources, *options], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return program


def test_an_allocation_that_fails_joins_every_thread_and_raises(tmp_path):
    # Threads, their list and the work itself allocate: any of them may be the one that fails.
    done = subprocess.run([compile_program("parallel", tmp_path)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, (done.returncode, done.stdout, done.stderr)


def test_a_call_is_left_between_chunks_and_inside_of_long_ones_unless_it_must_be_whole(tmp_path):
    done = subprocess.run([compile_program("interrupt", tmp_path)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.returncode
