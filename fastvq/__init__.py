"""Exact, fast kernels for vector-quantized models. The ops are in ``fastvq.ops``."""

from fastvq._backends import use_backend
from fastvq._build_info import build_info
from fastvq._kmeans import KMeans, kmeans
from fastvq._version import VERSION as __version__

__all__ = ["KMeans", "__version__", "build_info", "kmeans", "use_backend"]
