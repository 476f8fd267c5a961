"""The golden set: calls whose results are known, run first on a kind of GPU that no result was ever recorded on.

The GPU kernels' exactness rests on how a card's tensor cores accumulate, which is known of the generations that were
measured and a bound, derived from them, for the others. So on any other card the first lookup of each metric, width,
pair of dtypes and size of codebook runs a few cases of the same first, against the reference on the CPU: a fraction of
a second, by the kernels that the call itself needs compiled. Where an index differs, or a kernel does not run at all,
the backend refuses the op on that kind of card from then on, whatever the configuration, with one warning: a call that
names no backend is served by the next backend that passes, in the end by the reference. Other ops bring calls of their
own whose results are exact in any order of addition, so that what a wrong compile does shows in a bit.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from fastvq.backends import triton as triton_backend
from fastvq.backends.golden.cases import Configuration, cases, widened
from fastvq.backends.registry import outside_autocast

__all__ = ["RECORDED", "check_lookup", "check_op"]

# (backend, capability times ten) whose current lookup passed every test marked needs_gpu: an H100. Triton's passed
# them too, but has been made faster since.
RECORDED: frozenset[tuple[str, int]] = frozenset({("cuda", 90)})

Lookup = Callable[[Tensor, Tensor, str, str], Tensor]

_passed: set[tuple[str, int, str, tuple[Any, ...]]] = set()  # backend, capability, op, configuration
_disabled: dict[tuple[str, int, str], str] = {}  # why, of any configuration


def _at(t: Tensor, device: torch.device) -> Tensor:
    return t.to(device)


def _run(op: str, device: torch.device, lookup: Lookup, reference: Lookup, call: Configuration) -> str | None:
    for name, x, codebook in cases(call):
        try:
            rows, codes = (_at(widened(t, call.dim), device) for t in (x, codebook))
            got = lookup(rows, codes, call.metric, call.precision).cpu()
        except Exception as error:  # whatever a driver or a compiler raises: the answer is the same
            return f"its {op} does not run on {device}: {type(error).__name__}: {error}"
        wrong = int((got != reference(x, codebook, call.metric, "exact")).view(len(x), -1).any(1).sum())
        if wrong:
            return (
                f"its {op} differs from the reference on {device}: {wrong} of {len(x)} rows, {name}, {call.metric}, "
                f"{call.x} and {call.codebook}, D = {call.dim}, K = {call.n_codes}"
            )
    return None


def check_lookup(
    backend: str,
    device: torch.device,
    lookup: Lookup,
    reference: Lookup,
    call: Configuration,
    op: str = "lookup",
) -> str | None:
    """Why ``lookup``, a backend's, must not serve on ``device``, or None.

    The golden set runs at the first call of ``op`` in the configuration ``call`` on a kind of card. An op that was
    found wrong there in one configuration is refused in all, and other ops than "lookup" are refused with it, as they
    rest on the same tensor cores. While a CUDA graph is being captured nothing can be compared, and an answer not yet
    known is taken to be None.
    """
    return _once(
        backend, op, device, lambda: _run(op, device, lookup, reference, call), call.key(), rests_on=("lookup",)
    )


def check_op(
    backend: str,
    op: str,
    device: torch.device,
    run: Callable[..., tuple[Tensor, ...]],
    reference: Callable[..., tuple[Tensor, ...]],
    arguments: Callable[[], Iterator[tuple[Any, ...]]],
) -> str | None:
    """As ``check_lookup``, of another op: why ``run`` must not serve on ``device``, or None.

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


def _once(
    backend: str,
    op: str,
    device: torch.device,
    compare: Callable[[], str | None],
    configuration: tuple[Any, ...] = (),
    rests_on: tuple[str, ...] = (),
) -> str | None:
    if device.type != "cuda":
        return None
    capability = triton_backend.capability(device)
    if (backend, capability) in RECORDED:
        return None
    for name in (op, *rests_on):
        if (reason := _disabled.get((backend, capability, name))) is not None:
            return reason
    key = backend, capability, op, configuration
    if key in _passed or (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()):
        return None
    # The cases are made on the CPU, whatever the caller's default device, and the reference computes as it is written.
    with torch.device("cpu"), outside_autocast():
        reason = compare()
    if reason is None:
        _passed.add(key)
        return None
    _disabled[backend, capability, op] = reason
    warnings.warn(
        f"fastvq: the {backend} backend's {op} is switched off on this card (compute capability "
        f"{capability / 10}): {reason}. Calls that name no backend are served by another that passes, or the "
        "reference; please report this",
        RuntimeWarning,
        stacklevel=2,
    )
    return reason
