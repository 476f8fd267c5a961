"""Quantization and the statistics that learn a codebook, in one op: what a training step needs of x."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from fastvq._checks import check_backend_name, check_codebook, check_mask, check_option, check_weight
from fastvq.backends import triton as triton_backend
from fastvq.backends.golden import calls as golden_calls
from fastvq.ops._contract import check_choices, check_lookup
from fastvq.ops._library import serialisable
from fastvq.ops._op import CUDA_FIRST, Autograd, Kernel, Op, known_results, register, rests_on
from fastvq.ops._transforms import no_forward_mode
from fastvq.ops.nearest import METRICS, NEAREST, PRECISIONS
from fastvq.ops.quantize import ESTIMATORS, backward, setup_context
from fastvq.ops.statistics import CODE_STATISTICS
from fastvq.ops.statistics.cuda import why_too_many_vectors
from fastvq.ops.step import cpu, cuda, reference
from fastvq.ops.step.call import VQStepCall

__all__ = ["VQStep", "vq_step"]

OP = "fastvq.ops.vq_step"


@serialisable("ops.VQStep")
class VQStep(NamedTuple):
    """What ``vq_step`` returns.

    Attributes:
        quantized: [..., D] or [H, ..., D], of x's dtype: the code of every vector.
        indices: [...] or [H, ...] int64; -1 where masked.
        commitment_loss: [] float32 (float64 for float64 x), trains x.
        codebook_loss: [] float32 (float64 for float64 x), trains the codebook.
        sums: [K, D] or [H, K, D] float32 (float64 for float64 x), the sum of the vectors of each code.
        counts: [K] or [H, K] int64, their number.
    """

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
    metric: Literal["euclidean", "cosine", "dot"] = "euclidean",
    estimator: Literal["straight_through", "rotation", "none"] = "straight_through",
    mask: Tensor | None = None,  # [...] or [H, ...] bool
    beta: float = 1.0,
    precision: Literal["exact", "fast"] = "exact",
    deterministic: bool = True,
    backend: Literal["cpu", "triton", "cuda", "reference"] | None = None,
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
    check_weight(OP, "beta", beta)
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


def _check(call: VQStepCall) -> None:
    check_lookup(OP, call.x, call.codebook, call.mask)
    check_choices(OP, call.metric, call.precision)


def _fake(call: VQStepCall) -> tuple[Tensor, ...]:
    x, codebook = call.x, call.codebook
    real = torch.float64 if x.dtype == torch.float64 else torch.float32
    return (
        torch.empty_like(x),
        x.new_empty((), dtype=real),
        x.new_empty((), dtype=real),
        x.new_empty(x.shape[:-1], dtype=torch.int64),
        x.new_empty(codebook.shape, dtype=real),
        x.new_empty(codebook.shape[:-1], dtype=torch.int64),
    )


def _reference(call: VQStepCall) -> tuple[Tensor, ...]:
    return reference.vq_step(call.x, call.codebook, call.mask, call.metric, call.beta, call.precision)


VQ_STEP = Op(
    "vq_step",
    VQStepCall,
    {
        "cpu": Kernel(cpu.vq_step),
        "triton": Kernel(
            triton_backend.lazy_function("fastvq.ops.step.triton_ops", "vq_step"),
            lambda call: triton_backend.why_too_many_rows(call.x),
            (rests_on(NEAREST),),
        ),
        "cuda": Kernel(
            cuda.vq_step,
            lambda call: why_too_many_vectors(call.x, call.codebook),
            (rests_on(NEAREST), rests_on(CODE_STATISTICS), known_results(golden_calls.step)),
        ),
        "reference": Kernel(_reference),
    },
    check=_check,
    fake=_fake,
    returns="(Tensor quantized, Tensor commitment_loss, Tensor codebook_loss, Tensor indices, Tensor sums, "
    "Tensor counts)",
    # A training step of 1048576 x 1024 x 64 takes 5.7 ms by CUDA C++ and 7.2 ms by Triton on an H100:
    # benchmarks/results/nvidia_h100_80gb_hbm3/training_step.csv.
    order=CUDA_FIRST,
    autograd=Autograd(backward, no_forward_mode(OP, "the estimator defines what goes back alone"), setup_context),
)
_vq_step = register(VQ_STEP)
