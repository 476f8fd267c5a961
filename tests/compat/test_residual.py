"""Residual quantizers whose levels go through one kernel, against the peer's loop over patched levels: bit by bit."""

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import fastvq
from fastvq.compat import _residual
from tests.support import oracle
from tests.support.compat.peers import peer, peer_part

B, D, K, T, Q = 2, 16, 24, 61, 4


def sound(dim: int = D) -> torch.Tensor:
    return torch.randn(B, dim, T, generator=torch.Generator().manual_seed(7))


def seeded(model: nn.Module) -> nn.Module:
    """Random codes where a constructor leaves zeros for a checkpoint to fill, each level finer than the last."""
    torch.manual_seed(0)
    level = 0
    for name, buffer in model.named_buffers():
        if name.endswith(("embed", "embedding_sum", "embed_sum")):
            buffer.normal_().mul_(0.7**level)
            level += 1
    return model.eval()


def encodec(**options):
    core = peer_part("encodec.quantization.core_vq")
    given = {"num_quantizers": Q, "dim": D, "codebook_size": K, "kmeans_init": False, **options}
    return seeded(core.ResidualVectorQuantization(**given))


def moshi(**options):
    core = peer_part("moshi.quantization.core_vq")
    given = {"num_quantizers": Q, "codebook_offset": 0, "dim": D, "codebook_size": K, **options}
    return seeded(core.ResidualVectorQuantization(**given))


def transformers(model: str, name: str, **options):
    part = peer(f"transformers.models.{model}.modeling_{model}")
    cls = getattr(part, f"{name}ResidualVectorQuantiz" + ("ation" if model == "xcodec" else "er"))
    config = {
        "codebook_size": K, "codebook_dim": D, "num_quantizers": Q, "frame_rate": 75, "hidden_size": D,
        "vector_quantization_hidden_dimension": D, **options,
    }  # fmt: skip
    return seeded(cls(SimpleNamespace(**config)))


def vqp(**options):
    given = {"dim": D, "codebook_size": K, "num_quantizers": Q, **options}
    return seeded(peer("vector_quantize_pytorch").ResidualVQ(**given))


# A model; a call of it, giving indices [Q, B, T]; and the codebook of a level.
PEERS = {
    "encodec": (encodec, lambda m, x: m.encode(x), lambda m, q: m.layers[q]._codebook.embed),
    "encodec forward": (encodec, lambda m, x: m(x)[1], lambda m, q: m.layers[q]._codebook.embed),
    "moshi": (moshi, lambda m, x: m.encode(x), lambda m, q: m.layers[q]._codebook.embedding),
    "moshi forward": (moshi, lambda m, x: m(x)[1], lambda m, q: m.layers[q]._codebook.embedding),
    "transformers Encodec": (
        lambda: transformers("encodec", "Encodec"),
        lambda m, x: m.encode(x),
        lambda m, q: m.layers[q].codebook.embed,
    ),
    "transformers Xcodec": (
        lambda: transformers("xcodec", "Xcodec"),
        lambda m, x: m.encode(x),
        lambda m, q: m.quantizers[q].codebook.embed,
    ),
    "transformers Mimi": (
        lambda: transformers("mimi", "Mimi"),
        lambda m, x: m.encode(x),
        lambda m, q: m.layers[q].codebook.embed,
    ),
    "ResidualVQ": (
        vqp,
        lambda m, x: m(x.transpose(1, 2))[1].movedim(-1, 0),
        lambda m, q: m.layers[q]._codebook.embed[0],
    ),
}


@pytest.fixture
def passes(monkeypatch) -> list:
    """The calls that went through all levels at once."""
    seen = []
    inner = _residual.ops.residual_quantize

    def count(*args, **kwargs):
        seen.append(args)
        return inner(*args, **kwargs)

    monkeypatch.setattr(_residual.ops, "residual_quantize", count)
    return seen


def level_by_level(model: nn.Module) -> nn.Module:
    """Every level patched and the whole not: the peer's loop."""
    other = copy.deepcopy(model)
    for level in getattr(other, "layers", None) or other.quantizers:
        fastvq.patch(level, strict=True)
    return other


