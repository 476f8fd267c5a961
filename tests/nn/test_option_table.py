"""Masks, vectors that are not finite and empty batches, with every option and mode of the quantizers.

The contract is that of the ops. A masked vector gives zeros, index -1, no loss, no gradient and no statistics. A real
vector that holds NaN or infinity gets index 0, makes the losses NaN and gives no statistics. Every other vector
gives the result of a separate batch.
"""

import copy
import functools

import pytest
import torch

from fastvq.nn import GroupedVQ, ResidualVQ, VectorQuantizer, update_codebooks
from tests.support.cases import generator

D, K, N = 8, 5, 12
OPTIONS = {
    "euclidean": lambda **o: VectorQuantizer(D, K, **o),
    "cosine": lambda **o: VectorQuantizer(D, K, metric="cosine", **o),
    "dot": lambda **o: VectorQuantizer(D, K, metric="dot", **o),
    "rotation": lambda **o: VectorQuantizer(D, K, estimator="rotation", **o),
    "learnable": lambda **o: VectorQuantizer(D, K, learnable=True, **o),
    "learnable cosine": lambda **o: VectorQuantizer(D, K, learnable=True, metric="cosine", **o),
    "fast": lambda **o: VectorQuantizer(D, K, precision="fast", **o),
    "projected": lambda **o: VectorQuantizer(D, K, code_dim=3, **o),
    "projected cosine": lambda **o: VectorQuantizer(D, K, code_dim=3, metric="cosine", **o),
    "heads": lambda **o: VectorQuantizer(D, K, heads=2, **o),
    "separate heads": lambda **o: VectorQuantizer(D, K, heads=2, separate_codebook_per_head=True, **o),
    "projected heads": lambda **o: VectorQuantizer(D, K, heads=2, code_dim=3, metric="cosine", **o),
    "channel first": lambda **o: VectorQuantizer(D, K, channel_first=True, **o),
    "grouped": lambda **o: GroupedVQ(D, K, 4, channel_first=True, **o),
    "residual": lambda **o: ResidualVQ(D, K, 3, **o),
    "residual shared": lambda **o: ResidualVQ(D, K, 3, shared_codebook=True, estimator="rotation", **o),
    "residual projected": lambda **o: ResidualVQ(D, K, 2, code_dim=3, channel_first=True, **o),
    "residual learnable": lambda **o: ResidualVQ(D, K, 2, learnable=True, **o),
}
MODES = ("forward", "manual", "eval", "frozen")
# Which of N vectors are masked, and which are not finite.
NONE, SOME, OTHERS, ALL = torch.zeros(N) > 0, torch.arange(N) % 3 == 0, torch.arange(N) % 4 < 2, torch.ones(N) > 0
BATCHES = {
    "clean": (NONE, NONE),
    "masked": (SOME, NONE),
    "all masked": (ALL, NONE),
    "not finite": (NONE, OTHERS),
    "none finite": (NONE, ALL),
    "masked and not finite": (SOME, OTHERS),
    "not finite where masked": (SOME, SOME),
    "all masked and not finite": (ALL, ALL),
    "real ones not finite": (SOME, ~SOME),
}


def made(options, mode, **more):
    torch.manual_seed(3)
    module = OPTIONS[options](update="manual" if mode == "manual" else "forward", **more)
    module.freeze(mode == "frozen")
    return module.train(mode != "eval")


def laid_out(module, rows):
    return rows.view(-1, 4, D).movedim(-1, 1).contiguous() if module.channel_first else rows


def forward(module, rows, mask=None):
    """(output with rows and indices flat, gradient of the rows, gradients of the parameters)"""
    x = rows.clone().requires_grad_()
    whole = mask is None or not module.channel_first
    q = module(laid_out(module, x), mask if whole else mask.view(-1, 4))
    quantized = q.quantized.movedim(1, -1) if module.channel_first else q.quantized
    assert quantized.dtype == rows.dtype
    quantized = quantized.reshape(-1, D)
    indices = q.indices.reshape(len(rows), -1) if len(rows) else q.indices.reshape(0, 1)
    assert indices.dtype == torch.int64 and q[2].shape == q[3].shape
    weight = torch.arange(1.0, D + 1)
    (quantized * weight).sum().backward()
    grads = [p.grad for p in module.parameters() if p.grad is not None]
    return quantized.detach(), indices, q[2].detach(), q[3].detach(), x.grad, grads


def tensors(module):
    names = ("counts", "pending_counts", "pending_sums")
    return {**module.state_dict(), **{n: getattr(module, n) for n in names if hasattr(module, n)}}


def same(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)


