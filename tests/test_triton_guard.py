"""The guard around Triton's interpreter finds what it is there to find."""

import pytest
import torch

triton = pytest.importorskip("triton", reason="needs the package triton")
if torch.cuda.is_available():
    pytest.skip("the interpreter is used where there is no GPU", allow_module_level=True)
import triton.language as tl  # noqa: E402
from triton.runtime.errors import InterpreterError  # noqa: E402


@triton.jit
def _copy(x, out, n, SLACK: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + at, tl.load(x + at, mask=at < n + SLACK), mask=at < n)


@triton.jit
def _count(out, n, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.atomic_add(out + at, tl.full((BLOCK,), 1, tl.int32), mask=at <= n)


def test_a_copy_within_its_tensors_runs():
    x, out = torch.randn(100), torch.empty(100)
    _copy[(2,)](x, out, 100, SLACK=0, BLOCK=64)
    assert torch.equal(x, out)


def test_one_load_too_many_is_found():
    with pytest.raises(InterpreterError, match="a load outside every tensor of the launch: 1 of"):
        _copy[(2,)](torch.randn(100), torch.empty(100), 100, SLACK=1, BLOCK=64)


def test_one_store_too_many_is_found():
    with pytest.raises(InterpreterError, match="a store outside every tensor of the launch: 1 of"):
        _copy[(2,)](torch.randn(101), torch.empty(100), 101, SLACK=0, BLOCK=64)


def test_one_atomic_too_many_is_found():
    with pytest.raises(InterpreterError, match="an atomic outside every tensor of the launch: 1 of"):
        _count[(1,)](torch.zeros(7, dtype=torch.int32), 7, BLOCK=16)
