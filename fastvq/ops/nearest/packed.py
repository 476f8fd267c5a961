"""A frozen codebook, laid out once as the kernels read it."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import Parameter

from fastvq._checks import check_backend_name, check_codes, check_option
from fastvq._shorten import shorten
from fastvq.backends import cpu as cpu_backend
from fastvq.backends import views
from fastvq.backends.registry import check_backend
from fastvq.ops._transforms import active, refuse_tangents

__all__ = ["PackedCodebook", "operands", "pack_codebook"]

OP = "fastvq.ops.pack_codebook"
METRICS = ("euclidean", "cosine", "dot")


class PackedCodebook:
    """What ``pack_codebook`` returns: a copy of the codebook and, for the CPU kernels, the layout that they read.

    It does not change: writing to the tensor it was made from, or to ``codebook``, which is a copy, has no effect on
    it. Pickling and ``copy.deepcopy`` keep the codes and lay them out again for the machine they arrive on, ``to`` for
    another device. Codes laid out under one ``FASTVQ_CPU_ISA`` serve calls under another as a plain codebook would.
    """

    __slots__ = ("_codes", "_layout", "backend", "metric")

    _codes: Tensor  # [K, D] or [H, K, D], contiguous
    _layout: Tensor | None  # bytes for csrc/cpu/lookup/packed_codebook.h; None where another backend will serve

    def __init__(self, codes: Tensor, metric: str, backend: str | None) -> None:
        self._codes = codes
        self.metric = metric
        self.backend = backend
        usable = cpu_backend.unavailable() is None and codes.device.type == "cpu" and backend in (None, "cpu")
        self._layout = torch.ops.fastvq.pack_codebook(codes, metric) if usable else None

    @property
    def codebook(self) -> Tensor:
        """A copy of the codes."""
        return self._codes.clone()

    @property
    def shape(self) -> torch.Size:
        return self._codes.shape

    @property
    def dtype(self) -> torch.dtype:
        return self._codes.dtype

    @property
    def device(self) -> torch.device:
        return self._codes.device

    def to(self, device: torch.device | str) -> PackedCodebook:
        """The same codes on another device, laid out for it; the same object where that is its device already."""
        codes = self._codes.to(device)
        return self if codes is self._codes else PackedCodebook(codes, self.metric, self.backend)

    def __reduce__(self) -> tuple[Any, ...]:
        return PackedCodebook, (self._codes, self.metric, self.backend)

    def __repr__(self) -> str:
        size = 0 if self._layout is None else self._layout.numel()
        backend = "" if self.backend is None else f", backend={self.backend!r}"
        return (
            f"PackedCodebook({list(self.shape)}, {self.dtype}, metric={self.metric!r}, device={self.device}{backend}, "
            f"{size / 2**20:.2f} MiB packed)"
        )


def pack_codebook(
    codebook: Tensor,  # [K, D] or [H, K, D]
    *,
    metric: Literal["euclidean", "cosine", "dot"] = "euclidean",
    backend: Literal["cpu", "triton", "cuda", "reference"] | None = None,
) -> PackedCodebook:
    """Lays a frozen codebook out once, for serving: ``nearest`` and ``quantize`` take the result in its place.

    Without it every call lays the codes out anew. That is a small part of a call with many vectors, and a large part of
    a call with few. Indices are the same either way.

    Args:
        codebook: codes, float32, float64, float16 or bfloat16; any strides. They are copied.
        metric: the metric of the lookups; a call with another one raises.
        backend: the backend of the lookups, unless they name another; None: the fastest that can serve each. Backends
            other than "cpu" lay nothing out and take the copy of the codes.

    Raises:
        ValueError: a shape that is no codebook's, an unknown metric or backend, a backend that cannot run here.
        TypeError: codebook is no floating-point tensor.

    Example:
        >>> packed = pack_codebook(torch.randn(512, 64))
        >>> nearest(torch.randn(32, 64), packed).shape
        torch.Size([32])
    """
    check_codes(OP, codebook)
    check_option(OP, "metric", metric, METRICS)
    check_backend_name(OP, backend)
    if backend is not None:
        check_backend(OP, backend)
    refuse_tangents(OP, "a packed codebook takes no derivative", codebook)
    plain = type(codebook) in (Tensor, Parameter) and not codebook.is_meta
    if plain and not active() and not torch.compiler.is_compiling():
        views.address(codebook)  # raises where there is none: torch's copy does not look
    return PackedCodebook(codebook.detach().clone(memory_format=torch.contiguous_format), metric, backend)


def operands(
    op: str, codebook: Tensor | PackedCodebook, metric: str, backend: str | None
) -> tuple[Tensor, Tensor | None, str | None]:
    """The codes, their layout if there is one, and the backend that a call on ``codebook`` names."""
    if not isinstance(codebook, PackedCodebook):
        return codebook, None, backend
    if not isinstance(metric, str) or metric != codebook.metric:
        raise ValueError(
            f"{op}: the codebook was packed for metric {codebook.metric!r}, got metric={shorten(metric)}; "
            f"pass metric={codebook.metric!r}, or pack it again"
        )
    return codebook._codes, codebook._layout, backend or codebook.backend
