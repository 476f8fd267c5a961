"""All tests here use one thread. Models of a few thousand weights gain nothing from a second one, and on a busy machine
wait for it. The last bits of torch's convolution gradients depend on the number of threads, so runs that are compared
need the same number."""

import pytest
import torch


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
