"""DAC's residual quantizer of transformers, in place where nobody looks: the peer's results bit by bit."""

import copy
from types import SimpleNamespace

import pytest
import torch

import fastvq
from tests.support import oracle
from tests.support.compat.peers import peer

B, C, D, K, T, Q = 3, 40, 8, 24, 61, 4


def make(dropout: float = 0.0):
    config = SimpleNamespace(
        codebook_dim=D, hidden_size=C, codebook_size=K, n_codebooks=Q, quantizer_dropout=dropout
    )  # fmt: skip
    torch.manual_seed(0)
    return peer("transformers.models.dac.modeling_dac").DacResidualVectorQuantizer(config).eval()


def sound() -> torch.Tensor:
    return torch.randn(B, C, T, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def pair():
    """Patched in whole; and with patched levels in the peer's own loop."""
    model = make()
    loop = copy.deepcopy(model)
    for level in loop.quantizers:
        fastvq.patch(level, strict=True)
    assert len(fastvq.patch(model, strict=True).replaced) == Q + 1
    return model, loop


def same(a, b) -> None:
    for x, y in zip(a, b, strict=True):
        assert torch.equal(x, y) and x.dtype == y.dtype and x.stride() == y.stride()


@pytest.mark.parametrize("n_levels", [None, 1, 3, Q + 2])
def test_equal_to_the_loop(pair, n_levels):
    model, loop = pair
    x = sound()
    with torch.no_grad():
        same(model(x, n_levels), loop(x, n_levels))
    assert torch.equal(x, sound())


def test_indices_are_the_float64_ones_of_the_latents_that_come_out(pair):
    model, _ = pair
    with torch.no_grad():
        _, indices, latents, *_ = model(sound())
    for q, latent in enumerate(latents.split(D, dim=1)):
        expected = oracle.nearest(latent.transpose(1, 2).reshape(-1, D), model.quantizers[q].codebook.weight, "cosine")
        assert torch.equal(indices[:, q].flatten(), expected)


def test_results_do_not_share_memory_with_what_the_next_call_writes(pair):
    model, _ = pair
    with torch.no_grad():
        first = model(sound())
        kept = [t.clone() for t in first]
        model(sound() * 2)
    same(first, kept)


def test_with_gradients_it_is_the_peers_loop(pair):
    for train in (False, True):
        results = []
        for one in pair:
            one.train(train).zero_grad()
            x = sound().requires_grad_()
            torch.manual_seed(2)
            values, _, _, commitment, codebook = one(x)
            (values.square().mean() + commitment.mean() + codebook.mean()).backward()
            results.append([x.grad, *(p.grad for p in one.parameters())])
        same(*results)


def test_what_hooks_keep_is_not_written_over(pair):
    results = []
    for one in pair:
        kept = []
        for level in one.quantizers:
            level.in_proj.register_forward_hook(lambda _, given, out, kept=kept: kept.extend([given[0], out]))
            level.out_proj.register_forward_hook(lambda _, given, out, kept=kept: kept.append(out))
        with torch.no_grad():
            one(sound())
        results.append(kept)
    assert len(results[0]) == 3 * Q
    same(*results)


def test_autocast_and_no_levels(pair):
    model, loop = pair
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        same(model(sound()), loop(sound()))
    for one in pair:
        with pytest.raises(RuntimeError), torch.no_grad():
            one(sound(), 0)
