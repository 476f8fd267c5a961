"""What a report of a fault needs to know of this machine, for ``fastvq info``."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
from pathlib import Path
from typing import Any

import torch

__all__ = ["PACKAGES", "machine"]

# Packages that fastvq computes with, reads files with, or patches.
PACKAGES = (
    "numpy",
    "triton",
    "safetensors",
    "typer",
    "pillow",
    "mlxtend",
    "scikit-image",
    "faiss-cpu",
    "vector-quantize-pytorch",
    "transformers",
    "diffusers",
    "encodec",
    "moshi",
    "audiocraft",
    "accelerate",
    "onnxruntime",
)


def machine() -> dict[str, Any]:
    """System, processor, GPUs, versions of packages, and the environment variables that change what fastvq does."""
    return {
        "python": sys.version.split()[0],
        "system": platform.platform(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "gpus": [_gpu(i) for i in range(torch.cuda.device_count())],
        "cuda": torch.version.cuda,
        "packages": {name: version for name in PACKAGES if (version := _version(name)) is not None},
        "environment": {
            name: value
            for name, value in sorted(os.environ.items())
            if name.startswith("FASTVQ_") or name in ("TRITON_INTERPRET", "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES")
        },
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    for line in info.read_text().splitlines() if info.is_file() else []:
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _gpu(index: int) -> str:
    major, minor = torch.cuda.get_device_capability(index)
    return f"{torch.cuda.get_device_name(index)}, compute capability {major}.{minor}"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
