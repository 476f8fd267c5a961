"""What bench_ema.py and bench_train_step.py compare: ways to sum vectors by code, and whole training steps.

A provider is prepared once for a case, which is not timed, and then called again and again. Every step
owns its buffers, which change with every call.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvq.nn import ResidualVQ, VectorQuantizer
from fastvq.ops import code_statistics, nearest, quantize
from lookup.providers import addmm_argmin, always, needs

DECAY, EPS, BETA = 0.99, 1e-5, 0.25


@dataclass(frozen=True)
class Learner:
    name: str
    setting: str
    prepare: Callable[..., Callable[[], object]]
    unavailable: Callable[[], str | None] = always
    ours: bool = False


# ---- statistics: prepare(x [N, D], indices [N], n_codes) -> call() -> (sums [K, D], counts [K])


def index_add(x: Tensor, indices: Tensor, n_codes: int) -> tuple[Tensor, Tensor]:
    return x.new_zeros(n_codes, x.shape[1]).index_add_(0, indices, x), torch.bincount(indices, minlength=n_codes)


def scatter_add(x: Tensor, indices: Tensor, n_codes: int) -> tuple[Tensor, Tensor]:
    sums = x.new_zeros(n_codes, x.shape[1]).scatter_add_(0, indices[:, None].expand_as(x), x)
    return sums, torch.bincount(indices, minlength=n_codes)


def one_hot(x: Tensor, indices: Tensor, n_codes: int) -> tuple[Tensor, Tensor]:
    hot = F.one_hot(indices, n_codes).to(x.dtype)
    return hot.t() @ x, hot.sum(0).long()


def on(function: Callable[..., object]) -> Callable[..., Callable[[], object]]:
    return lambda *arguments: lambda: function(*arguments)


STATISTICS = (
    Learner("fastvq", "fastvq.ops.code_statistics", on(code_statistics), ours=True),
    Learner("index_add_", "zeros.index_add_(0, indices, x) and torch.bincount", on(index_add)),
    Learner("scatter_add_", "zeros.scatter_add_(0, indices expanded, x) and torch.bincount", on(scatter_add)),
    Learner("one-hot", "F.one_hot(indices).T @ x in float32, as most EMA quantizers write it", on(one_hot)),
    Learner("read", "x.sum(), one pass over x: what the memory allows", lambda x, i, k: lambda: x.sum()),
)


# ---- a training step: prepare(x [N, D], gradient [N, D], codebook [K, D]) -> call() -> (indices, ...)


class TorchStep(nn.Module):
    """The usual quantizer in plain torch: lookup by a product, straight-through, EMA with Laplace smoothing."""

    def __init__(self, codebook: Tensor, statistics: Callable[..., tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        self.codebook, self.embed_sum = codebook.clone(), codebook.clone()
        self.cluster_size = torch.ones(len(codebook))
        self.statistics = statistics

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        with torch.no_grad():
            indices = addmm_argmin(x, self.codebook)
            codes = self.codebook[indices]
        loss = BETA * F.mse_loss(x, codes)
        quantized = x + (codes - x).detach()
        with torch.no_grad():
            sums, counts = self.statistics(x, indices, len(self.codebook))
            self.embed_sum.lerp_(sums, 1 - DECAY)
            self.cluster_size.lerp_(counts.float(), 1 - DECAY)
            total = self.cluster_size.sum()
            size = (self.cluster_size + EPS) / (total + len(self.codebook) * EPS) * total
            torch.div(self.embed_sum, size[:, None], out=self.codebook)
        return quantized, indices, loss


def step(module: Callable[..., tuple[Tensor, ...]], x: Tensor, gradient: Tensor) -> Callable[[], Tensor]:
    """Forward, and backward from a gradient of the quantized vectors and from the losses."""

    def run() -> Tensor:
        leaf = x.detach().requires_grad_()
        quantized, indices, loss = module(leaf)[:3]
        torch.autograd.backward([quantized, loss.sum()], [gradient, torch.ones(())])
        return indices

    return run


def fastvq_step(x: Tensor, gradient: Tensor, codebook: Tensor) -> Callable[[], Tensor]:
    module = VectorQuantizer(x.shape[1], len(codebook), decay=DECAY, commitment_weight=BETA)
    module.codebook.copy_(codebook)
    module.embed_sum.copy_(codebook)
    return step(module, x, gradient)


def torch_step(statistics: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., Callable[[], Tensor]]:
    return lambda x, gradient, codebook: step(TorchStep(codebook, statistics), x, gradient)


def peer_step(x: Tensor, gradient: Tensor, codebook: Tensor) -> Callable[[], Tensor]:
    from vector_quantize_pytorch import VectorQuantize

    module = VectorQuantize(dim=x.shape[1], codebook_size=len(codebook))
    with torch.no_grad():
        module._codebook.embed.copy_(codebook[None])
        module._codebook.embed_avg.copy_(codebook[None])
    return lambda: step(module, x[None], gradient[None])()[0]


STEPS = (
    Learner("fastvq", "fastvq.nn.VectorQuantizer, update in the forward", fastvq_step, ours=True),
    Learner("torch index_add_", "addmm and argmin, gather, index_add_ and bincount", torch_step(index_add)),
    Learner("torch scatter_add_", "the same with scatter_add_", torch_step(scatter_add)),
    Learner("torch one-hot", "the same with a one-hot product", torch_step(one_hot)),
    Learner(
        "vq-pytorch",
        "vector-quantize-pytorch: VectorQuantize(dim, codebook_size), its defaults (rotation trick)",
        peer_step,
        needs("vector_quantize_pytorch"),
    ),
)


# ---- the same for residual quantizers: codebook [Q, K, D]


def fastvq_residual(x: Tensor, gradient: Tensor, codebooks: Tensor) -> Callable[[], Tensor]:
    n_levels, n_codes, dim = codebooks.shape
    module = ResidualVQ(dim, n_codes, n_levels, decay=DECAY, commitment_weight=BETA)
    module.codebook.copy_(codebooks)
    module.embed_sum.copy_(codebooks)
    return step(module, x, gradient)


def fastvq_levels(x: Tensor, gradient: Tensor, codebooks: Tensor) -> Callable[[], Tensor]:
    """A VectorQuantizer a level, in a loop of Python's."""
    quantizers = []
    for codebook in codebooks:
        module = VectorQuantizer(x.shape[1], len(codebook), decay=DECAY, commitment_weight=BETA)
        module.codebook.copy_(codebook)
        module.embed_sum.copy_(codebook)
        quantizers.append(module)

    def forward(leaf: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        residual, total, indices, losses = leaf, 0.0, [], []
        for module in quantizers:
            q = module(residual)
            residual, total = residual - q.quantized.detach(), total + q.quantized.detach()
            indices.append(q.indices)
            losses.append(q.commitment_loss)
        return leaf + (total - leaf).detach(), torch.stack(indices, -1), torch.stack(losses)

    return step(forward, x, gradient)


def peer_residual(x: Tensor, gradient: Tensor, codebooks: Tensor) -> Callable[[], Tensor]:
    from vector_quantize_pytorch import ResidualVQ as PeerResidualVQ

    n_levels, n_codes, dim = codebooks.shape
    module = PeerResidualVQ(dim=dim, codebook_size=n_codes, num_quantizers=n_levels)
    with torch.no_grad():
        for layer, codebook in zip(module.layers, codebooks, strict=True):
            layer._codebook.embed.copy_(codebook[None])
            layer._codebook.embed_avg.copy_(codebook[None])
    return lambda: step(module, x[None], gradient[None])()[0]


RESIDUAL_STEPS = (
    Learner("fastvq", "fastvq.nn.ResidualVQ, update in the forward", fastvq_residual, ours=True),
    Learner("fastvq levels", "a fastvq.nn.VectorQuantizer a level, in a loop", fastvq_levels, ours=True),
    Learner(
        "vq-pytorch",
        "vector-quantize-pytorch: ResidualVQ(dim, codebook_size, num_quantizers), its defaults",
        peer_residual,
        needs("vector_quantize_pytorch"),
    ),
)


def exact_levels(x: Tensor, codebooks: Tensor) -> Tensor:
    """Indices [N, Q] by the loop over ``nearest``."""
    indices = []
    for codebook in codebooks:
        i = nearest(x, codebook)
        indices.append(i)
        x = x - quantize(x, codebook).quantized
    return torch.stack(indices, -1)
