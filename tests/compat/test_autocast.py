"""Under autocast a patched lookup stays the float32 one; the peer's own does not."""

import copy
from types import SimpleNamespace

import pytest
import torch

import fastvq
from tests.support.compat import doubles
from tests.support.compat.peers import peer, peer_part

N, D, K = 2000, 32, 256


def rows() -> torch.Tensor:
    return torch.randn(N, D, generator=torch.Generator().manual_seed(0))


def as_image(x):
    return x.T.reshape(1, D, 40, N // 40)


def encodec():
    return peer_part("encodec.quantization.core_vq").EuclideanCodebook(D, K), lambda m: m.encode(rows())


def transformers_encodec():
    part = peer("transformers.models.encodec.modeling_encodec")
    made = part.EncodecEuclideanCodebook(SimpleNamespace(codebook_size=K, codebook_dim=D))
    made.embed.normal_()
    return made, lambda m: m.encode(rows())


def chameleon():
    part = peer("transformers.models.chameleon.modeling_chameleon")
    made = part.ChameleonVQVAEVectorQuantizer(SimpleNamespace(num_embeddings=K, embed_dim=D))
    return made, lambda m: m(as_image(rows()))[2]


def emu3():
    made = peer("transformers.models.emu3.modeling_emu3").Emu3VQVAEVectorQuantizer(
        SimpleNamespace(codebook_size=K, embed_dim=D)
    )
    made.embedding.weight.data.normal_()
    return made, lambda m: m(as_image(rows())[:, None])


def rosinality():
    return doubles.Quantize(D, K), lambda m: m(rows())[2]


def taming():
    made = doubles.VectorQuantizer2(K, D, 0.25)
    made.embedding.weight.data.normal_()
    return made, lambda m: m(as_image(rows()))[2][2]


@pytest.mark.parametrize("make", [encodec, transformers_encodec, chameleon, emu3, rosinality, taming])
def test_bfloat16(make):
    torch.manual_seed(0)
    theirs, call = make()
    theirs.eval()
    ours = copy.deepcopy(theirs)
    fastvq.patch(ours, strict=True)
    plain = call(ours)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(call(ours), plain)
        # About one in a hundred, by luck of the draw; what matters is that it is not none.
        assert not torch.equal(call(theirs), plain)


def test_vector_quantize_pytorch_trains_the_same_in_float32_and_under_autocast():
    vqp = peer("vector_quantize_pytorch")
    torch.manual_seed(0)
    plain = vqp.VectorQuantize(D, K)
    fastvq.patch(plain)
    cast = copy.deepcopy(plain)
    a = plain(rows()[None])
    with torch.autocast("cpu", torch.bfloat16):
        b = cast(rows()[None])
    assert torch.equal(a[1], b[1])
    for x, y in zip(plain.state_dict().values(), cast.state_dict().values(), strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models_are_looked_up_exactly(dtype):
    """The numbers a half precision model holds, compared without rounding; losses stay in its precision."""
    torch.manual_seed(0)
    model = doubles.VectorQuantizer2(K, D, 0.25).to(dtype)
    model.embedding.weight.data.normal_()
    z = as_image(rows()).to(dtype)
    fastvq.patch(model)
    quantized, loss, (_, _, indices) = model(z)
    assert quantized.dtype == loss.dtype == dtype
    wide = torch.cdist(rows().to(dtype).double(), model.embedding.weight.double())
    picked = wide[torch.arange(N), indices]
    assert torch.equal(picked, wide.min(1).values)
