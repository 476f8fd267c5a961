"""build_info, and what a build that went wrong says."""

import os
import platform
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

import fastvq
from fastvq import _env
from fastvq._env import VARIABLES
from fastvq.backends import cpu as cpu_backend
from fastvq.backends import cuda as cuda_backend
from fastvq.backends import registry
from fastvq.backends import triton as triton_backend

ROOT = Path(__file__).parent.parent


def test_build_info(monkeypatch):
    info = fastvq.build_info()
    assert info["version"] == fastvq.__version__ and info["torch"] == torch.__version__
    assert info["cpu"]["available"][0] == "generic" and info["cpu"]["isa"] == info["cpu"]["available"][-1]
    assert re.match(r"gcc|clang", info["cpu"]["compiler"])
    assert info["backends"]["cpu"] == {**info["backends"]["cpu"], "available": True, "reason": None}
    monkeypatch.setenv("FASTVQ_CPU_ISA", "generic")
    assert fastvq.build_info()["cpu"]["isa"] == "generic"


def test_build_info_without_the_extension(monkeypatch):
    monkeypatch.setattr(cpu_backend, "_import_error", "cannot be loaded (no such file)")
    monkeypatch.setattr(registry, "_serves", set())
    info = fastvq.build_info()
    assert info["cpu"] == {"compiler": None, "available": [], "isa": None, "amx": info["backends"]["cpu"]["reason"]}
    assert not info["backends"]["cpu"]["available"] and "no such file" in info["backends"]["cpu"]["reason"]
    x, codebook = torch.randn(5, 3), torch.randn(7, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert fastvq.ops.nearest(x, codebook).shape == (5,)  # the reference serves, or Triton's interpreter
    try:
        fastvq.ops.nearest(x, codebook, backend="cpu")
    except ValueError as error:
        assert "fastvq._cpu cannot be loaded (no such file); this is the source folder" in str(error)
    else:
        raise AssertionError("a named backend fell back")


@pytest.mark.parametrize("raw", [_env._RAW, None])
def test_a_variable_is_read_at_every_call(raw, monkeypatch):
    monkeypatch.setattr(_env, "_RAW", raw)
    monkeypatch.delenv("FASTVQ_CHECK", raising=False)
    assert _env.read("FASTVQ_CHECK") is None
    for value, expected in (("1", "1"), ("", None), ("2", "2")):
        monkeypatch.setenv("FASTVQ_CHECK", value)
        assert _env.read("FASTVQ_CHECK") == expected
    monkeypatch.delenv("FASTVQ_CHECK")
    assert _env.read("FASTVQ_CHECK") is None


def test_every_variable_is_in_the_docs():
    page = (ROOT / "docs" / "backends.md").read_text()
    assert [name for name in VARIABLES if name not in page] == []


def test_no_other_variable_is_read():
    named = set()
    for path in [ROOT / "setup.py", *(ROOT / "fastvq").rglob("*.py")]:
        named |= set(re.findall(r"\bFASTVQ_[A-Z_]+\b", path.read_text()))
    assert named == set(VARIABLES)


def test_build_info_without_the_cuda_extension(monkeypatch):
    monkeypatch.setattr(cuda_backend, "_import_error", "cannot be loaded (no such file)")
    info = fastvq.build_info()
    assert info["cuda"] == {"compiler": None, "architectures": []}
    reason = info["backends"]["cuda"]["reason"]
    assert "(no such file)" in reason and "FASTVQ_CUDA=1" in reason


@pytest.mark.skipif(not cuda_backend.built() or torch.cuda.is_available(), reason="a build with nvcc, no GPU")
def test_the_cuda_extension_without_a_driver_says_so():
    info = fastvq.build_info()
    assert info["cuda"]["compiler"].startswith("nvcc") and "sm_80" in info["cuda"]["architectures"]
    assert "CUDA error 35" in info["backends"]["cuda"]["reason"]
    x, ids = torch.randn(5, 3), torch.zeros(5, dtype=torch.int64)
    image, weight = torch.randn(1, 3, 4, 4), torch.randn(6, 3, 3, 3)
    codebook, size = torch.randn(7, 3), torch.ones(7)
    shapes = [(7, 3), (6, 3, 1, 1), (6,), (6, 3, 1, 1), (6,), (6, 3, 1, 1), (6,), (3, 3, 1, 1), (3,)]
    sampler = [torch.randn(s) for s in [*shapes, (3, 3, 1, 1), (3,), (7, 3, 1, 1), (7,)]]
    for call in (
        lambda: fastvq.ops.nearest(x, codebook, backend="cuda"),
        lambda: fastvq.ops.code_statistics(x, ids, 7, backend="cuda"),
        lambda: fastvq.ops.ema_update_(
            codebook, codebook.clone(), size, codebook.clone(), ids.new_zeros(7), decay=0.5, backend="cuda"
        ),
        lambda: fastvq.ops.masked_conv2d(image, weight, backend="cuda"),
        lambda: fastvq.ops.gated_masked_conv2d(image, weight, backend="cuda"),
        lambda: fastvq.ops.pixelcnn_start(sampler, (1,), (1, 2, 2), backend="cuda"),
    ):
        with pytest.raises(ValueError, match=r"cuda: no CUDA device can be used: .*CUDA error 35"):
            call()


def test_a_wrong_wish_for_cuda_gives_one_readable_line(tmp_path):
    run = subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--build-temp", tmp_path, "--build-lib", tmp_path],
        cwd=ROOT, env={**os.environ, "FASTVQ_CUDA": "yes"}, capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode != 0 and "FASTVQ_CUDA='yes': expected 0 or 1" in run.stderr and "Traceback" not in run.stderr


BUILD_PLAN = """
import runpy, setuptools
from pathlib import Path
given = {}
setuptools.setup = lambda **arguments: given.update(arguments)
setup = runpy.run_path("setup.py")
command = setuptools.Distribution(given).get_command_obj("build_ext")
command.inplace = int(sys.argv[1])
command.ensure_finalized()
targets = {e.name: Path(e.name) for e in command.extensions}
print(*setup["ninja_lines"](setup["find_compiler"](), command.extensions, targets, Path(sys.argv[2])), sep="\\n")
"""


def test_a_wheel_holds_no_testing_code(tmp_path):
    def links(inplace: int, **variables: str) -> dict[str, str]:
        """What is linked into each extension."""
        names = "FASTVQ_TESTING", "FASTVQ_EMULATED_TILES"
        environment = {name: value for name, value in os.environ.items() if name not in names}
        plan = subprocess.run(
            [sys.executable, "-c", "import sys" + BUILD_PLAN, str(inplace), tmp_path], cwd=ROOT,
            env={**environment, "FASTVQ_CUDA": "0", **variables}, capture_output=True, text=True, check=True,
        ).stdout  # fmt: skip
        return {name: line for name, line in re.findall(r"^build (fastvq\S+): link (.*)$", plan, re.MULTILINE)}

    wheel, editable = links(0), links(1)
    assert list(wheel) == ["fastvq._cpu"] and "cpu/testing/" not in wheel["fastvq._cpu"]
    assert editable["fastvq._cpu"] == wheel["fastvq._cpu"] and "testing/testing.o" in editable["fastvq._cpu_testing"]
    assert list(links(1, FASTVQ_TESTING="0")) == ["fastvq._cpu"]
    tested = links(0, FASTVQ_TESTING="1", FASTVQ_EMULATED_TILES="1")
    assert list(tested) == ["fastvq._cpu", "fastvq._cpu_testing"]
    assert ("isa_emulated.o" in tested["fastvq._cpu"]) == (platform.machine() in ("x86_64", "AMD64"))


def test_a_missing_compiler_gives_one_readable_line(tmp_path):
    environment = {**os.environ, "PATH": str(tmp_path), "CXX": ""}
    run = subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--build-temp", tmp_path, "--build-lib", tmp_path],
        cwd=ROOT, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode != 0
    assert "fastvq needs a C++17 compiler and found none" in run.stderr and "apt install g++" in run.stderr
    assert "Traceback" not in run.stderr


@pytest.mark.parametrize(
    ("triton", "numpy", "reason"),
    [
        ("3.5.1", "2.3.0", "needs Triton 3.6 or later, got 3.5; pip install -U triton"),
        ("3.6.0", "2.4.1", "the interpreter of Triton 3.6 needs NumPy below 2.4"),
        ("3.6.0+git1", "2.3.5", None), ("3.7.1", "2.4.1", None), ("3.10.0", "2.5.0", None), ("nightly", "2.4.0", None),
    ],
)  # fmt: skip
def test_which_triton_serves(triton, numpy, reason, monkeypatch):
    monkeypatch.setattr(triton_backend, "version", {"triton": triton, "numpy": numpy}.__getitem__)
    monkeypatch.setattr(triton_backend.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(triton_backend, "interpreting", lambda: True)
    found = triton_backend._missing.__wrapped__()
    assert found is reason if reason is None else reason in found
