"""The k-means start inside a compiled graph: one op, ``torch.ops.fastvq.start_codebook_``.

k-means decides by its data how often it iterates, which no graph can hold. The op gets the module's buffers, because
the graph has to know what is written, and the module's number, by which it finds everything else.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING
from weakref import WeakValueDictionary

from torch import Tensor

from fastvq.ops._library import register

if TYPE_CHECKING:
    from fastvq.nn.codebook import LearnedCodebook

__all__ = ["enrol"]

_modules: WeakValueDictionary[int, LearnedCodebook] = WeakValueDictionary()
_next_number = itertools.count()


def enrol(module: LearnedCodebook) -> int:
    """A number of this process by which the op finds ``module``."""
    number = next(_next_number)
    _modules[number] = module
    return number


def _run(
    codebook: Tensor, cluster_size: Tensor, embed_sum: Tensor | None, initialised: Tensor, rows: Tensor,
    mask: Tensor | None, residual: bool, number: int,
) -> None:  # fmt: skip
    module = _modules.get(number)
    if module is None:
        raise RuntimeError(
            "fastvq.nn: a compiled graph asks for the k-means start of a module that this process does not hold; "
            "train the module itself before it is exported, or make it with kmeans_init=False"
        )
    if bool(initialised) or module._fit(codebook, cluster_size, embed_sum, initialised, rows, mask, residual):
        # The graph was compiled for a codebook that waits: the next call compiles one without this op.
        module._known_initialised = True


register(
    "start_codebook_(Tensor(a!) codebook, Tensor(b!) cluster_size, Tensor(c!)? embed_sum, Tensor(d!) initialised, "
    "Tensor rows, Tensor? mask, bool residual, int number) -> ()",
    _run, lambda *arguments: None,
)  # fmt: skip
