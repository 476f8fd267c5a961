"""The launches that ``tests.triton_offline`` compiles: every launcher, once at least for each tile and dtype."""

from collections.abc import Callable

CALLS: dict[str, Callable[[], object]] = {}

# Kernels that must use the tensor cores, in every tile and dtype of theirs that CALLS launches.
TENSOR_CORES: set[str] = set()
