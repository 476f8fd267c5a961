"""Exact, fast kernels for vector-quantized models. The ops are in ``fastvq.ops``."""

from fastvq._build_info import build_info
from fastvq._kmeans import KMeans, kmeans
from fastvq._version import VERSION as __version__
from fastvq.backends.registry import use_backend
from fastvq.compat import PatchReport, patch, patch_class, unpatch, unpatch_class

__all__ = [
    "KMeans",
    "PatchReport",
    "__version__",
    "build_info",
    "kmeans",
    "patch",
    "patch_class",
    "unpatch",
    "unpatch_class",
    "use_backend",
]
