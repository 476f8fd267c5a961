"""Oracles run on one thread: their tensors are small, and threads that wait for each other cost more than they give."""

import pytest


@pytest.fixture(autouse=True)
def _one_thread(threads):
    threads(1)
