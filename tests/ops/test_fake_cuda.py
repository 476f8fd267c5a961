"""Every op on fake tensors of a device that need not be here: shapes, dtypes and device of what the real one returns."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from fastvq import ops

DTYPES = (torch.float32, torch.bfloat16)


def cuda(*shape, dtype=torch.float32):
    return torch.empty(shape, device="cuda", dtype=dtype)


def looks(t, shape, dtype):
    assert tuple(t.shape) == shape and t.dtype == dtype and t.device.type == "cuda"


@pytest.fixture(autouse=True)
def _fake():
    with FakeTensorMode():
        yield
