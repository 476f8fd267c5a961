"""Drop-in replacement of quantizers that people already have: ``fastvq.patch(model)``.

Or as an import: ``from fastvq.compat.vector_quantize_pytorch import VectorQuantize`` and so on, one module a peer, with
the peer's constructor and forward.
"""

from fastvq.compat._class import patch_class, unpatch_class
from fastvq.compat._patch import patch, unpatch
from fastvq.compat._report import Patched, PatchReport, Skipped
from fastvq.compat._target import FallbackWarning

__all__ = [
    "FallbackWarning",
    "Left",
    "PatchReport",
    "Patched",
    "Replaced",
    "Skipped",
    "patch",
    "patch_class",
    "unpatch",
    "unpatch_class",
]

# The names of earlier versions.
Left, Replaced = Skipped, Patched
