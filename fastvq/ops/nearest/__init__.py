"""Nearest-codebook lookup."""

from __future__ import annotations

import torch
from torch import Tensor

from fastvq._checks import check_backend_name, check_codebook, check_option
from fastvq.backends import cpu as cpu_backend
from fastvq.backends import triton as triton_backend
from fastvq.backends.golden import gate
from fastvq.backends.golden.cases import configuration
from fastvq.backends.registry import Implementation, choose
from fastvq.ops._contract import check_choices, check_lookup
from fastvq.ops._library import register
from fastvq.ops.nearest import cpu, cuda, reference
from fastvq.ops.nearest.packed import METRICS, PackedCodebook, operands, pack_codebook

__all__ = ["METRICS", "PRECISIONS", "PackedCodebook", "nearest", "operands", "pack_codebook"]

OP = "fastvq.ops.nearest"
PRECISIONS = ("exact", "fast")
_triton_nearest = triton_backend.lazy_function("fastvq.ops.nearest.triton_ops", "nearest")


def _refuse_triton(x: Tensor, codebook: Tensor, metric: str, precision: str) -> str | None:
    return triton_backend.why_unsupported(x) or gate.check_lookup(
        "triton", x.device, _triton_nearest, reference.nearest, configuration(x, codebook, metric, precision)
    )


IMPLEMENTATIONS = {
    "cpu": Implementation(cpu.nearest, cpu_backend.why_unsupported),
    "triton": Implementation(_triton_nearest, _refuse_triton),
    "cuda": Implementation(cuda.nearest, cuda.why_unsupported),
    "reference": Implementation(reference.nearest, lambda *_: None),
}


def nearest(
    x: Tensor,  # [..., D], or [H, ..., D] with heads
    codebook: Tensor | PackedCodebook,  # [K, D], or [H, K, D]
    *,
    metric: str = "euclidean",
    precision: str = "exact",
    check_finite: bool = False,
    backend: str | None = None,
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
    codes, layout, backend = operands(OP, codebook, metric, backend)
    check_codebook(OP, x, codes)
    check_option(OP, "metric", metric, METRICS)
    check_option(OP, "precision", precision, PRECISIONS)
    return torch.ops.fastvq.nearest(x, codes, metric, precision, check_finite, backend, layout)


def _run(
    x: Tensor, codebook: Tensor, metric: str, precision: str, check_finite: bool, backend: str | None,
    layout: Tensor | None = None,
) -> Tensor:  # fmt: skip
    check_lookup(OP, x, codebook)
    check_choices(OP, metric, precision)
    if check_finite:
        _raise_if_not_finite(x)
    run = choose(OP, IMPLEMENTATIONS, backend, x, codebook, metric, precision)
    if run is cpu.nearest:
        return cpu.nearest(x, codebook, metric, precision, layout)
    return run(x, codebook, metric, precision)


def _raise_if_not_finite(x: Tensor) -> None:
    bad = ~x.isfinite().all(dim=-1)
    if bad.any():
        first = tuple(bad.nonzero()[0].tolist())
        raise ValueError(
            f"{OP}: x must be finite (check_finite=True), got NaN or infinity in {int(bad.sum())} of {bad.numel()} "
            f"vectors, the first at {first}; look for the layer that made it"
        )


def _fake(
    x: Tensor, codebook: Tensor, metric: str, precision: str, check_finite: bool, backend: str | None,
    layout: Tensor | None = None,
) -> Tensor:  # fmt: skip
    return x.new_empty(x.shape[:-1], dtype=torch.int64)


register(
    "nearest(Tensor x, Tensor codebook, str metric, str precision, bool check_finite, str? backend, "
    "Tensor? layout=None) -> Tensor",
    _run,
    _fake,
)