@functools.cache
def one_by_one(options):
    """The result of each vector in a separate batch, repeated four times, as a picture has four vectors."""
    return [forward(made(options, "eval"), r.expand(4, D)) for r in torch.randn(N, D, generator=generator(1))]


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("options", OPTIONS)
def test_table(options, mode, batch):
    masked, broken = BATCHES[batch]
    usable = ~masked & ~broken
    rows = torch.randn(N, D, generator=generator(1))
    poisoned = rows.clone()
    poisoned[broken] = torch.tensor([torch.nan, torch.inf]).repeat(N // 2)[broken][:, None]
    module = made(options, mode)
    before = copy.deepcopy(tensors(module))
    quantized, indices, commitment, codebook, grad, parameters = forward(
        module, poisoned, ~masked if masked.any() else None
    )
    expected = one_by_one(options)
    assert not quantized[masked].any() and (indices[masked] == -1).all()
    assert (indices[~masked & broken] == 0).all() and quantized[~masked].isfinite().all()
    for r in usable.nonzero()[:, 0].tolist():
        assert torch.equal(indices[r], expected[r][1][0])
        # A projection is a matrix product of torch's, whose last bits follow the number of rows.
        torch.testing.assert_close(quantized[r], expected[r][0][0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(grad[r], expected[r][4][0], rtol=1e-4, atol=1e-4)
    assert not grad[masked].any(), "a masked vector has a gradient"
    if not (broken & ~masked).any():
        assert all(g.isfinite().all() for g in parameters), "what is masked reaches a parameter"
        losses = torch.stack([expected[r][2] for r in usable.nonzero()[:, 0].tolist()] or [torch.zeros(())])
        torch.testing.assert_close(commitment, losses.mean(0).expand(commitment.shape), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(codebook, commitment / module.commitment_weight, rtol=1e-6, atol=1e-6)
    else:
        assert commitment.isnan().all() and codebook.isnan().all()
    # Learning: from the usable vectors alone, or not at all.
    after = tensors(module)
    if mode in ("eval", "frozen") or not usable.any():
        assert same(after, before)
        return
    parts = 2 if options in ("heads", "projected heads") else module.n_levels if hasattr(module, "n_levels") else 1
    counted = module.pending_counts if mode == "manual" else module.counts
    shared = not module.lead
    assert (counted.sum(-1) == usable.sum() * (parts if shared else 1)).all()
    update_codebooks(module)
    alone = made(options, mode)
    alone.channel_first = False
    forward(alone, rows[usable])
    update_codebooks(alone)
    for name, t in tensors(alone).items():
        torch.testing.assert_close(tensors(module)[name], t, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("options", OPTIONS)
def test_empty(options, mode, masked):
    module = made(options, mode, kmeans_init=True)
    before = copy.deepcopy(tensors(module))
    mask = torch.zeros(0, dtype=torch.bool) if masked else None
    quantized, indices, commitment, codebook, grad, _ = forward(module, torch.zeros(0, D), mask)
    assert quantized.shape == grad.shape == (0, D) and indices.numel() == 0
    assert not commitment.any() and not codebook.any()
    update_codebooks(module)
    assert same(tensors(module), before)


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("mode", ["forward", "manual"])
@pytest.mark.parametrize("options", OPTIONS)
def test_start_and_dead_codes(options, mode, batch):
    """k-means starts with the first usable vector; codes are always finite and never come from a masked vector."""
    masked, broken = BATCHES[batch]
    rows = torch.randn(N, D, generator=generator(1))
    rows[masked] = 1e6
    rows[broken] = torch.nan
    module = made(options, mode, kmeans_init=True, dead_code_threshold=1.0)
    for _ in range(2):
        forward(module, rows, ~masked)
        update_codebooks(module)
    assert bool(module.initialised) == bool((~masked & ~broken).any())
    assert all(t.isfinite().all() for t in module.state_dict().values())
    assert module.codebook.abs().max() < 100
    module(laid_out(module, torch.randn(N, D)))
    assert module.initialised


@pytest.mark.parametrize("options", OPTIONS)
def test_masks_that_do_not_fit_are_named(options):
    module, x = made(options, "forward", kmeans_init=True), torch.randn(N, D)
    shape = r"\[3, 4\]" if module.channel_first else rf"\[{N}\]"
    for mask, error, message in (
        (torch.ones(3, dtype=torch.bool), ValueError, rf"{module.owner}: mask must be {shape}.*got \[3\]"),
        (torch.ones(N), TypeError, rf"{module.owner}: mask must be a bool tensor, got torch.float32"),
        ([True] * N, TypeError, rf"{module.owner}: mask must be a bool tensor, got list"),
    ):
        with pytest.raises(error, match=message):
            module(laid_out(module, x), mask)
