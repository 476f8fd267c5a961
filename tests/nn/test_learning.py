"""Codebooks learn what they should: known clusters, a literal one-hot quantizer, photographs as well as k-means."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from fastvq import kmeans
from fastvq.nn import ResidualVQ, VectorQuantizer, update_codebooks
from fastvq.ops import quantize
from tests.support.cases import generator
from tests.support.tolerance import assert_within, roundoff


def inertia(x, codebook):
    return quantize(x, codebook).codebook_loss.item() * x.numel()


@pytest.mark.parametrize("options", [{"kmeans_init": True}, {"dead_code_threshold": 8.0}])
def test_recovers_known_clusters(options):
    torch.manual_seed(0)
    centres = torch.randn(16, 8, generator=generator(0)) * 5
    vq = VectorQuantizer(8, 16 if "kmeans_init" in options else 32, decay=0.8, **options)
    for step in range(60):
        g = generator(step)
        vq(centres[torch.randint(16, (512,), generator=g)] + 0.1 * torch.randn(512, 8, generator=g))
    # Averages of clusters of spread 0.1 over some 30 vectors a step, five steps back: 6 standard deviations of one
    # coordinate's mean would be 0.05. From a random start two codes for each cluster, and the threshold above half of
    # a code's fair share, so that the third code of a cluster dies until none is left out: all lie within the spread.
    nearest_code = torch.cdist(centres, vq.codebook).amin(1)
    assert nearest_code.max() < (0.05 if "kmeans_init" in options else 0.5) * 8**0.5


def test_gradient_learned_codebook_recovers_means():
    torch.manual_seed(1)
    x = torch.randn(400, 4, generator=generator(1)) * 0.01 + torch.eye(4).repeat(100, 1) * 10
    vq = VectorQuantizer(4, 4, learnable=True, kmeans_init=True)
    optimizer = torch.optim.SGD(vq.parameters(), lr=1.0)
    for _ in range(100):
        optimizer.zero_grad()
        vq(x).codebook_loss.backward()
        optimizer.step()
    means = torch.stack([x[i::4].mean(0) for i in range(4)])
    assert torch.cdist(means, vq.codebook).amin(1).max() < 1e-4


@pytest.mark.parametrize("update", ["forward", "manual"])
def test_equals_a_literal_one_hot_quantizer_over_a_hundred_steps(update):
    """Against float64 one-hot counts, decay and Laplace smoothing. Only ours also gets a NaN batch, in the middle."""
    torch.manual_seed(2)
    vq = VectorQuantizer(6, 20, decay=0.9, update=update)
    codebook, total, size = vq.codebook.double(), vq.embed_sum.double().clone(), vq.cluster_size.double()
    for step in range(100):
        if step == 50:
            vq(torch.full((30, 6), torch.nan))
            update_codebooks(vq)
        x = torch.randn(200, 6, generator=generator(step))
        q = vq(x)
        update_codebooks(vq)
        index = torch.cdist(x.double(), codebook).argmin(1)
        assert torch.equal(q.indices, index)
        assert_within(q.quantized, codebook[index], 1e-4)
        one_hot = F.one_hot(index, 20).double()
        size = 0.9 * size + 0.1 * one_hot.sum(0)
        total = 0.9 * total + 0.1 * (one_hot.T @ x.double())
        codebook = total / ((size + 1e-5) / (size.sum() + 20 * 1e-5) * size.sum())[:, None]
    # Each step rounds the stored average and the batch's sum, and forgets all but 0.9: below 2 u / (1 - 0.9) of the
    # largest magnitude that is added up, here 200 numbers below 5.
    u = 2 * roundoff(torch.float32) / 0.1
    assert_within(vq.cluster_size, size, u * 200)
    assert_within(vq.embed_sum, total, u * 200 * 5)
    assert_within(vq.codebook, codebook, 2 * u * 200 * 5 / size[:, None].clamp(max=1))


@pytest.fixture(scope="module")
def patches():
    pytest.importorskip("skimage")
    import sys

    sys.path.insert(0, str(Path(__file__).parent.parent.parent / "benchmarks"))
    try:
        from harness import photographs
    finally:
        sys.path.pop(0)
    x = torch.from_numpy(photographs.patches("4x4x3"))
    return x[torch.randperm(len(x), generator=generator(3))][:32768]


@pytest.mark.parametrize("kmeans_init", [False, True])
def test_photographs_as_well_as_kmeans(patches, kmeans_init):
    """Within 5 % of the inertia of k-means, and more than 95 % of the codes in use."""
    torch.manual_seed(4)
    vq = VectorQuantizer(48, 256, decay=0.9, dead_code_threshold=1.0, kmeans_init=kmeans_init)
    for epoch in range(12):
        for x in patches[torch.randperm(len(patches), generator=generator(epoch))].split(4096):
            vq(x)
    best = kmeans(patches, 256, generator=generator(5)).inertia
    used = quantize(patches, vq.codebook).indices.unique().numel()
    assert inertia(patches, vq.codebook) <= 1.05 * best
    assert used > 0.95 * 256
    vq(patches)
    assert vq.usage().used == used or vq.usage().used > 0.95 * 256


def test_each_residual_level_lowers_the_error(patches):
    torch.manual_seed(6)
    rvq = ResidualVQ(48, 64, 4, kmeans_init=True, decay=0.9, dead_code_threshold=1.0)
    for x in patches[:16384].split(2048):
        q = rvq(x)
    errors = q.codebook_losses
    assert (errors[1:] < 0.8 * errors[:-1]).all()
