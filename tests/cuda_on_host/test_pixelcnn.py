"""The CUDA kernel of the sampler, compiled for the processor: the logits of the network and the samples of the
reference, in this process and under sanitizers."""

import numpy as np
import pytest
import torch

from fastvq import use_backend
from fastvq.models.sampling import Choice, sample_ids
from fastvq.ops import pixelcnn_start
from fastvq.ops.pixelcnn.cuda import Sampler
from tests.cuda_on_host import host
from tests.models import test_sampling as plain
from tests.models.test_sampling import make
from tests.support.cases import generator
from tests.support.tolerance import assert_within

# A block alone, a team of three, a team for one image, two teams of two; rows that do not come in whole groups of
# pixels, more codes than threads, kernels wider than the map.
MODELS = {
    "both conditions": (dict(n_layers=2, n_classes=3, condition_channels=2, channels=17), (2, 2, 2), 2),
    "one layer": (dict(n_layers=1, channels=3, n_codes=35), (1, 3, 2), 1),
    "no left": (dict(n_layers=2, channels=4, first_kernel_size=1), (3, 1, 2), 1),
    "wide": (dict(n_layers=3, channels=6, n_codes=300), (1, 3, 9), 1),
    "wide kernels": (dict(n_layers=2, first_kernel_size=7, channels=9), (1, 3, 2), 1),
    "teams": (dict(n_layers=2, channels=10, n_codes=7, kernel_size=5), (6, 2, 3), 1),
}
CHOICES = (
    dict(), dict(temperature=0.5), dict(temperature=0.0), dict(top_k=3), dict(top_p=0.7),
    dict(top_k=5, top_p=0.5, temperature=2.0),
)  # fmt: skip


@pytest.fixture(autouse=True)
def _one_thread(threads):
    threads(1)


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_step_gives_the_logits_of_forward(name, cuda_on_host):
    with use_backend("cuda"):
        plain.check_step(*MODELS[name], "cuda")


@pytest.mark.parametrize("options", CHOICES, ids=str)
def test_samples_are_those_of_the_uncached_reference(options, cuda_on_host):
    """Some positions kept in all images, some in one, and the last ones, which are then not computed."""
    for name in ("both conditions", "teams"):
        made, shape, scale = MODELS[name]
        model = make(**made)
        given = plain.conditions(model, *shape, scale)
        keep = torch.rand(shape, generator=generator(10)) < 0.3
        keep[:, 0, 1] = keep[:, -1, -1] = True
        known = torch.randint(0, model.n_codes, shape, generator=generator(9))
        given |= dict(known=known, keep=keep.mT.contiguous().mT, **options)
        with use_backend("cuda"):
            ours = model.sample(shape, **given, generator=generator(5))
        with use_backend("reference"):
            assert torch.equal(ours, model.sample(shape, **given, generator=generator(5), cached=False))


@torch.no_grad()
def test_cards_and_batches_give_the_same_bits(cuda_on_host):
    """However many blocks run together, and whoever else is drawn."""
    options, shape, _ = MODELS["teams"]
    model = make(**options)
    ids = torch.randint(0, 7, shape, generator=generator(4))
    results = []
    with use_backend("cuda"):
        for n in (5, 3, 1, 0):
            with host.resident_blocks(n):
                results.append(plain.every_logit(model, ids, dict(labels=None, condition=None))[0])
        results += [plain.every_logit(model, ids[:1], dict(labels=None, condition=None))[0]]
    assert all(torch.equal(results[0][: len(r)], r) for r in results[1:])


def draw(logits, uniforms, **options):
    """An id an image from a network whose logits are these, whatever it is given."""
    n, k = len(uniforms), len(logits)
    sizes = [(k, 1), (2, 1, 1, 1), (2,), (2, 1, 1, 1), (2,), (2, 1, 1, 1), (2,), (1, 1, 1, 1), (1,), (1, 1, 1, 1), (1,)]
    weights = [*map(torch.zeros, sizes), torch.zeros(k, 1, 1, 1), logits]
    state = pixelcnn_start(weights, [1], (n, 1, 1))
    ids = torch.full((n, 1, 1), -1)
    Sampler(state).run(ids, uniforms.view(n, 1, 1), torch.ones(n, 1, 1, dtype=torch.bool), Choice(**options))
    return ids.view(n)


