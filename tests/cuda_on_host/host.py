"""Compiles the CUDA kernels' own source for the processor, and calls it: in this process, or under a sanitizer."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import importlib.util
import os
import shutil
import struct
import subprocess
import sysconfig
import tempfile
from pathlib import Path

import numpy as np
import pybind11
import pytest
import torch

from fastvq.backends import cuda as cuda_backend
from fastvq.backends import registry

ROOT = Path(__file__).parent.parent.parent
HERE = Path(__file__).parent
KERNELS = [p for p in sorted((ROOT / "csrc/cuda").glob("*.cu")) if p.name != "runtime.cu"]
COMMON = [
    "-std=c++17", "-fPIC", "-ffp-contract=off", "-fno-math-errno", "-Wall", "-Wextra", "-Werror",
    "-Wno-unknown-pragmas", "-DFASTVQ_ON_HOST", f"-I{HERE}",
]  # fmt: skip
FLAGS = {
    "plain": ["-O2"],
    "address": ["-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
    "thread": ["-O1", "-g", "-fsanitize=thread"],
}
SHARED_LIMIT, RESIDENT = 227 << 10, 5  # of cuda_on_host.h
SANITIZERS = ("address", "thread")


def _text_of_headers() -> bytes:
    return b"".join(p.read_bytes() for folder in (ROOT / "csrc", HERE) for p in sorted(folder.rglob("*.*h")))


def _make(name: str, command: list[str], key: bytes) -> Path:
    """``command`` writes its last argument, which is kept from run to run under the hash of what went into it."""
    digest = hashlib.sha256(key + " ".join(command).encode()).hexdigest()[:16]
    folder = Path(tempfile.gettempdir()) / f"fastvq-cuda-on-host-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    made = folder / f"{digest}-{name}"
    if not made.exists():
        draft = folder / f"{digest}-{os.getpid()}-{name}"
        run = subprocess.run([*command, "-o", str(draft)], capture_output=True, text=True)
        if run.returncode and "cannot find" in run.stderr and "san" in run.stderr:
            pytest.skip(f"this compiler has no sanitizer library: {run.stderr.splitlines()[-1]}")
        assert run.returncode == 0, run.stderr
        draft.rename(made)
    return made


@functools.cache
def _object(source: Path, kind: str, *more: str) -> Path:
    command = [_compiler(), *COMMON, *FLAGS[kind], *more, "-x", "c++", "-c", str(source)]
    return _make(f"{kind}-{source.stem}.o", command, source.read_bytes() + _text_of_headers())


def _compiler() -> str:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("g++ compiles the kernels for the processor, and there is none")
    return compiler


def _linked(name: str, kind: str, sources: list[Path], *more: str) -> Path:
    objects = [str(_object(source, kind, *more)) for source in sources]
    shared = ["-shared"] if name.endswith(".so") else []
    return _make(name, [_compiler(), *FLAGS[kind], *shared, *objects], b"")


@functools.cache
def module():
    """``fastvq._cuda`` for the processor."""
    includes = [f"-I{p}" for p in (pybind11.get_include(), sysconfig.get_paths()["include"])]
    sources = [*KERNELS, HERE / "runtime.cpp", ROOT / "csrc/bind_cuda.cpp"]
    path = _linked("_cuda.so", "plain", sources, "-fvisibility=hidden", *includes)
    spec = importlib.util.spec_from_file_location("_cuda", path)
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


def shared_limit(n_bytes: int):
    """Within the block ``module()`` has a card whose blocks get this much shared memory."""
    return _card("set_shared_limit", ctypes.c_size_t, n_bytes, SHARED_LIMIT)


def resident_blocks(n: int):
    """Within the block ``module()`` has a card that keeps n blocks of a kernel together; 0: none."""
    return _card("set_resident", ctypes.c_int64, n, RESIDENT)


@contextlib.contextmanager
def _card(name: str, kind: type, value: int, otherwise: int):
    set_value = ctypes.CDLL(module().__file__)[name]
    set_value.argtypes = [kind]
    set_value(value)
    try:
        yield
    finally:
        set_value(otherwise)


def program(name: str, kind: str) -> Path:
    """The program ``name``.cpp, built with a sanitizer; calls.cpp holds every kernel."""
    kernels = [*KERNELS, HERE / "runtime.cpp"] if name == "calls" else []
    return _linked(f"{name}-{kind}", kind, [HERE / f"{name}.cpp", *kernels])


def run(path: Path, *arguments: object) -> subprocess.CompletedProcess:
    # TSan of some compilers cannot live with as much address randomisation as some kernels make.
    command = [str(path), *map(str, arguments)]
    if (setarch := shutil.which("setarch")) and subprocess.run(
        [setarch, "-R", "true"], capture_output=True
    ).returncode == 0:
        command = [setarch, "-R", *command]
    environment = {**os.environ, "TSAN_OPTIONS": "halt_on_error=1", "UBSAN_OPTIONS": "print_stacktrace=1"}
    return subprocess.run(command, capture_output=True, text=True, env=environment)


@pytest.fixture
def cuda_on_host(monkeypatch):
    """Within the test the backend "cuda" takes CPU tensors, and its kernels run on the processor."""
    monkeypatch.setattr(cuda_backend, "_cuda", module(), raising=False)
    monkeypatch.setattr(cuda_backend, "DEVICE", "cpu")
    monkeypatch.setattr(cuda_backend, "on_device_of", lambda x: contextlib.nullcontext())
    monkeypatch.setattr(cuda_backend, "stream", lambda x: 0)
    monkeypatch.setattr(registry, "_serves", set())
    monkeypatch.setitem(registry.BACKENDS, "cuda", registry.BACKENDS["cuda"]._replace(unavailable=lambda: None))
    return "cuda"


class Calls:
    """A file of launcher calls for calls.cpp, and the buffers that come back."""

    def __init__(self) -> None:
        self._bytes = bytearray()
        self._sizes: list[list[int]] = []

    def add(self, launcher: str, buffers: list[np.ndarray], arguments: list[object]) -> None:
        """An argument is an int, a float, or ``Buffer(i)`` for the address of ``buffers[i]``."""
        self._put(len(launcher))
        self._bytes += launcher.encode()
        self._put(len(buffers))
        for b in buffers:
            self._put(b.nbytes)
            self._bytes += b.tobytes()
        self._put(len(arguments))
        for a in arguments:
            if isinstance(a, Buffer):
                self._put(2, a.index)
            elif isinstance(a, float):
                self._put(1)
                self._bytes += struct.pack("<d", a)
            else:
                self._put(0, int(a))
        self._sizes.append([b.nbytes for b in buffers])

    def _put(self, *numbers: int) -> None:
        self._bytes += struct.pack(f"<{len(numbers)}q", *numbers)

    def run(self, kind: str, folder: Path) -> list[list[bytes]]:
        (folder / "calls").write_bytes(self._bytes)
        done = run(program("calls", kind), folder / "calls", folder / "results")
        assert done.returncode == 0, done.stderr[:4000]
        data, at, results = (folder / "results").read_bytes(), 0, []
        for sizes in self._sizes:
            results.append([])
            for size in sizes:
                results[-1].append(data[at : at + size])
                at += size
        return results


class Buffer:
    def __init__(self, index: int) -> None:
        self.index = index


NOTHING = Buffer(-1)


def as_bytes(t: torch.Tensor) -> np.ndarray:
    return t.contiguous().view(torch.uint8).numpy() if t.numel() else np.empty(0, np.uint8)