def same(a, b) -> None:
    """Equal bit by bit, and laid out alike, so that a caller's view() goes on working."""
    tensors = [[t for t in one if isinstance(t, torch.Tensor)] for one in (a, b)]
    for x, y in zip(*tensors, strict=True):
        assert torch.equal(x, y) and x.dtype == y.dtype
        assert x.stride() == y.stride()


@pytest.mark.parametrize("name", PEERS)
def test_every_index_is_the_float64_one_of_the_residual_as_the_peer_forms_it(name, passes):
    make, call, codes = PEERS[name]
    model = make()
    fastvq.patch(model, strict=True)
    with torch.no_grad():
        indices = call(model, sound())
        residual = sound().transpose(1, 2).reshape(-1, D)
        for q, level in enumerate(indices):
            assert torch.equal(oracle.nearest(residual, codes(model, q)), level.flatten())
            residual = residual - nn.functional.embedding(level.flatten(), codes(model, q))
    assert len(passes) == 1 and len(indices) == Q


@pytest.mark.parametrize("name", PEERS)
@pytest.mark.parametrize("cast", [False, True])
def test_equal_to_the_loop(name, cast, passes):
    make, _, _ = PEERS[name]
    model = make()
    loop = level_by_level(model)
    fastvq.patch(model, strict=True)
    x = sound() if name != "ResidualVQ" else sound().transpose(1, 2)
    calls = [lambda m: m(x)] if name == "ResidualVQ" or name.endswith("forward") else [lambda m: (m.encode(x),)]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=cast):
        for call in calls:
            same(call(model), call(loop))
    # Under autocast vector-quantize-pytorch's layers give half precision back; they are called one by one there.
    assert len(passes) == (0 if cast and name == "ResidualVQ" else 1)


@pytest.mark.parametrize("n_levels", [1, 3])
def test_fewer_levels(n_levels, passes):
    for make in (encodec, moshi):
        model = make()
        loop = level_by_level(model)
        fastvq.patch(model)
        same([model.encode(sound(), n_levels)], [loop.encode(sound(), n_levels)])
        same(model(sound(), n_levels), loop(sound(), n_levels))
    bandwidth = n_levels * torch.log2(torch.tensor(float(K))).item() * 75 / 1000
    for model, name, given in (
        ("encodec", "Encodec", bandwidth * 1.01),
        ("xcodec", "Xcodec", bandwidth * 1.01),
        ("mimi", "Mimi", n_levels),
    ):
        model = transformers(model, name)
        loop = level_by_level(model)
        fastvq.patch(model)
        found = model.encode(sound(), given)
        assert len(found) == n_levels
        same([found], [loop.encode(sound(), given)])
    assert len(passes) == 7


def test_mimi_projects_first(passes):
    model = transformers("mimi", "Mimi", hidden_size=2 * D)
    loop = level_by_level(model)
    fastvq.patch(model, strict=True)
    same([model.encode(sound(2 * D))], [loop.encode(sound(2 * D))])
    assert len(passes) == 1


heard = []


def hooked(model):
    model.layers[1].register_forward_hook(lambda *_: heard.append(1))
    return model


def one_replaced(model):
    first = model.layers[0]
    first.encode = first.encode
    return model


ONE_BY_ONE = {
    "projections": lambda: (encodec(codebook_dim=8), lambda m: m(sound())),
    "hooks": lambda: (hooked(encodec()), lambda m: m(sound())),
    "k-means to come": lambda: (encodec(kmeans_init=True), lambda m: (torch.manual_seed(0), *m(sound()))),
    "training": lambda: (encodec().train(), lambda m: m(sound())),
    "a level in training": lambda: (set_training(encodec()), lambda m: m(sound())),
    "moshi's training": lambda: (moshi().train(), lambda m: (torch.manual_seed(0), *m(sound()))),
    "double precision": lambda: (encodec().double(), lambda m: [m.encode(sound().double())]),
    "bfloat16": lambda: (transformers("encodec", "Encodec").bfloat16(), lambda m: [m.encode(sound().bfloat16())]),
    "a replaced method": lambda: (one_replaced(encodec()), lambda m: [m.encode(sound())]),
}


def set_training(model):
    model.layers[2].train()
    return model


