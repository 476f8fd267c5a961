"""Which backend serves a call: by use_backend, by the forward of a backward, or by what the machine has."""

import asyncio
import contextvars
import dataclasses
import os
import shutil
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import pytest
import torch

import fastvq
from fastvq import ops
from fastvq.backends import cpu as cpu_backend
from fastvq.backends import cuda as cuda_backend
from fastvq.backends import registry
from fastvq.backends import triton as triton_backend
from fastvq.ops.masked_conv import MASKED_CONV, MASKED_CONV_BACKWARD
from fastvq.ops.nearest import NEAREST
from fastvq.ops.nearest.call import NearestCall
from fastvq.ops.quantize import QUANTIZE, QUANTIZE_BACKWARD

ROOT = Path(__file__).parent.parent
X, CODES = torch.randn(20, 4), torch.randn(6, 4)
pytestmark = pytest.mark.skipif(
    cpu_backend.unavailable() is not None, reason="needs the CPU kernels beside the reference"
)


@pytest.fixture
def served(monkeypatch):
    """The backends that served the forwards and backwards of quantize and masked_conv2d, in order."""
    log = []

    def spied(name, kind, implementation):
        def run(*args, **kwargs):
            log.append(f"{kind} {name}")
            return implementation.run(*args, **kwargs)

        return run

    declared = (QUANTIZE, QUANTIZE_BACKWARD), (MASKED_CONV, MASKED_CONV_BACKWARD)
    for kind, op in ((kind, op) for pair in declared for kind, op in zip(("forward", "backward"), pair, strict=True)):
        for name, kernel in op.kernels.items():
            monkeypatch.setitem(op.kernels, name, dataclasses.replace(kernel, run=spied(name, kind, kernel)))
    return log


def _loss(x):
    return ops.quantize(x, CODES).commitment_loss


def _conv(x):
    return ops.masked_conv2d(x, torch.ones(2, 1, 3, 3)).sum()


@pytest.mark.parametrize(("call", "shape"), [(_loss, (20, 4)), (_conv, (1, 1, 5, 5))])
def test_a_backward_uses_what_its_forward_was_called_with(call, shape, served):
    x = torch.randn(shape, requires_grad=True)
    with fastvq.use_backend("reference"):
        inside = call(x)
    outside = call(x)
    inside.backward()  # the block is left
    outside.backward()
    assert served == ["forward reference", "forward cpu", "backward reference", "backward cpu"]


def test_overlapping_threads_do_not_disturb_each_other(served):
    entered, left = threading.Barrier(3), threading.Barrier(2)
    found = {}

    def work(name, is_first):
        with fastvq.use_backend(name):
            entered.wait(10)
            found[name] = registry._override.get()
            if is_first:
                left.wait(10)  # the other leaves first
        if not is_first:
            left.wait(10)
        found[name, "after"] = registry._override.get()

    threads = [threading.Thread(target=work, args=a) for a in (("reference", True), ("cpu", False))]
    for t in threads:
        t.start()
    entered.wait(10)
    _loss(X)
    for t in threads:
        t.join(10)
    assert found == {"reference": "reference", "cpu": "cpu", ("reference", "after"): None, ("cpu", "after"): None}
    assert served == ["forward cpu"] and registry._override.get() is None


def test_threads_and_tasks_inherit_it_as_context_variables_do():
    seen = {}

    def look(name):
        seen[name] = registry._override.get()

    async def task():
        look("task")
        with fastvq.use_backend("cpu"):
            await asyncio.sleep(0)
            look("inside the task")

    with fastvq.use_backend("reference"):
        context = contextvars.copy_context()
        threads = [threading.Thread(target=look, args=("thread",))]
        threads.append(threading.Thread(target=context.run, args=(look, "thread with the context")))
        for t in threads:
            t.start()
            t.join(10)
        asyncio.run(task())
        look("after the task")
    handed = sys.version_info >= (3, 14)  # whether threads inherit the context there depends on the build
    assert handed or seen["thread"] is None
    assert seen["thread with the context"] == seen["task"] == seen["after the task"] == "reference"
    assert seen["inside the task"] == "cpu"


def test_a_compiled_graph_chooses_at_every_run(served):
    compiled = torch.compile(_loss, fullgraph=True, backend="aot_eager")
    x = torch.randn(20, 4, requires_grad=True)
    for inside in (True, False, True):
        served.clear()
        if inside:
            with fastvq.use_backend("reference"):
                compiled(x).backward()
        else:
            compiled(x).backward()
        name = "reference" if inside else "cpu"
        assert served == [f"forward {name}", f"backward {name}"]


