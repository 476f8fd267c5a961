"""fastvq.kmeans: known clusters, streams, determinism, empty clusters, and scikit-learn's inertia on photographs."""

import importlib.util
from pathlib import Path

import pytest
import torch

from fastvq import kmeans
from tests.support.cases import DTYPES, generator


def clusters(n, k, d, seed, spread=0.05):
    """Vectors around centres that lie at least 1 apart, each centre equally often."""
    g = generator(seed)
    centres = torch.randperm(8 * k, generator=g)[:k, None].float() + torch.rand(k, d, generator=g) * 0.1
    owner = torch.arange(n) % k
    return centres[owner] + spread * torch.randn(n, d, generator=g), centres, owner


@pytest.mark.parametrize("k", [1, 2, 17, 64])
def test_recovers_known_clusters(k):
    x, _, owner = clusters(64 * k, k, 5, k)
    result = kmeans(x, k, generator=generator(0), n_iter=50)
    means = torch.stack([x[owner == i].double().mean(0) for i in range(k)])
    distance = torch.cdist(means, result.codebook.double())
    # Each true mean is a code, to the rounding of a mean of 64 numbers below 8 k.
    assert distance.amin(1).max() < 1e-5 * 8 * k
    assert (result.counts == 64).all() and distance.argmin(1).unique().numel() == k


def test_a_stream_equals_the_whole():
    x, *_ = clusters(1000, 17, 5, 1)
    for sizes in ([1000], [300, 0, 699, 1]):
        whole = kmeans(x, 17, generator=generator(2))
        stream = kmeans(lambda sizes=sizes: iter(x.split(sizes)), 17, generator=generator(2))
        assert torch.equal(whole.counts.sort().values, stream.counts.sort().values)
        assert abs(whole.inertia - stream.inertia) <= 1e-5 * whole.inertia
    again = kmeans(lambda: iter(x.split(300)), 17, generator=generator(2))
    assert torch.equal(again.codebook, kmeans(lambda: iter(x.split(300)), 17, generator=generator(2)).codebook)


def test_deterministic_whatever_the_threads(threads):
    x = torch.randn(5000, 16, generator=generator(3))
    results = []
    for n in (1, 2):
        threads(n)
        results.append(kmeans(x, 65, generator=generator(4), n_iter=5))
    # The start weights draws by a matrix product, whose last bits may depend on the threads; no draw here is so close.
    assert torch.equal(results[0].codebook, results[1].codebook) and results[0][1:3][1] == results[1].inertia


@pytest.mark.parametrize("init", ["k-means++", "random"])
@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_inertia_and_counts_are_those_of_the_codebook(metric, init):
    x = torch.randn(999, 7, generator=generator(5))
    result = kmeans(x, 31, metric=metric, init=init, generator=generator(6), n_iter=4)
    y = torch.nn.functional.normalize(x, dim=-1) if metric == "cosine" else x
    distance = torch.cdist(y.double(), result.codebook.double()).square()
    assert torch.equal(torch.bincount(distance.argmin(1), minlength=31), result.counts)
    assert abs(result.inertia - distance.amin(1).sum().item()) <= 1e-6 * result.inertia
    start = kmeans(x, 31, metric=metric, init=init, generator=generator(6), n_iter=0)
    assert result.n_iter == 4 and start.n_iter == 0 and result.inertia < start.inertia
    if metric == "cosine":
        assert (result.codebook.double().norm(dim=1) - 1).abs().max() < 1e-6


def test_random_start_takes_distinct_vectors():
    x = torch.arange(50.0)[:, None]
    start = kmeans(x, 50, init="random", n_iter=0, generator=generator(7))
    assert torch.equal(start.codebook.sort(0).values, x) and start.inertia == 0


def test_empty_clusters_are_filled():
    """All starts lie in one cluster. Codes that lose every vector must move to the far vectors."""
    x = torch.cat([torch.zeros(500, 2), torch.eye(2).repeat(5, 1) * 100 + torch.arange(10)[:, None] * 3.0])
    result = kmeans(x, 11, init="random", generator=generator(8), n_iter=50)
    assert (result.counts > 0).all() and result.inertia == 0


