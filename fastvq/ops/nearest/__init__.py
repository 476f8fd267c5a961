"""Nearest-codebook lookup."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from fastvq._checks import check_backend_name, check_codebook, check_option
from fastvq.backends import triton as triton_backend
from fastvq.backends.golden import gate
from fastvq.backends.golden.cases import configuration
from fastvq.ops._contract import check_choices, check_lookup
from fastvq.ops._op import Kernel, Op, register
from fastvq.ops.nearest import cpu, cuda, reference
from fastvq.ops.nearest.call import LookupCall, NearestCall
from fastvq.ops.nearest.packed import METRICS, PackedCodebook, operands, pack_codebook

__all__ = [
    "METRICS",
    "NEAREST",
    "PRECISIONS",
    "PackedCodebook",
    "golden_lookup",
    "nearest",
    "operands",
    "pack_codebook",
]

OP = "fastvq.ops.nearest"
PRECISIONS = ("exact", "fast")


def nearest(
    x: Tensor,  # [..., D], or [H, ..., D] with heads
    codebook: Tensor | PackedCodebook,  # [K, D], or [H, K, D]
    *,
    metric: Literal["euclidean", "cosine", "dot"] = "euclidean",
    precision: Literal["exact", "fast"] = "exact",
    check_finite: bool = False,
    backend: Literal["cpu", "triton", "cuda", "reference"] | None = None,
) -> Tensor:  # [...] or [H, ...], int64
    """Index of the nearest code of every vector, exact and the same on every backend, machine, thread count and batch.

    .. math:: index = \\min_k (d_k, k) \\quad \\text{in lexicographic order}

    with d_k evaluated in float64, d = 0 ... D-1 one after another in one accumulator, no fused multiply-add:

    - ``metric="euclidean"``: ``t = x_d - c_kd; acc = acc + t*t``, ``d_k = acc`` (squared distance);
    - ``metric="dot"``: ``acc = acc + x_d*c_kd``, ``d_k = -acc``;
    - ``metric="cosine"``: the dot, ``d_k = -acc / |c_k|``. A zero code is never chosen unless all are.

    So ties go to the lowest index. Codes that hold NaN or infinity are never chosen unless every code does; a vector
    that does gets index 0, as ``torch.argmin`` gives. If every d_k overflows, index 0.

    How it stays fast: a low-precision pass scores all codes with a proven error bound, and only codes that the bound
    cannot rule out are scored in float64. No N x K matrix is made on any backend. On a GPU nothing waits for the host,
    so a CUDA graph can hold the call.

    Args:
        x: vectors, float32, float64, float16 or bfloat16, taken as the exact numbers they hold; any strides.
        codebook: codes, any of the same dtypes, not necessarily that of x. With heads, one codebook a head.
            A frozen codebook can be packed once with ``pack_codebook``.
        metric: "euclidean", "cosine" or "dot".
        precision: "exact", or "fast": the winner of the low-precision pass, with no certificate. On Gaussian data and
            float32 filtering about 1 row in 10,000 then differs, in 16-bit integers 1 in 2,000, on AMX tiles 1 in 200,
            on a GPU's tensor cores 1 in 1,000 (by emulation on a CPU); ties and offsets far from zero fare worse.
        check_finite: raise, with the first bad row, if x holds NaN or infinity. Costs a pass over x.
        backend: one of ``fastvq.build_info()["backends"]``; None: the fastest that can serve. A named one never
            falls back.

    Returns:
        Indices, int64, of x's shape without its last dimension. Integers take no gradient.

    Raises:
        ValueError: shapes or devices that do not fit, K = 0, D = 0, an unknown option, a backend that cannot serve.
        TypeError: x or codebook is no floating-point tensor.

    Example:
        >>> x, codebook = torch.randn(8, 32, 32, 64), torch.randn(512, 64)
        >>> nearest(x, codebook).shape
        torch.Size([8, 32, 32])
    """
    check_backend_name(OP, backend)
    codes, packed, named = operands(OP, codebook, metric, backend)
    check_codebook(OP, x, codes)
    check_option(OP, "metric", metric, METRICS)
    check_option(OP, "precision", precision, PRECISIONS)
    return _nearest(x, codes, metric, precision, check_finite, named, packed)


def _check(call: NearestCall) -> None:
    check_lookup(OP, call.x, call.codebook)
    check_choices(OP, call.metric, call.precision)
    if call.check_finite:
        _raise_if_not_finite(call.x)


def _raise_if_not_finite(x: Tensor) -> None:
    bad = ~x.isfinite().all(dim=-1)
    if bad.any():
        first = tuple(bad.nonzero()[0].tolist())
        raise ValueError(
            f"{OP}: x must be finite (check_finite=True), got NaN or infinity in {int(bad.sum())} of {bad.numel()} "
            f"vectors, the first at {first}; look for the layer that made it"
        )


def golden_lookup(op: Op[Any], backend: str, call: LookupCall) -> str | None:
    """Lookups that are hard to decide, for this op and for those that rest on its kernels."""

    def lookup(x: Tensor, codebook: Tensor, metric: str, precision: str) -> Tensor:
        found: Tensor = NEAREST.kernels[backend].run(NearestCall(x, codebook, metric, precision, False, backend))
        return found

    kind = configuration(call.x, call.codebook, call.metric, call.precision)
    return gate.check_lookup(backend, call.x.device, lookup, reference.nearest, kind)


def _rows_and_codes(lookup: Callable[[Tensor, Tensor, str, str], Tensor]) -> Callable[[NearestCall], Tensor]:
    """``run`` of a backend whose lookup takes nothing but these four."""
    return lambda call: lookup(call.x, call.codebook, call.metric, call.precision)


NEAREST = Op(
    "nearest",
    NearestCall,
    {
        "cpu": Kernel(cpu.nearest),
        "triton": Kernel(
            _rows_and_codes(triton_backend.lazy_function("fastvq.ops.nearest.triton_ops", "nearest")),
            golden=(golden_lookup,),
        ),
        "cuda": Kernel(_rows_and_codes(cuda.nearest), golden=(golden_lookup,)),
        "reference": Kernel(_rows_and_codes(reference.nearest)),
    },
    check=_check,
    fake=lambda call: call.x.new_empty(call.x.shape[:-1], dtype=torch.int64),
)
_nearest = register(NEAREST)
