"""A training step's forward by the C++ kernels: on one thread a block of rows gives its statistics while in cache."""

from __future__ import annotations

import torch
from torch import Tensor

from fastvq.ops.quantize.call import QuantizeCall
from fastvq.ops.quantize.cpu import quantize
from fastvq.ops.step.call import VQStepCall

__all__ = ["vq_step"]


def vq_step(call: VQStepCall) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    x, codebook = call.x, call.codebook
    sums = torch.empty(codebook.shape, dtype=torch.float64 if x.dtype == torch.float64 else torch.float32, device="cpu")
    counts = torch.empty(codebook.shape[:-1], dtype=torch.int64, device="cpu")
    return *quantize(QuantizeCall(*call[:8]), (sums, counts)), sums, counts
