"""Training in one compiled graph: the k-means start, and quantize_dropout."""

import copy

import pytest
import torch

from fastvq.nn import GroupedVQ, ResidualVQ, VectorQuantizer

WITH_KMEANS = {
    "plain": lambda **o: VectorQuantizer(6, 9, kmeans_init=True, **o),
    "learnable": lambda **o: VectorQuantizer(6, 9, kmeans_init=True, learnable=True, **o),
    "heads": lambda **o: GroupedVQ(6, 9, 2, kmeans_init=True, metric="cosine", **o),
    "residual": lambda **o: ResidualVQ(6, 9, 3, kmeans_init=True, dead_code_threshold=1.0, **o),
}


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()


@pytest.mark.parametrize("name", WITH_KMEANS)
def test_kmeans_starts_inside_one_graph(name):
    torch.manual_seed(0)
    plain = WITH_KMEANS[name]()
    twin = copy.deepcopy(plain)
    compiled = torch.compile(twin, fullgraph=True, backend="aot_eager")
    x = torch.randn(3, 40, 6)
    for step in range(3):
        torch.manual_seed(step)
        ours = plain(x)
        torch.manual_seed(step)
        theirs = compiled(x)
        assert torch.equal(ours.indices, theirs.indices) and torch.equal(ours.quantized, theirs.quantized)
        assert bool(twin.initialised) and twin._known_initialised
        for key, value in plain.state_dict().items():
            assert torch.equal(value, twin.state_dict()[key]), key


def test_a_batch_without_a_usable_vector_starts_nothing_in_a_graph_either():
    module = VectorQuantizer(4, 5, kmeans_init=True)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    before = module.codebook.clone()
    compiled(torch.full((30, 4), torch.nan))
    assert not bool(module.initialised) and torch.equal(module.codebook, before)
    compiled(torch.randn(30, 4))
    assert bool(module.initialised) and not torch.equal(module.codebook, before)


def test_a_copy_starts_its_own_codebook():
    first = VectorQuantizer(4, 5, kmeans_init=True)
    second = copy.deepcopy(first)
    del first
    torch.compile(second, fullgraph=True, backend="aot_eager")(torch.randn(30, 4))
    assert bool(second.initialised)


@pytest.mark.parametrize("name", WITH_KMEANS)
def test_state_that_is_set_between_compiled_steps(name):
    """set_codebook, freeze_codes, track_usage and a copy in the middle of an epoch: the graph sees each of them."""
    torch.manual_seed(0)
    plain = WITH_KMEANS[name]()
    twin = copy.deepcopy(plain)
    compiled = torch.compile(twin, fullgraph=True, backend="aot_eager")
    x = torch.randn(40, 6)

    def step(seed):
        for call in (plain, compiled):
            torch.manual_seed(seed)
            call(x)
        for key, value in plain.state_dict().items():
            assert torch.equal(value, twin.state_dict()[key]), key
        assert torch.equal(plain.counts, twin.counts)

    def both(method, *arguments):
        for module in (plain, twin):
            getattr(module, method)(*arguments)

    codes = torch.nn.functional.normalize(torch.randn_like(plain.codebook), dim=-1)
    mask = torch.rand(plain.cluster_size.shape) < 0.5
    both("set_codebook", codes)  # in the place of the k-means start
    step(0)
    step(1)
    both("set_codebook", codes.flip(-1))
    both("freeze_codes", mask)
    step(2)
    torch.testing.assert_close(twin.codebook[mask], codes.flip(-1)[mask])
    both("freeze_codes", None)
    both("track_usage")
    step(3)
    other = copy.deepcopy(twin)
    before = other.usage(total=True).counts
    step(4)
    assert torch.equal(other.usage(total=True).counts, before)
    torch.manual_seed(4)
    other(x)
    assert torch.equal(other.usage(total=True).counts, plain.usage(total=True).counts)
    assert torch.equal(other.usage(total=True).counts, twin.usage(total=True).counts)
    assert all(torch.equal(value, other.state_dict()[key]) for key, value in plain.state_dict().items())


@pytest.mark.parametrize("options", [{}, {"shared_codebook": True}, {"learnable": True},
                                     {"dead_code_threshold": 1.0, "estimator": "rotation"}])  # fmt: skip
def test_dropout_in_one_graph_is_that_of_the_module(options):
    torch.manual_seed(1)
    plain = ResidualVQ(6, 9, 4, quantize_dropout=True, **options)
    twin = copy.deepcopy(plain)
    compiled = torch.compile(twin, fullgraph=True, backend="aot_eager")
    x = torch.randn(50, 6)
    mask = torch.arange(50) % 7 != 0
    drawn = set()
    for step in range(6):
        grads = []
        for call in (plain, compiled):
            torch.manual_seed(step)
            leaf = x.clone().requires_grad_()
            q = call(leaf, mask)
            loss = (q.quantized * x).sum() + q.commitment_losses.sum() + q.codebook_losses.sum()
            loss.backward()
            grads.append((q, leaf.grad))
        (ours, grad), (theirs, twin_grad) = grads
        drawn.add(int((ours.indices[1] >= 0).sum()))
        for a, b in zip(ours, theirs, strict=True):
            assert torch.equal(a, b)
        assert torch.equal(grad, twin_grad)
        for key, value in plain.state_dict().items():
            assert torch.equal(value, twin.state_dict()[key]), key
    assert len(drawn) > 1  # more than one number of levels was drawn
