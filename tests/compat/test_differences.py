"""Where a patched quantizer differs from its peer on purpose: the rows of docs/drop_in.md."""

import copy
from types import SimpleNamespace

import pytest
import torch

import fastvq
from tests.support import oracle
from tests.support.compat.peers import peer


@pytest.fixture
def vector_quantize():
    def make(**options):
        torch.manual_seed(0)
        plain = peer("vector_quantize_pytorch").VectorQuantize(dim=8, codebook_size=16, **options)
        patched = copy.deepcopy(plain)
        fastvq.patch(patched, strict=True)
        return plain, patched

    return make


def test_nearly_equal_codes(vector_quantize):
    _, patched = vector_quantize()
    codes = patched._codebook.embed.data
    codes[:] = codes[:, :1] * 1e-3 + torch.randn(codes.shape) * 1e-8
    x = torch.randn(1, 50, 8) * 100
    assert torch.equal(patched.eval()(x)[1][0], oracle.nearest(x[0], codes[0]))
    codes[:] = codes[:, :1].clone()
    assert not patched(x)[1].any()


def test_zero_vectors_under_the_rotation_trick(vector_quantize):
    _, patched = vector_quantize(rotation_trick=True)
    x = torch.zeros(1, 3, 8, requires_grad=True)
    codes = patched._codebook.embed.detach().clone()
    quantized, indices, _ = patched(x)
    assert torch.equal(quantized, codes[0][indices])
    quantized.sum().backward()
    assert (x.grad == 1).all()


@pytest.mark.parametrize("shape", [(1, 0, 8), (0, 4, 8)])
def test_empty_batches(vector_quantize, shape):
    _, patched = vector_quantize()
    x = torch.randn(shape, requires_grad=True)
    quantized, indices, loss = patched(x)
    (quantized.sum() + loss.sum()).backward()
    assert quantized.shape == shape and indices.shape == shape[:-1] and (loss == 0).all()
    assert patched._codebook.embed.isfinite().all()


def test_exact_zeros_in_dac():
    config = SimpleNamespace(codebook_dim=8, hidden_size=16, codebook_size=4, n_codebooks=1)
    torch.manual_seed(0)
    level = peer("transformers.models.dac.modeling_dac").DacVectorQuantize(config).eval()
    fastvq.patch(level, strict=True)
    with torch.no_grad():
        level.codebook.weight[:] = level.codebook.weight.abs()
        level.codebook.weight[2] = 0
    latents = torch.zeros(1, 8, 3)
    latents[:, :, 1] = -1  # every other code points away from it
    indices = level.decode_latents(latents)[1]
    assert indices[0, 0] == indices[0, 2] == 0 and indices[0, 1] != 2
