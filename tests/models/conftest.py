"""Models of a few thousand weights gain nothing from a second thread, and on a busy machine wait for it. Gradients of
torch's convolutions depend on the number of threads in their last bits, so runs that are compared share it."""

import pytest
import torch


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
