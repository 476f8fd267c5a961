"""The types of string options, for what stands between the public functions and the ops.

Public functions write the strings themselves in their signatures, so that ``help`` shows them.
"""

from __future__ import annotations

from typing import Literal

__all__ = ["BackendName", "Estimator", "Metric", "Precision"]

BackendName = Literal["cpu", "triton", "cuda", "reference"]
Estimator = Literal["straight_through", "rotation", "none"]
Metric = Literal["euclidean", "cosine", "dot"]
Precision = Literal["exact", "fast"]
