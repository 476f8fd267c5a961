"""PixelCNN.sample: cached against uncached, options, in-painting, and the distribution itself."""

import itertools

import pytest
import torch

from fastvq import use_backend
from fastvq.models import PixelCNN
from fastvq.models.sampling import Choice, sample_ids
from fastvq.ops import pixelcnn_start, pixelcnn_step
from fastvq.ops.pixelcnn.sampler import sampler_of
from tests.conftest import CPU_ENGINES
from tests.support.cases import generator
from tests.support.tolerance import assert_within


@pytest.fixture(autouse=True)
def _one_thread(threads):
    threads(1)  # tensors this small gain nothing from torch's threads


def make(n_codes=19, channels=12, n_layers=3, seed=0, contrast=20, **options):
    torch.manual_seed(seed)
    model = PixelCNN(n_codes, channels, n_layers, **options)
    with torch.no_grad():  # far from uniform
        model.head[1].weight.mul_(contrast)
    return model


def conditions(model, batch, h, w, scale):
    g = generator(3)
    labels = None if model.n_classes is None else torch.randint(0, model.n_classes, (batch,), generator=g)
    channels = model.condition_channels
    maps = None if channels is None else torch.randn(batch, channels, h // scale, w // scale, generator=g)
    return dict(labels=labels, condition=maps)


MODELS = {
    "plain": (dict(), (3, 5, 7), 1),
    "one layer": (dict(n_layers=1), (2, 4, 3), 1),
    "labels": (dict(n_classes=4, channels=17), (3, 4, 6), 1),
    "map": (dict(condition_channels=5, n_codes=37), (2, 6, 4), 2),
    "both": (dict(n_classes=3, condition_channels=2, kernel_size=5), (9, 3, 6), 3),
    "wide kernels": (dict(first_kernel_size=7, channels=50), (1, 2, 3), 1),
    "no left": (dict(first_kernel_size=1), (2, 3, 3), 1),
}


def every_logit(model, ids, given):
    state = model.sampler_state(tuple(ids.shape), given["labels"], given["condition"])
    steps = [pixelcnn_step(state, ids, i, j) for i in range(ids.shape[1]) for j in range(ids.shape[2])]
    return torch.stack(steps, -1).unflatten(-1, ids.shape[1:]), state


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_step_gives_the_logits_of_forward(name, engine, monkeypatch):
    monkeypatch.setenv("FASTVQ_BACKEND", engine)
    check_step(*MODELS[name], engine)


def check_step(options, shape, scale, engine):
    """Compares the logits of every position. The cache starts as NaN and must keep its size."""
    b, h, w = shape
    model = make(**options)
    given = conditions(model, b, h, w, scale)
    ids = torch.randint(0, model.n_codes, (b, h, w), generator=generator(4))
    state = model.sampler_state((b, h, w), **given)
    state.cache.fill_(torch.nan)
    unknown = ids.clone()
    unknown[:] = -1  # ids that are not sampled yet must not be read
    size = state.cache.numel()
    for i, j in itertools.product(range(h), range(w)):
        logits = pixelcnn_step(state, unknown, i, j)
        if i == j == 0:
            got = logits.new_empty(b, model.n_codes, h, w)
        got[:, :, i, j] = logits
        unknown[:, i, j] = ids[:, i, j]
    assert state.cache.numel() == size and state.backend == engine
    with use_backend("reference"):
        expected = model.double()(
            ids, given["labels"], None if scale == 1 and given["condition"] is None else given["condition"].double()
        )
    # Relative to the largest logit: sums of up to n = 1250 terms in each layer, whose errors grow like sqrt(n) u when
    # roundings are independent (35 u); 500 u is that for the chain of 3 layers and the head, with a factor 3 to spare.
    scale_of_logits = expected.abs().amax()
    assert_within(got, expected, 2.0**-24 * 500 * (1 + scale_of_logits))


@pytest.mark.parametrize("options", [{}, {"first_kernel_size": 3, "kernel_size": 5}])
@torch.no_grad()
def test_a_position_may_come_again(options, engine, monkeypatch):
    """Once more and after others of its row: the same logits, and the same at every later position."""
    monkeypatch.setenv("FASTVQ_BACKEND", engine)
    model = make(**options)
    ids = torch.randint(0, 19, (2, 5, 3), generator=generator(3))
    once, again = (model.sampler_state(tuple(ids.shape), None, None) for _ in range(2))
    for row in range(5):
        whole = [pixelcnn_step(once, ids, row, column) for column in range(3)]
        for column in (0, 0, 1, 1, 0, 0, 1, 2, 2):
            assert torch.equal(pixelcnn_step(again, ids, row, column), whole[column])
        bad = ids.clone()
        bad[:, row] = 19
        if engine == "cpu" and row + 1 < 5:
            for _ in range(2):
                with pytest.raises(ValueError, match="ids must be in"):
                    pixelcnn_step(again, bad, row + 1, 0)


@pytest.mark.parametrize(
    "options",
    [
        dict(),
        dict(temperature=0.5),
        dict(temperature=0.0),
        dict(top_k=3),
        dict(top_p=0.7),
        dict(top_k=5, top_p=0.5, temperature=2.0),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["plain", "both"])
def test_cached_gives_the_samples_of_uncached(name, options, engine, monkeypatch):
    made, shape, scale = MODELS[name]
    model = make(**made)
    given = conditions(model, *shape, scale)
    monkeypatch.setenv("FASTVQ_BACKEND", engine)
    a, b = (model.sample(shape, **given, **options, generator=generator(5), cached=c) for c in (True, False))
    # Logits agree to about 1e-5 (see above), so a uniform separates the two with probability below 1e-4 a position;
    # with these seeds none does.
    assert torch.equal(a, b)
    assert a.dtype == torch.int64 and a.shape == shape and a.min() >= 0 and a.max() < model.n_codes


def test_generator_decides():
    model = make()
    first = model.sample((2, 4, 4), generator=generator(6))
    assert torch.equal(first, model.sample((2, 4, 4), generator=generator(6)))
    assert not torch.equal(first, model.sample((2, 4, 4), generator=generator(7)))


@pytest.mark.parametrize("name", CPU_ENGINES)
@torch.no_grad()
def test_threads_do_not_change_a_bit(name, use_engine, threads, monkeypatch):
    monkeypatch.setenv("FASTVQ_BACKEND", use_engine(name))
    model = make(channels=48)
    ids = torch.randint(0, 19, (150, 2, 3), generator=generator(8))  # work enough for several threads
    results = []
    for n in (1, 2, 7):
        threads(n)
        results.append(every_logit(model, ids, dict(labels=None, condition=None))[0])
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@pytest.mark.parametrize("cached", [True, False])
def test_inpainting_keeps_what_it_must(cached):
    model = make()
    known = torch.randint(0, 19, (3, 5, 6), generator=generator(9))
    keep = torch.rand(3, 5, 6, generator=generator(10)) < 0.6
    out = model.sample((3, 5, 6), known=known, keep=keep, generator=generator(11), cached=cached)
    assert torch.equal(out[keep], known[keep]) and not torch.equal(out, known)
    # Kept positions do not shift the draws of others: the first sampled position sees only the kept ids before it.
    everything = torch.ones_like(keep)
    assert torch.equal(model.sample((3, 5, 6), known=known, keep=everything, cached=cached), known)
    # Where keep is False, the values of known do not matter.
    noise = torch.where(keep, known, -7)
    assert torch.equal(out, model.sample((3, 5, 6), known=noise, keep=keep, generator=generator(11), cached=cached))


def test_sample_ids_by_hand():
    logits = torch.log(torch.tensor([[0.1, 0.5, 0.0, 0.4]])).expand(5, 4)
    u = torch.tensor([0.0, 0.0999, 0.1001, 0.5999, 1 - 2.0**-53], dtype=torch.float64)
    assert sample_ids(logits, u, Choice()).tolist() == [0, 0, 1, 1, 3]
    assert sample_ids(logits, u, Choice(temperature=0.0)).tolist() == [1] * 5
    assert sample_ids(logits, u, Choice(top_k=1)).tolist() == [1] * 5
    assert sample_ids(logits, u, Choice(top_k=2)).tolist() == [1, 1, 1, 3, 3]
    assert sample_ids(logits, u, Choice(top_p=0.4)).tolist() == [1] * 5
    assert sample_ids(logits, u, Choice(top_p=0.89)).tolist() == [1, 1, 1, 3, 3]
    # Ties: lower ids first.
    assert sample_ids(torch.zeros(1, 4), u[-1:], Choice(top_k=2)).tolist() == [1]


@pytest.mark.parametrize("cached", [True, False])
def test_distribution_by_chi_square(cached):
    """3 ids on a 2 x 2 map: 81 maps, whose exact probabilities come from the logits of all of them."""
    model = make(n_codes=3, channels=4, n_layers=2, seed=12, contrast=4, kernel_size=3, first_kernel_size=3)
    maps = torch.tensor(list(itertools.product(range(3), repeat=4))).view(81, 2, 2)
    with torch.no_grad():
        log_p = torch.log_softmax(model(maps).double(), 1).gather(1, maps[:, None]).sum((1, 2, 3))
    p = log_p.exp()
    # A distribution: this alone shows that no position looks ahead.
    assert_within(p.sum(), torch.tensor(1.0), 1e-5)
    n = 20000
    drawn = model.sample((n, 2, 2), generator=generator(13), cached=cached).view(n, 4)
    counts = torch.bincount(drawn @ torch.tensor([27, 9, 3, 1]), minlength=81).double()
    # Cells that expect fewer than 5 are joined, as the chi-square approximation needs.
    rare = n * p < 5
    observed = torch.cat([counts[~rare], counts[rare].sum()[None]])
    expected = torch.cat([n * p[~rare], (n * p[rare]).sum()[None]])
    keep = expected > 0
    statistic = ((observed - expected)[keep] ** 2 / expected[keep]).sum()
    freedom = int(keep.sum()) - 1
    assert freedom > 10
    tail = torch.special.gammaincc(torch.tensor(freedom / 2, dtype=torch.float64), statistic / 2)
    assert tail > 1e-4, f"chi-square {statistic:.1f} with {freedom} degrees of freedom"


def test_registration():
    model = make()
    state = model.sampler_state((2, 3, 4), None, None)
    ids = torch.zeros(2, 3, 4, dtype=torch.int64)
    for row, column in ((0, 0), (0, 1)):
        arguments = (
            ids,
            state.weights,
            state.cache,
            None,
            list(state.kernel_sizes),
            row,
            column,
            state.backend,
        )
        torch.library.opcheck(torch.ops.fastvq.pixelcnn_step.default, arguments)


def test_a_sampler_refuses_tensors_that_do_not_fit(engine):
    with use_backend(engine):
        sampler = sampler_of(make(n_layers=1, channels=4).sampler_state((1, 2, 2), None, None))
    ids, u, mask = torch.zeros(1, 2, 2).long(), torch.zeros(1, 2, 2).double(), torch.ones(1, 2, 2).bool()
    for arguments, message in (
        ((ids, u.float(), mask), "uniforms must be torch.float64"),
        ((ids, u, mask[:, :1]), "mask must be torch.bool"),
        ((ids, u.mT, mask), "contiguous"),
        ((ids[:, :1], u[:, :1], mask[:, :1]), r"ids must be int64 \[1, 2, 2\]"),
    ):
        with pytest.raises(ValueError, match=message):
            sampler.run(*arguments, Choice())
    sampler.run(ids, u + 0.5, mask, Choice())
    assert ids.any()


def test_progress_bar(capsys):
    pytest.importorskip("rich")
    make().sample((1, 2, 2), generator=generator(14), progress=True)
    assert "sampling" in capsys.readouterr().err


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("cached", [True, False])
def test_a_function_follows_the_progress_and_may_end_it(backend, cached):
    def stop(done, total):
        if done >= 3:
            raise KeyError(done)

    seen = []
    keep = torch.zeros(2, 3, 3, dtype=torch.bool)
    keep[:, 2, 1:] = True  # nothing is drawn after position 6
    with use_backend(backend):
        options = dict(known=torch.zeros(2, 3, 3, dtype=torch.int64), keep=keep, cached=cached)
        plain = make().sample((2, 3, 3), generator=generator(14), **options)
        followed = make().sample(
            (2, 3, 3), generator=generator(14), progress=lambda *numbers: seen.append(numbers), **options
        )
        with pytest.raises(KeyError):
            make().sample((2, 3, 3), progress=stop)
    assert torch.equal(plain, followed)
    assert seen == sorted(set(seen)) and seen[-1] == (7, 7)


BAD = [
    (dict(shape=(2, 0, 3)), "each >= 1"),
    (dict(temperature=-1.0), "temperature must be >= 0"),
    (dict(top_k=0), "top_k must be >= 1"),
    (dict(top_p=1.5), "top_p must lie in"),
    (dict(keep=torch.ones(2, 3, 3, dtype=torch.bool)), "known is None"),
    (dict(known=torch.zeros(2, 3, 4, dtype=torch.int64)), "known must be torch.int64"),
    (dict(known=torch.zeros(2, 3, 3)), "got torch.float32"),
    (dict(known=torch.full((2, 3, 3), 99), keep=torch.ones(2, 3, 3, dtype=torch.bool)), r"ids in \[0, 19\)"),
    (dict(labels=torch.zeros(2, dtype=torch.int64)), "labels must be None"),
]


@pytest.mark.parametrize("change,message", BAD)
def test_bad_input(change, message):
    with pytest.raises(ValueError, match=message):
        make().sample(**(dict(shape=(2, 3, 3)) | change))


def test_the_shape_of_a_state_may_be_a_list():
    ids = torch.zeros(1, 2, 2, dtype=torch.int64)
    logits = [pixelcnn_step(make().sampler_state(shape, None, None), ids, 0, 0) for shape in ([1, 2, 2], (1, 2, 2))]
    assert torch.equal(*logits)


def test_bad_step_input():
    model = make()
    state = model.sampler_state((2, 3, 4), None, None)
    ids = torch.zeros(2, 3, 4, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"ids must be int64 \[2, 3, 4\]"):
        pixelcnn_step(state, ids[:1], 0, 0)
    with pytest.raises(ValueError, match="must lie in"):
        pixelcnn_step(state, ids, 3, 0)
    pixelcnn_step(state, ids, 0, 0)
    if state.backend == "cpu":
        with pytest.raises(ValueError, match=r"ids must be in \[0, 19\), got 19"):
            pixelcnn_step(state, ids + 19, 0, 1)
    with pytest.raises(ValueError, match="weights must be 29 tensors for 3 layers, got 28"):
        pixelcnn_start([model.embedding.weight] * 28, (5, 3, 3), (1, 2, 2))
    with pytest.raises(ValueError, match="kernel_sizes must be odd"):
        pixelcnn_start([model.embedding.weight], (2,), (1, 2, 2))
