"""The golden set: calls whose results are known, run once on a kind of GPU that no result was ever recorded on.

The GPU kernels' exactness rests on how a card's tensor cores accumulate, which is known of the generations that were
measured and a bound, derived from them, for the others. So the first lookup on any other card runs these few cases
first, against the reference on the CPU: a fraction of a second once the kernels are compiled. Where an index differs,
or a kernel does not run at all, the backend refuses from then on, with one warning: a call that names no backend is
served by the next backend that passes, in the end by the reference. Other ops bring calls of their own whose results
are exact in any order of addition, so that what a wrong compile does shows in a bit.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from fastvq import _triton

__all__ = ["RECORDED", "cases", "differs", "mismatch"]

# (backend, capability times ten) on which every test marked needs_gpu passed: an H100.
RECORDED: frozenset[tuple[str, int]] = frozenset({("triton", 90), ("cuda", 90)})

Lookup = Callable[[Tensor, Tensor, str, str], Tensor]

_found: dict[tuple[str, int, str], str | None] = {}


def cases() -> Iterator[tuple[str, Tensor, Tensor]]:
    """(name, x [N, D], codebook [K, D]) on the CPU: near-ties for every kind of operand, each way out of the filter."""
    g = torch.Generator().manual_seed(0)
    for dim in (8, 64, 270):
        x, codebook = torch.randn(64, dim, generator=g), torch.randn(300, dim, generator=g)
        yield f"gaussian, D = {dim}", x, codebook
        yield f"bfloat16, D = {dim}", x.bfloat16(), codebook.bfloat16()
    yield "float16", x.half(), codebook.half()
    yield "a shared offset", x + 1e3, codebook + 1e3
    yield "a collapsed codebook", x, codebook / 1000
    yield "pairs of codes", x, torch.cat([codebook, codebook])
    yield "equal codes", x[:16], codebook[:1].expand(300, 270)
    codes = torch.randn(40, 40, generator=g).repeat(8, 1)
    flips = torch.randint(0, 2, codes.shape, generator=g) == 1
    near = torch.where(flips, torch.nextafter(codes, torch.tensor(torch.inf)), codes)
    yield "codes one bit apart", torch.randn(64, 40, generator=g), near
    # Operands a quarter step off the bfloat16 grid, all on one side: half the bound would lose the first code.
    row = torch.cat([torch.full((32,), 1.00390625), torch.full((32,), 1.01171875), torch.zeros(32)])
    two = torch.zeros(70, 96) + torch.arange(70)[:, None]
    two[0] = torch.cat([row[:32], torch.zeros(64)])
    two[1] = torch.cat([torch.zeros(32), row[32:64], torch.tensor([0.75]), torch.zeros(31)])
    yield "every rounding one way", row.repeat(3, 1), two


def _at(t: Tensor, device: torch.device) -> Tensor:
    return t.to(device)


def _run(op: str, device: torch.device, lookup: Lookup, reference: Lookup, only: str | None) -> str | None:
    for name, x, codebook in cases():
        if only not in (None, name):
            continue
        for metric in ("euclidean", "cosine", "dot"):
            try:
                got = lookup(_at(x, device), _at(codebook, device), metric, "exact").cpu()
            except Exception as error:  # whatever a driver or a compiler raises: the answer is the same
                return f"its {op} does not run on {device}: {type(error).__name__}: {error}"
            wrong = int((got != reference(x, codebook, metric, "exact")).view(len(x), -1).any(1).sum())
            if wrong:
                return f"its {op} differs from the reference on {device}: {wrong} of {len(x)} rows, {name}, {metric}"
    return None


def mismatch(
    backend: str,
    device: torch.device,
    lookup: Lookup,
    reference: Lookup,
    op: str = "lookup",
    only: str | None = None,
) -> str | None:
    """Why ``lookup``, a backend's, must not serve on ``device``, or None.

    The golden set, or the one case ``only`` of it, runs at the first call of ``op`` on a kind of card. While a CUDA
    graph is being captured nothing can be compared, and an answer not yet known is taken to be None.
    """
    return _once(backend, op, device, lambda: _run(op, device, lookup, reference, only))


def differs(
    backend: str,
    op: str,
    device: torch.device,
    run: Callable[..., tuple[Tensor, ...]],
    reference: Callable[..., tuple[Tensor, ...]],
    arguments: Callable[[], Iterator[tuple[Any, ...]]],
) -> str | None:
    """As ``mismatch``, of another op: why ``run`` must not serve on ``device``, or None.

    ``arguments`` yields those of a few calls, tensors on the CPU; ``run`` must return what ``reference`` does there, to
    the bit.
    """

    def compare() -> str | None:
        for i, given in enumerate(arguments()):
            try:
                got = run(*(_at(a, device) if isinstance(a, Tensor) else a for a in given))
                same = all(torch.equal(g.cpu(), r) for g, r in zip(got, reference(*given), strict=True))
            except Exception as error:  # as above
                return f"its {op} does not run on {device}: {type(error).__name__}: {error}"
            if not same:
                return f"its {op} differs from the reference on {device}, in call {i} of its golden set"
        return None

    return _once(backend, op, device, compare)


def _once(backend: str, op: str, device: torch.device, compare: Callable[[], str | None]) -> str | None:
    if device.type != "cuda":
        return None
    capability = _triton.capability(device)
    if (backend, capability) in RECORDED:
        return None
    key = backend, capability, op
    if key not in _found:
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            return None
        reason = _found[key] = compare()
        if reason is not None:
            warnings.warn(
                f"fastvq: the {backend} backend's {op} is switched off on this card (compute capability "
                f"{capability / 10}): {reason}. Calls that name no backend are served by another that passes, or the "
                "reference; please report this",
                RuntimeWarning,
                stacklevel=2,
            )
    return _found[key]
