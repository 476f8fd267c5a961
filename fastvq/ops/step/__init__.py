"""Quantization and the statistics that learn a codebook, in one op: what a training step needs of x."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastvq._checks import check_backend_name, check_codebook, check_mask, check_number, check_option
from fastvq.backends import cpu as cpu_backend
from fastvq.backends import triton as triton_backend
from fastvq.backends.registry import Implementation, choose
from fastvq.ops._contract import check_choices, check_lookup
from fastvq.ops._library import register, serialisable
from fastvq.ops._transforms import no_forward_mode
from fastvq.ops.nearest import METRICS, PRECISIONS
from fastvq.ops.quantize import ESTIMATORS, backward, setup_context
from fastvq.ops.quantize import FORWARD as QUANTIZE
from fastvq.ops.step import cpu, cuda, reference

__all__ = ["VQStep", "vq_step"]

OP = "fastvq.ops.vq_step"
IMPLEMENTATIONS = {
    "cpu": Implementation(cpu.vq_step, cpu_backend.why_unsupported),
    "triton": Implementation(
        triton_backend.lazy_function("fastvq.ops.step.triton_ops", "vq_step"),
        lambda *arguments: QUANTIZE["triton"].why_unsupported(*arguments[:6]),
    ),
    "cuda": Implementation(cuda.vq_step, cuda.why_unsupported),
    "reference": Implementation(reference.vq_step, lambda *_: None),
}


@serialisable("ops.VQStep")
class VQStep(NamedTuple):
    """What ``vq_step`` returns; the shapes are those of its docstring."""

    quantized: Tensor
    indices: Tensor
    commitment_loss: Tensor
    codebook_loss: Tensor
    sums: Tensor
    counts: Tensor


def vq_step(
    x: Tensor,  # [..., D], or [H, ..., D] with heads
    codebook: Tensor,  # [K, D], or [H, K, D]
    *,
    metric: str = "euclidean",
    estimator: str = "straight_through",
    mask: Tensor | None = None,  # [...] or [H, ...] bool
    beta: float = 1.0,
    precision: str = "exact",
    deterministic: bool = True,
    backend: str | None = None,
) -> VQStep:
    """One training step of a quantizer up to its update: ``quantize``, and ``code_statistics`` of what it chose.

    .. math::
        quantized = c_{index}, \\quad
        commitment\\_loss = \\beta \\, \\mathrm{mean} |x - sg(c)|^2, \\quad
        codebook\\_loss = \\mathrm{mean} |sg(x) - c|^2, \\quad
        sums_k = \\sum_{r: index_r = k} x_r, \\quad counts_k = |\\{r: index_r = k\\}|

    (van den Oord et al. 2017.) ``ema_update_`` makes the new codebook from sums and counts, summed over processes
    where there are several. A backend may take the statistics of some vectors while it still holds them from their
    lookup: x is then read once rather than twice.

    Args:
        x, codebook, metric, estimator, mask, beta, precision, backend: as in ``fastvq.ops.quantize``; the codebook is a
            tensor, as one that learns is packed anew at every step.
        deterministic: as in ``fastvq.ops.code_statistics``.

    Returns:
        ``VQStep``: quantized, indices, commitment_loss and codebook_loss of ``fastvq.ops.quantize`` to the bit, with
        its gradients; sums [K, D], float32 (float64 for float64 x), and counts [K] int64, with heads [H, K, D] and
        [H, K], without gradient. Masked vectors and those that hold NaN or infinity are left out of both. A sum is
        accumulated in float64, within the bound that ``fastvq.ops.code_statistics`` states. On a CPU it adds rows in
        their order: the same bits as ``code_statistics``, whatever the number of threads and the instruction set. On a
        GPU the order is fixed unless ``deterministic`` is False.

    Raises:
        ValueError, TypeError: as ``fastvq.ops.quantize``.
        RuntimeError: a second derivative is asked for.

    Example:
        >>> x, codebook = torch.randn(8, 100, 64, requires_grad=True), torch.randn(512, 64)
        >>> step = vq_step(x, codebook, beta=0.25)
        >>> step.quantized.shape, step.indices.shape, step.sums.shape, step.counts.shape
        (torch.Size([8, 100, 64]), torch.Size([8, 100]), torch.Size([512, 64]), torch.Size([512]))
    """
    check_backend_name(OP, backend)
    check_number(OP, "beta", beta)
    check_codebook(OP, x, codebook)
    check_option(OP, "metric", metric, METRICS)
    check_option(OP, "estimator", estimator, ESTIMATORS)
    check_option(OP, "precision", precision, PRECISIONS)
    check_mask(OP, x, mask)
    quantized, commitment_loss, codebook_loss, indices, sums, counts = _vq_step(
        x, codebook, mask, metric, estimator, float(beta), precision, backend, deterministic
    )
    if estimator == "none":
        quantized = quantized.detach()
    return VQStep(quantized, indices, commitment_loss, codebook_loss, sums, counts)


def _run(
    x: Tensor, codebook: Tensor, mask: Tensor | None, metric: str, estimator: str, beta: float, precision: str,
    backend: str | None, deterministic: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    check_lookup(OP, x, codebook, mask)
    check_choices(OP, metric, precision)
    arguments = (x, codebook, mask, metric, beta, precision, deterministic)
    return choose(OP, IMPLEMENTATIONS, backend, *arguments)(*arguments)


def _fake(
    x: Tensor, codebook: Tensor, mask: Tensor | None, metric: str, estimator: str, beta: float, precision: str,
    backend: str | None, deterministic: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    real = torch.float64 if x.dtype == torch.float64 else torch.float32
    return (
        torch.empty_like(x),
        x.new_empty((), dtype=real),
        x.new_empty((), dtype=real),
        x.new_empty(x.shape[:-1], dtype=torch.int64),
        x.new_empty(codebook.shape, dtype=real),
        x.new_empty(codebook.shape[:-1], dtype=torch.int64),
    )


# The arguments are those of quantize, in its order: its gradient is this op's too.
_vq_step = register(
    "vq_step(Tensor x, Tensor codebook, Tensor? mask, str metric, str estimator, float beta, str precision, "
    "str? backend, bool deterministic) -> (Tensor quantized, Tensor commitment_loss, Tensor codebook_loss, "
    "Tensor indices, Tensor sums, Tensor counts)",
    _run, _fake, backward, setup_context, no_forward_mode(OP, "the estimator defines what goes back alone"),
)  # fmt: skip
