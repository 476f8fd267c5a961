"""The CUDA kernel of the sampler's step, compiled for the processor: the logits of the network, in this process and
under sanitizers."""

import numpy as np
import pytest
import torch

from fastvq import use_backend
from fastvq.models.sampling import start
from tests.cases import generator
from tests.cuda_on_host import host
from tests.models import test_sampling as plain
from tests.models.test_sampling import make
from tests.tolerance import assert_within

# Rows wider than the pixels that are made together, more codes than threads have quads, kernels wider than the map.
MODELS = {
    "both conditions": (dict(n_layers=2, n_classes=3, condition_channels=2, channels=17), (2, 2, 2), 2),
    "one layer": (dict(n_layers=1, channels=3, n_codes=35), (1, 3, 2), 1),
    "no left": (dict(n_layers=2, channels=4, first_kernel_size=1), (3, 1, 2), 1),
    "wide": (dict(n_layers=3, channels=6, n_codes=1100), (1, 3, 9), 1),
    "wide kernels": (dict(n_layers=2, first_kernel_size=7, channels=9), (1, 3, 2), 1),
}


@pytest.fixture(autouse=True)
def _one_thread(threads):
    threads(1)


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_step_gives_the_logits_of_forward(name, cuda_on_host):
    with use_backend("cuda"):
        plain.check_step(*MODELS[name], "cuda")


def test_samples_are_those_of_the_uncached_reference(cuda_on_host):
    model, shape = make(n_layers=2, channels=8), (2, 2, 3)
    with use_backend("cuda"):
        ours = model.sample(shape, generator=generator(5))
    with use_backend("reference"):
        assert torch.equal(ours, model.sample(shape, generator=generator(5), cached=False))


def test_what_it_cannot_hold_or_add_is_refused(cuda_on_host):
    with (
        pytest.raises(ValueError, match="cuda: it computes in float32, a weight is"),
        use_backend("cuda"),
    ):
        start(make(n_layers=1, channels=4).double(), (1, 2, 2), None, None)
    with (
        host.shared_limit(33 << 10),
        pytest.raises(ValueError, match="cuda: 40 channels are more than a block's shared memory holds"),
        use_backend("cuda"),
    ):
        start(make(n_layers=1, channels=40), (1, 2, 2), None, None)


@pytest.mark.parametrize("kind", host.SANITIZERS)
@torch.no_grad()
def test_under_sanitizers(kind, tmp_path, cuda_on_host):
    calls, expected = host.Calls(), []
    for name in MODELS:
        options, (b, h, w), scale = MODELS[name]
        model = make(**options)
        given = plain.conditions(model, b, h, w, scale)
        ids = torch.randint(0, model.n_codes, (b, h, w), generator=generator(4))
        with use_backend("cuda"):
            state = start(model, (b, h, w), **given)
        embedding, packed, sizes = state.weights
        condition = torch.zeros(0) if state.condition is None else state.condition
        tall, wide = (1, 1) if state.condition is None else condition.shape[2:4]
        calls.add(
            "pixelcnn_map",
            [*map(host.as_bytes, (ids, embedding, packed, sizes)), np.full(state.cache.nbytes, 0xFF, np.uint8),
             host.as_bytes(condition), np.full(h * w * b * model.n_codes * 4, 0xFF, np.uint8)],
            [host.Buffer(0), b, h, w, host.Buffer(1), *embedding.shape, host.Buffer(2), host.Buffer(3), len(sizes),
             host.Buffer(4), state.cache.shape[1],
             host.NOTHING if state.condition is None else host.Buffer(5), tall, wide, host.Buffer(6)],
        )  # fmt: skip
        with use_backend("reference"):
            maps = None if given["condition"] is None else given["condition"].double()
            expected.append(model.double()(ids, given["labels"], maps))
    for results, logits in zip(calls.run(kind, tmp_path), expected, strict=True):
        b, k, h, w = logits.shape
        got = torch.frombuffer(bytearray(results[6]), dtype=torch.float32).view(h, w, b, k).permute(2, 3, 0, 1)
        # The bound of check_step.
        assert_within(got, logits, 2.0**-24 * 500 * (1 + logits.abs().amax()))
