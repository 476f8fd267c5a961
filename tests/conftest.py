"""Fixtures of every test: the engines of this machine, and an environment that nothing outside has set."""

import importlib.util
import os
import signal
import threading
from pathlib import Path

import pytest
import torch

# Where there is no GPU the Triton kernels run in Triton's interpreter, on CPU tensors. It is asked for before fastvq is
# imported, because Triton reads the variable when a kernel is decorated.
if importlib.util.find_spec("triton") is not None and not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
    from tests.support import triton_guard

    triton_guard.install()

from fastvq._env import VARIABLES
from fastvq.backends import cpu as cpu_backend
from fastvq.backends import triton as triton_backend
from tests.fuzz import shares
from tests.support import kinds

# reference, then the CPU kernels once for each instruction set that this machine has.
ENGINES = ["reference", *(f"cpu-{isa}" for isa in cpu_backend.available_isas())]
CPU_ENGINES = ENGINES[1:]
# Beyond AVX-512, these instruction sets have kernels of their own for some ops alone: the files of those ops are marked
# `every_isa`. Every other test would run AVX-512's kernels again.
BEYOND = ("emulated", "avx512_vnni")
# The Triton kernels on CPU tensors: a hundred times slower, so only for tests marked `interpreted`.
INTERPRETED = ["triton"] if triton_backend.interpreting() and triton_backend.unavailable() is None else []
SHARES = pytest.StashKey[dict[str, int]]()  # examples of each fuzz test


def pytest_addoption(parser):
    group = parser.getgroup("fuzz")
    group.addoption("--fuzz", type=int, default=shares.DEFAULT, metavar="N", help="examples of all fuzz tests together")
    group.addoption("--fuzz-seed", type=int, default=0, metavar="S", help="what they are generated from")
    group.addoption("--fuzz-last", type=Path, metavar="FILE", help="where to write every example before it runs")


@pytest.fixture
def fuzz(request, record_property):
    """fuzz(check, **strategies) runs the test's share of the examples."""
    from tests.fuzz.examples import Examples  # hypothesis, which the other tests do without

    count = request.config.stash[SHARES].get(request.node.nodeid, 1)
    record_property("fuzz", count)
    return Examples(count, *(request.config.getoption(option) for option in ("--fuzz-seed", "--fuzz-last")))


def pytest_terminal_summary(terminalreporter, config):
    ran = [(r.nodeid, n) for r in terminalreporter.getreports("passed") for k, n in r.user_properties if k == "fuzz"]
    if ran:
        seed = config.getoption("--fuzz-seed")
        terminalreporter.write_line(f"fuzz: {sum(n for _, n in ran):,} examples passed, --fuzz-seed={seed}")


@pytest.fixture(autouse=True, scope="session")
def _ctrl_c_raises():
    """A shell starts its background jobs with SIGINT ignored; tests that send it need Python's own handler."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch):
    for name in VARIABLES:
        if name in os.environ:
            monkeypatch.delenv(name)


@pytest.fixture
def use_engine(monkeypatch):
    """use_engine("cpu-avx2") forces that instruction set for the test and returns the backend's name."""

    def use(engine: str) -> str:
        backend, _, isa = engine.partition("-")
        if isa:
            monkeypatch.setenv("FASTVQ_CPU_ISA", isa)
        return backend

    return use


def pytest_generate_tests(metafunc):
    if "engine" in metafunc.fixturenames:
        interpreted = INTERPRETED if metafunc.definition.get_closest_marker("interpreted") else []
        metafunc.parametrize("engine", [*ENGINES, *interpreted], indirect=True)


@pytest.fixture
def engine(request, use_engine):
    """The backend's name, its instruction set forced: the test runs once for each."""
    return use_engine(request.param)


@pytest.fixture
def threads():
    """threads(n) sets torch's number of threads; it is put back after the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def pytest_itemcollected(item):
    for marker in kinds.of(item):
        item.add_marker(marker)


def pytest_configure(config):
    # pytest-xdist starts with the files of most tests; the longest files are those of few, slow tests.
    if hasattr(config.option, "loadscopereorder"):
        config.option.loadscopereorder = False


@pytest.hookimpl(trylast=True)  # the tests that -k and -m have left
def pytest_collection_modifyitems(config, items):
    config.stash[SHARES] = shares.share(items, config.getoption("--fuzz"))
    repeated = [i for i in items if any(isa in i.name for isa in BEYOND) and not i.get_closest_marker("every_isa")]
    if repeated:
        config.hook.pytest_deselected(items=repeated)
        items[:] = [i for i in items if i not in set(repeated)]
    slow = {i.path for i in items if "quick" not in i.keywords}
    items.sort(key=lambda i: i.path not in slow)  # files with slow tests first: none is begun near the end
    if not torch.cuda.is_available():
        no_gpu = pytest.mark.skip(reason="needs a GPU, and torch sees none on this machine")
        for item in items:
            if "needs_gpu" in item.keywords:
                item.add_marker(no_gpu)