def test_a_graph_may_hold_the_block(served):
    def inside(x):
        with fastvq.use_backend("reference"):
            loss = _loss(x)
        return loss + _loss(x)

    torch.compile(inside, backend="aot_eager")(X)
    assert served == ["forward reference", "forward cpu"]


@pytest.fixture
def alone(monkeypatch):
    """A machine without a backend but the reference, on which no warning was given yet."""
    monkeypatch.setattr(cpu_backend, "_import_error", "cannot be loaded (no such file)")
    monkeypatch.setattr(triton_backend, "interpreting", lambda: False)
    monkeypatch.setattr(
        triton_backend, "_missing", lambda: "it needs Triton 3.6 or later, got 3.2; pip install -U triton"
    )
    monkeypatch.setattr(cuda_backend, "_import_error", "was not built")
    monkeypatch.setattr(registry, "_warned", set())
    monkeypatch.setattr(registry, "_serves", set())


def test_the_first_call_that_falls_to_the_reference_warns_with_reason_and_remedy(alone):
    with pytest.warns(RuntimeWarning, match=r"no fastvq kernels run on cpu tensors") as caught:
        ops.nearest(X, CODES)
        ops.nearest(X, CODES)
        ops.masked_conv2d(torch.randn(1, 1, 4, 4), torch.ones(2, 1, 3, 3))
    assert len(caught) == 1
    message = str(caught[0].message)
    assert "(no such file)" in message and "pip install" in message and "many times slower" in message


def test_a_reference_that_was_asked_for_does_not_warn(alone, monkeypatch):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ops.nearest(X, CODES, backend="reference")
        with fastvq.use_backend("reference"):
            ops.nearest(X, CODES)
        monkeypatch.setenv("FASTVQ_BACKEND", "reference")
        ops.nearest(X, CODES)


def test_kernels_that_do_not_take_this_call_alone_do_not_warn(monkeypatch):
    monkeypatch.setattr(registry, "_warned", set())
    monkeypatch.setattr(registry, "_serves", set())
    monkeypatch.setattr(triton_backend, "interpreting", lambda: False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ops.masked_conv2d(torch.randn(1, 1, 4, 4).double(), torch.ones(2, 1, 3, 3).double())


@pytest.mark.parametrize(
    ("device", "expected"),
    [
        ("cuda:0", ["needs Triton 3.6 or later, got 3.2", "FASTVQ_CUDA=1", "Install a Triton that serves"]),
        ("xpu:0", ["There are no kernels for xpu: move the tensors to a CPU or to a CUDA GPU"]),
    ],
)
def test_other_devices_without_kernels_are_named(device, expected, alone, monkeypatch):
    monkeypatch.setattr(triton_backend, "capability", lambda device: 90)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))

    kind = type("OnDevice", (torch.Tensor,), {"device": torch.device(device)})
    with pytest.warns(RuntimeWarning, match=f"run on {torch.device(device).type} tensors") as caught:
        assert NEAREST.choose(_call(kind)) == "reference"
    for words in expected:
        assert words in str(caught[0].message)


def _call(kind):
    x, codebook = torch.empty(2, 3).as_subclass(kind), torch.empty(4, 3).as_subclass(kind)
    return NearestCall(x, codebook, "euclidean", "exact", False, None)


def test_build_info_says_which_backend_serves_which_device(alone, monkeypatch):
    found = fastvq.build_info()["devices"]["cpu"]
    assert found["backend"] == "reference" and "no such file" in found["reason"]
    monkeypatch.setattr(cpu_backend, "_import_error", None)
    assert fastvq.build_info()["devices"]["cpu"] == {"backend": "cpu", "reason": None}
    with fastvq.use_backend("reference"):
        assert fastvq.build_info()["devices"]["cpu"] == {"backend": "reference", "reason": None}


def test_a_source_folder_without_extensions_says_so_once(tmp_path):
    # What `import fastvq` finds in a checkout, when the package is installed elsewhere.
    shutil.copytree(ROOT / "fastvq", tmp_path / "fastvq", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    (tmp_path / "csrc").mkdir()
    (tmp_path / "setup.py").touch()
    # An editable install would find the extension of its own folder for any package of this name.
    program = "import sys; sys.meta_path = [f for f in sys.meta_path if 'ditable' not in repr(f)]\n"
    program += "import torch, fastvq; [fastvq.ops.nearest(torch.ones(2, 3), torch.ones(4, 3)) for _ in range(2)]"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("many times slower") == 1
    assert f"this is the source folder {tmp_path.resolve()}: build it with pip install -e ., or leave" in done.stderr
