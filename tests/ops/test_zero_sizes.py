"""Sizes of zero, and vectors wider than the filter takes: the definition's result, or an empty one."""

import pytest
import torch

from fastvq.ops import code_statistics, nearest, pack_codebook, quantize, residual_quantize, vq_step
from tests.conftest import CPU_ENGINES
from tests.support.cases import generator


@pytest.mark.parametrize("wide_engine", CPU_ENGINES)  # the reference takes a second a call here
def test_wide_vectors(wide_engine, use_engine):
    backend, g = use_engine(wide_engine), generator(3)
    for dim in (16384, 16385):
        x, codebook = torch.randn(3, dim, generator=g), torch.randn(5, dim, generator=g)
        expected = (x[:, None].double() - codebook.double()).square().sum(-1).argmin(-1)
        assert torch.equal(nearest(x, codebook, backend=backend), expected)
        assert torch.equal(nearest(x, pack_codebook(codebook, backend=backend)), expected)
        step = vq_step(x, codebook, backend=backend)
        assert torch.equal(step.indices, expected) and torch.equal(step.quantized, codebook[expected])
        assert torch.equal(residual_quantize(x, codebook[None], backend=backend).indices[:, 0], expected)


@pytest.mark.parametrize("shape", [(0, 7), (2, 0, 7), (0, 3, 7), (3, 0, 2, 7)])
@pytest.mark.parametrize("heads", [False, True])
def test_no_rows(shape, heads, engine):
    codebook = torch.randn(5, 7)
    if heads:
        shape, codebook = (2, *shape), codebook.expand(2, 5, 7).contiguous()
    x = torch.randn(shape, requires_grad=True)
    codebook.requires_grad_()
    q = quantize(x, codebook, backend=engine)
    (q.quantized.sum() + q.commitment_loss + q.codebook_loss).backward()
    assert q.indices.shape == shape[:-1] and q.commitment_loss == 0 == q.codebook_loss
    assert x.grad.shape == shape and not codebook.grad.any()
    indices = torch.empty(shape[:-1], dtype=torch.int64)
    sums, counts = code_statistics(x, indices, 5, n_heads=2 if heads else None, backend=engine)
    assert not sums.any() and not counts.any()
    step = vq_step(x, codebook, backend=engine)
    assert not step.sums.any() and not step.counts.any()


def test_no_rows_of_residuals(engine):
    x, codebooks = torch.randn(2, 0, 7, requires_grad=True), torch.randn(3, 5, 7, requires_grad=True)
    q = residual_quantize(x, codebooks, statistics=True, backend=engine)
    (q.quantized.sum() + q.commitment_losses.sum() + q.codebook_losses.sum()).backward()
    assert q.indices.shape == (2, 0, 3) and not q.sums.any() and not q.counts.any() and not codebooks.grad.any()
