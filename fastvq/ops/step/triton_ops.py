"""A training step's forward on a GPU: the launches of ``quantize``, then those of ``code_statistics``."""

from __future__ import annotations

from torch import Tensor

from fastvq.ops.quantize.call import QuantizeCall
from fastvq.ops.quantize.triton_forward import quantize
from fastvq.ops.statistics.triton_statistics import code_statistics
from fastvq.ops.step.call import VQStepCall

__all__ = ["vq_step"]


def vq_step(call: VQStepCall) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """With ``deterministic=False`` the sums are added by atomics."""
    quantized, commitment_loss, codebook_loss, indices = quantize(QuantizeCall(*call[:8]))
    heads = call.codebook.shape[0] if call.codebook.dim() == 3 else None
    sums, counts = code_statistics(call.x, indices, call.codebook.shape[-2], heads, call.deterministic)
    return quantized, commitment_loss, codebook_loss, indices, sums, counts
