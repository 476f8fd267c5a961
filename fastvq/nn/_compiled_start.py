"""The k-means start inside a compiled graph: one op, ``torch.ops.fastvq.start_codebook_``.

The number of iterations of k-means depends on the data, so a graph cannot hold them. The op takes the module's buffers,
so that the graph knows which tensors it writes, and the module's number, by which it finds the module.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING
from weakref import WeakValueDictionary

from torch import Tensor

from fastvq.ops._library import register

if TYPE_CHECKING:
    from fastvq.nn.codebook import LearnedCodebook

__all__ = ["number_module"]

_modules: WeakValueDictionary[int, LearnedCodebook] = WeakValueDictionary()
_next_number = itertools.count()


def number_module(module: LearnedCodebook) -> int:
    """Gives ``module`` a number, by which the op finds it in this process."""
    number = next(_next_number)
    _modules[number] = module
    return number


def _run(
    codebook: Tensor,
    cluster_size: Tensor,
    embed_sum: Tensor | None,
    initialised: Tensor,
    rows: Tensor,
    mask: Tensor | None,
    residual: bool,
    number: int,
) -> None:
    module = _modules.get(number)
    if module is None:
        raise RuntimeError(
            "fastvq.nn: a compiled graph asks for the k-means start of a module that this process does not hold; "
            "train the module itself before it is exported, or make it with kmeans_init=False"
        )
    if bool(initialised) or module._fit_kmeans(codebook, cluster_size, embed_sum, initialised, rows, mask, residual):
        # The graph was compiled for a codebook that k-means must start. The next call compiles a graph without this op.
        module._known_initialised = True


register(
    "start_codebook_(Tensor(a!) codebook, Tensor(b!) cluster_size, Tensor(c!)? embed_sum, Tensor(d!) initialised, "
    "Tensor rows, Tensor? mask, bool residual, int number) -> ()",
    _run,
    lambda *arguments: None,
)
