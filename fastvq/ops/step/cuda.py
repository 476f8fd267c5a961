"""A training step's forward by the CUDA C++ kernels.

The kernels that settle a row's code also write the code and measure its distance, and either add the row to the sums at
once (``deterministic=False``) or note which sum it belongs to, so that the statistics need not look at indices and
finiteness again.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastvq.ops.quantize.call import QuantizeCall
from fastvq.ops.quantize.cuda import forward
from fastvq.ops.step.call import VQStepCall

__all__ = ["vq_step"]


def vq_step(call: VQStepCall) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """With ``deterministic=False`` the sums are added by atomics."""
    x, codebook = call.x, call.codebook
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    sums = torch.empty(codebook.shape, dtype=wide, device=x.device)
    counts = torch.empty(codebook.shape[:-1], dtype=torch.int64, device=x.device)
    outputs = forward(QuantizeCall(*call[:8]), (sums, counts), call.deterministic)
    return *outputs, sums, counts
