"""Every shipped Triton kernel and tile, compiled for three generations of cards that need not be there."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="needs the package triton")
from tests.support.triton_calls import CALLS, REPEATS, TENSOR_CORES

ROOT = Path(__file__).parent.parent
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # bytes a block may use, CUDA programming guide
TENSOR_CORE = {80: {"mma.sync"}, 90: {"wgmma.mma_async", "mma.sync"}, 100: {"tcgen05.mma", "mma.sync"}}


@pytest.fixture(scope="module")
def compilations(tmp_path_factory):
    """Card to its process and the file that it writes; all start at once, for each keeps one core busy for minutes."""
    folder = tmp_path_factory.mktemp("compiled")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_DEFAULT_FP_FUSION"] = "1"  # kernels that must not fuse say so themselves
    started = {}
    for card in SHARED_LIMIT:
        path = folder / f"{card}.jsonl"
        with path.open("w") as out, path.with_suffix(".log").open("w") as log:
            command = [sys.executable, "-m", "tests.support.triton_offline", str(card)]
            started[card] = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=out, stderr=log), path
    yield started
    for process, _ in started.values():
        process.kill()
        process.wait()


@pytest.fixture(scope="module", params=[80, 90, 100])
def compiled(request, compilations):
    """(card, one dictionary a kernel that was compiled for it)."""
    process, path = compilations[request.param]
    assert process.wait() == 0, path.with_suffix(".log").read_text()
    return request.param, [json.loads(line) for line in path.read_text().splitlines()]


def told(kernel):
    return f"{kernel['kernel']} of {kernel['call']}, {kernel['constants']}"


def test_every_call_compiles(compiled):
    _, kernels = compiled
    # A call whose kernels were all met in calls before it prints none: its constants are the others'.
    assert bool(kernels) == bool(CALLS)


def test_another_number_of_vectors_compiles_nothing(compiled):
    _, kernels = compiled
    assert REPEATS and [told(k) for k in kernels if k["call"] in REPEATS] == []


def test_no_spills(compiled):
    _, kernels = compiled
    assert [f"{told(k)}: {k['stack']} bytes of stack" for k in kernels if k["stack"]] == []


def test_shared_memory_fits(compiled):
    card, kernels = compiled
    assert [f"{told(k)}: {k['shared']}" for k in kernels if k["shared"] > SHARED_LIMIT[card]] == []


def test_matrix_products_are_on_the_tensor_cores(compiled):
    card, kernels = compiled
    products = [k for k in kernels if k["kernel"] in TENSOR_CORES and "float64" not in k["call"]]
    assert {k["kernel"] for k in products} == TENSOR_CORES
    assert [told(k) for k in products if not k["products"].keys() & TENSOR_CORE[card]] == []