def test_choice_is_that_of_sample_ids(cuda_on_host):
    g = generator(6)
    uniforms = torch.cat([torch.rand(6, generator=g, dtype=torch.float64), torch.tensor([0.0, 1 - 2.0**-53]).double()])
    ties = torch.randn(200, generator=g).mul(2).round()
    gaps = torch.randn(129, generator=g).mul(30)
    gaps[::3] = -torch.inf
    with use_backend("cuda"):
        for logits in (torch.zeros(1), torch.randn(3, generator=g), ties, gaps, torch.full((131,), -1e30)):
            for options in (*CHOICES, dict(top_k=1), dict(top_k=len(logits) + 1), dict(top_k=70, top_p=0.999)):
                expected = sample_ids(logits.expand(len(uniforms), -1), uniforms, Choice(**options))
                assert torch.equal(draw(logits, uniforms, **options), expected), (logits, options)
        for bad in (torch.nan, torch.inf):
            logits = torch.tensor([1.0, bad, 2.0])
            assert not draw(logits, uniforms).any() and draw(logits, uniforms, temperature=0.0).max() < 3


def test_what_it_cannot_add_or_draw_is_refused(cuda_on_host):
    with use_backend("cuda"):
        with pytest.raises(ValueError, match="cuda: it computes in float32, a weight is"):
            make(n_layers=1, channels=4).double().sampler_state((1, 2, 2), None, None)
        state = make(n_layers=1, channels=4).sampler_state((1, 2, 2), None, None)
    ids, u, mask = torch.zeros(1, 2, 2).long(), torch.zeros(1, 2, 2).double(), torch.ones(1, 2, 2).bool()
    for arguments, message in (
        ((ids, u.float(), mask), "uniforms must be torch.float64"),
        ((ids, u, mask[:, :1]), "mask must be torch.bool"),
        ((ids, u.mT, mask), "contiguous"),
        ((ids[:, :1], u, mask), r"ids must be int64 \[1, 2, 2\]"),
    ):
        with pytest.raises(ValueError, match=message):
            Sampler(state).run(*arguments, Choice())


def whole_map(calls, state, ids, uniforms, mask, logits, **options):
    """Adds a call that draws all ids of a map in one launch, or one that leaves the logits of each position."""
    embedding, packed, table = state.weights
    condition = torch.zeros(0) if state.condition is None else state.condition
    tall, wide = (1, 1) if state.condition is None else condition.shape[2:4]
    choice = Choice(**options)
    calls.add(
        "pixelcnn_map",
        [*map(host.as_bytes, (ids, embedding, packed, table)), np.full(state.cache.nbytes, 0xFF, np.uint8),
         *map(host.as_bytes, (condition, logits, uniforms, mask))],
        [host.Buffer(0), *ids.shape, host.Buffer(1), *embedding.shape, host.Buffer(2), host.Buffer(3),
         len(state.kernel_sizes), host.Buffer(4), state.cache.shape[1],
         host.NOTHING if state.condition is None else host.Buffer(5), tall, wide,
         host.Buffer(6) if logits.numel() else host.NOTHING, host.Buffer(7), host.Buffer(8), float(choice.temperature),
         choice.top_k or 0, float(choice.top_p or 0)],
    )  # fmt: skip


@pytest.mark.parametrize("kind", host.SANITIZERS)
@torch.no_grad()
def test_under_sanitizers(kind, tmp_path, cuda_on_host):
    calls, expected = host.Calls(), []
    # Under ThreadSanitizer, which takes its time, blocks that wait for one another and a map that ends a row.
    for i, name in enumerate(MODELS if kind == "address" else ["both conditions", "teams"]):
        options, shape, scale = MODELS[name]
        model = make(**options)
        given = plain.conditions(model, *shape, scale)
        uniforms = torch.rand(shape, generator=generator(i), dtype=torch.float64)
        mask = torch.rand(shape, generator=generator(i)) < 0.8
        choice = CHOICES[-1 - i % len(CHOICES)]
        with use_backend("cuda"):
            state = model.sampler_state(shape, **given)
            drawn = torch.randint(0, model.n_codes, shape, generator=generator(4))
            whole_map(calls, state, drawn, uniforms, mask, torch.zeros(0), **choice)
            Sampler(state).run(drawn, uniforms, mask, Choice(**choice))
        b, h, w = shape
        logits = torch.full((h, w, b, model.n_codes), torch.nan)
        if kind == "address":
            whole_map(calls, state, drawn, uniforms, mask, logits)
        with use_backend("reference"):
            maps = None if given["condition"] is None else given["condition"].double()
            expected.append((drawn, model.double()(drawn, given["labels"], maps).permute(2, 3, 0, 1)))
    results = calls.run(kind, tmp_path)
    n = len(results) // len(expected)
    for (drawn, logits), of_ids, of_logits in zip(expected, results[::n], results[n - 1 :: n], strict=True):
        # One order of sums whatever runs where: the bits of this process.
        assert torch.equal(torch.frombuffer(bytearray(of_ids[0]), dtype=torch.int64).view(drawn.shape), drawn)
        if n == 2:
            got = torch.frombuffer(bytearray(of_logits[6]), dtype=torch.float32).view(logits.shape)
            # The bound of check_step.
            assert_within(got, logits, 2.0**-24 * 500 * (1 + logits.abs().amax()))
