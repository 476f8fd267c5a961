"""One thread: the tensors here are small, and waking a second one takes longer than their work."""

import pytest


@pytest.fixture(autouse=True)
def _one_thread(threads):
    threads(1)
