"""A pytest plugin: every quantizer that a peer's own tests make is patched.

    git clone https://github.com/lucidrains/vector-quantize-pytorch
    PYTHONPATH=tests/compat/peer_suite python -m pytest -p fastvq_patched vector-quantize-pytorch/tests/test_readme.py

The tests belong to the checkout and to the version of the package that is installed; nothing is fetched here.
"""

import os

import fastvq

PEER = os.environ.get("FASTVQ_PEER", "vector_quantize_pytorch")


def pytest_report_header() -> str:
    return f"fastvq patched into {', '.join(fastvq.patch_class(PEER))}"
