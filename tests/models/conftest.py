"""Models of a few thousand weights gain nothing from a second thread, and on a busy machine wait for it."""

import pytest


@pytest.fixture(autouse=True)
def _one_thread(threads):
    threads(1)
