"""Which kind each test file is: the markers that ``pytest -m`` selects by."""

from __future__ import annotations

from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# Kernels under an interpreter, or compiled for cards that this machine does not have.
TRITON = ("test_golden_triton", "test_tiles", "test_triton_compile", "test_triton_guard")
# Trainings, commands, several processes, compiled graphs and whole benchmarks: each test takes seconds.
SLOW = (
    "benchmarks", "compat", "fuzz",
    "models/test_checkpoints", "models/test_kill_points", "models/test_training", "models/test_prior",
    "models/test_damaged_files", "models/test_editing", "models/test_sampling",
    "nn/test_compiled", "nn/test_export", "nn/test_onnx", "nn/test_loading", "nn/test_option_table", "nn/test_learning",
    "ops/test_fake_cuda", "ops/test_lookup_isa", "ops/test_registration", "ops/test_nearest_bound",
    "test_archives", "test_cli", "test_cuda_sass", "test_distributed", "test_encode", "test_encode_resume",
    "test_examples", "test_kmeans", "test_on_gpu", "test_processes", "test_readme", "test_train_command",
    "test_verify", "native",
)  # fmt: skip


def of(item: pytest.Item) -> list[str]:
    """The markers of a collected test: its kind, or ``quick`` where it is none of the others."""
    name = item.path.relative_to(ROOT).with_suffix("").as_posix()
    if name.startswith("cuda_on_host") or "cuda_on_host" in getattr(item, "fixturenames", ()):
        return ["host_cuda"]
    if name.endswith("_triton") or name in TRITON or "triton" in getattr(item, "originalname", item.name):
        return ["triton"]
    if item.get_closest_marker("needs_gpu"):
        return []
    if "[triton" in item.name or "-triton" in item.name:
        return ["triton"]
    if any(name == slow or name.startswith(slow + "/") for slow in SLOW) or item.get_closest_marker("slow"):
        return ["slow"] if not item.get_closest_marker("slow") else []
    return ["quick"]