def test_fewer_distinct_vectors_than_codes():
    x = torch.tensor([[0.0, 1.0], [1.0, 0.0], [5.0, 5.0]]).repeat(20, 1)
    for init in ("k-means++", "random"):
        result = kmeans(x, 9, init=init, generator=generator(9))
        assert result.inertia == 0 and result.codebook.isfinite().all() and result.counts.sum() == 60


def test_vectors_that_are_not_finite_are_left_out():
    x, *_ = clusters(500, 5, 3, 10)
    bad = torch.full((7, 3), torch.nan)
    bad[0] = torch.tensor([torch.inf, 0, 0])
    result = kmeans(lambda: iter([bad, torch.cat([x, bad]), bad]), 5, generator=generator(11))
    assert result.counts.sum() == 500 and result.codebook.isfinite().all() and result.inertia < 500 * 3 * 0.01


@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes(dtype):
    x, *_ = clusters(500, 5, 3, 12)
    result = kmeans(x.to(dtype), 5, generator=generator(13))
    assert result.codebook.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert (result.counts == 100).all()


@pytest.mark.parametrize(
    "data,n_codes,options,error,message",
    [
        (torch.zeros(5, 3), 6, {}, ValueError, r"at least 6 finite vectors \(n_codes = 6\), got 5"),
        (torch.full((5, 3), torch.nan), 1, {}, ValueError, r"at least 1 finite vectors .*got 0"),
        (torch.zeros(5, 3), 0, {}, ValueError, r"n_codes must be at least 1, got 0"),
        (torch.zeros(5), 1, {}, ValueError, r"data must be \[N, D\] with D >= 1, got \[5\]"),
        (lambda: iter([torch.zeros(5, 3), torch.zeros(5, 2)]), 1, {}, ValueError, r"D = 3 as before, got \[5, 2\]"),
        (lambda: iter([]), 1, {}, ValueError, r"at least one batch, got none"),
        (torch.zeros(5, 3).int(), 1, {}, TypeError, r"data must be float32"),
        ([[0.0]], 1, {}, TypeError, r"data must be a tensor \[N, D\] or a callable returning batches, got list"),
        (torch.zeros(5, 3), 1, {"metric": "dot"}, ValueError, r"metric must be one of .*got 'dot'"),
        (torch.zeros(5, 3), 1, {"init": "pca"}, ValueError, r"init must be one of"),
        (torch.zeros(5, 3), 1, {"n_iter": -1}, ValueError, r"n_iter and tolerance must be 0 or more"),
    ],
)  # fmt: skip
def test_misuse(data, n_codes, options, error, message):
    with pytest.raises(error, match="fastvq.kmeans: .*" + message):
        kmeans(data, n_codes, **options)


def test_progress_with_and_without_rich(capsys, monkeypatch):
    x = torch.randn(100, 3, generator=generator(14))
    plain = kmeans(x, 5, generator=generator(15))
    assert capsys.readouterr().out == ""
    shown = kmeans(x, 5, generator=generator(15), progress=True)
    assert torch.equal(plain.codebook, shown.codebook)
    assert "k-means" in capsys.readouterr().out or not importlib.util.find_spec("rich")
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "rich" else find(name, *a))
    kmeans(x, 5, progress=True)
    assert capsys.readouterr().out == ""


def test_inertia_of_scikit_learn_on_photographs(monkeypatch):
    """Means over three seeds each, same number of iterations: within 1 %."""
    pytest.importorskip("skimage")
    cluster = pytest.importorskip("sklearn.cluster")
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "benchmarks"))
    from harness import photographs

    x = torch.from_numpy(photographs.patches("8x8")[::2])
    ours = sum(kmeans(x, 64, n_iter=25, generator=generator(seed)).inertia for seed in range(3))
    # scikit-learn's threads and torch's compete for the cores, so scikit-learn gets one.
    with pytest.importorskip("threadpoolctl").threadpool_limits(1):
        theirs = sum(
            cluster.KMeans(64, n_init=1, max_iter=25, random_state=seed).fit(x.numpy()).inertia_ for seed in range(3)
        )
    assert ours <= 1.01 * theirs