@pytest.mark.parametrize("case", ONE_BY_ONE)
def test_one_by_one_where_a_level_is_more_than_a_lookup(case, passes):
    model, call = ONE_BY_ONE[case]()
    loop = level_by_level(model)
    heard.clear()
    fastvq.patch(model)
    same([t.detach() if isinstance(t, torch.Tensor) else t for t in call(model)], call(loop))
    assert not passes
    assert len(heard) == (2 if case == "hooks" else 0)  # once for each of the two
    for a, b in zip(model.state_dict().values(), loop.state_dict().values(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("wrong", [torch.zeros(B, D + 1, T), torch.zeros(D, T)])
def test_wrong_shapes_raise_as_before(wrong):
    model = encodec()
    fastvq.patch(model)
    with pytest.raises((ValueError, RuntimeError)):
        model.encode(wrong)


RESIDUAL_VQ = {
    "plain": ({}, {}),
    "all codes": ({}, {"return_all_codes": True}),
    "projected": ({"codebook_dim": 8}, {}),
    "learnable": ({"learnable_codebook": True, "ema_update": False}, {}),
    "dropout": ({"quantize_dropout": True}, {}),
    "dead codes": ({"threshold_ema_dead_code": 2}, {"freeze_codebook": True}),
}
RESIDUAL_VQ_ONE_BY_ONE = {
    "cosine": ({"use_cosine_sim": True}, {}),
    "shared": ({"shared_codebook": True}, {}),
    "sizes": ({"codebook_size": (K, K + 1, K, K)}, {}),
    "k-means to come": ({"kmeans_init": True}, {}),
    "mask": ({}, {"mask": torch.arange(T) < torch.tensor([T, 5])[:, None]}),
    "channels first": ({"accept_image_fmap": True}, {}),
}


@pytest.mark.parametrize("case", [*RESIDUAL_VQ, *RESIDUAL_VQ_ONE_BY_ONE])
def test_residual_vq(case, passes):
    options, given = {**RESIDUAL_VQ, **RESIDUAL_VQ_ONE_BY_ONE}[case]
    model = vqp(**options)
    loop = level_by_level(model)
    fastvq.patch(model)
    # The peer takes maps whose sides are as long as a code is wide.
    x = sound().transpose(1, 2) if case != "channels first" else torch.randn(B, D, D, D)
    results = []
    for one in (model, loop):
        torch.manual_seed(1)
        with torch.no_grad():
            results.append(one(x, **given))
    same(*results)
    assert len(passes) == (case in RESIDUAL_VQ)


def test_residual_vq_of_single_vectors_and_groups(passes):
    model = vqp()
    loop = level_by_level(model)
    fastvq.patch(model)
    same(model(sound()[:, :, 0]), loop(sound()[:, :, 0]))
    grouped = peer("vector_quantize_pytorch").GroupedResidualVQ(dim=D, codebook_size=K, num_quantizers=Q, groups=2)
    other = copy.deepcopy(grouped.eval())
    for rvq in other.rvqs:
        for layer in rvq.layers:
            fastvq.patch(layer)
    fastvq.patch(grouped)
    x = sound().transpose(1, 2)
    same(grouped(x), other(x))
    assert len(passes) == 3


def test_residual_vq_calls_the_layers_that_hooks_wait_for(passes):
    model, calls = vqp(), []
    model.layers[2]._codebook.register_forward_hook(lambda *_: calls.append(1))
    fastvq.patch(model)
    model(sound().transpose(1, 2))
    assert calls == [1] and not passes


def test_gradients_reach_projections_around_the_levels():
    """In eval too: a decoder may be tuned behind a frozen quantizer."""
    model = vqp(codebook_dim=8)
    loop = level_by_level(model)
    fastvq.patch(model)
    for one in (model, loop):
        one(sound().transpose(1, 2))[0].square().sum().backward()
    for a, b in zip(model.parameters(), loop.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None)
        assert a.grad is None or torch.equal(a.grad, b.grad)


@pytest.mark.parametrize("name", ["encodec", "transformers Encodec"])
def test_compiled(name):
    make, call, _ = PEERS[name]
    model = make()
    fastvq.patch(model)
    expected = call(model, sound())
    compiled = torch.compile(lambda x: call(model, x), backend="eager", fullgraph=True)
    assert torch.equal(compiled(sound()), expected)
