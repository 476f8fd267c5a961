"""The sampler by the Triton kernels: in the interpreter on small maps; captured in CUDA graphs where there is a GPU."""

from contextlib import nullcontext

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton", reason="needs the package triton")
from fastvq import use_backend
from fastvq.backends import triton as triton_backend
from fastvq.models.sampling import Choice, sample_ids
from fastvq.ops import PixelCNNSteps, pixelcnn_step
from tests.models import test_sampling as plain
from tests.models.test_sampling import make
from tests.support.cases import generator
from tests.support.tolerance import assert_within, roundoff

interpreted = pytest.mark.skipif(
    not triton_backend.interpreting(), reason="the interpreter is used where there is no GPU"
)

MODELS = {
    "both conditions": (dict(n_layers=2, n_classes=3, condition_channels=2, channels=17), (2, 2, 2), 2),
    "one layer": (dict(n_layers=1, channels=3, n_codes=35), (1, 3, 2), 1),
    "no left": (dict(n_layers=2, channels=4, first_kernel_size=1), (17, 1, 2), 1),
}


@pytest.fixture(autouse=True)
def _one_thread(threads):
    threads(1)


@interpreted
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_step_gives_the_logits_of_forward(name):
    with use_backend("triton"):
        plain.check_step(*MODELS[name], "triton")


@interpreted
@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sixteen_bits(dtype):
    """Against the reference's step in float64 with the same weights."""
    model = make(n_layers=2, channels=5, contrast=1).to(dtype)
    ids = torch.randint(0, model.n_codes, (1, 2, 2), generator=generator(4))
    got, state = plain.every_logit(model, ids, dict(labels=None, condition=None))
    assert state.backend == "triton" and got.dtype == dtype
    expected, _ = plain.every_logit(model.double(), ids, dict(labels=None, condition=None))
    # From an id to a logit an activation is rounded to dtype 8 times: v, link, gated and left of the first layer, link
    # and gated of the second, skip, hidden. Gates and relu do not amplify an error, and default weights, at most
    # 1 / sqrt(n) each, do so at most twofold over these layers.
    assert_within(got, expected, 16 * roundoff(dtype) * (1 + expected.abs().amax()))


@interpreted
def test_samples_are_those_of_the_uncached_reference():
    """Some positions kept in all images (their logits are not used), some in one."""
    model = make(n_layers=2, channels=8)
    shape = (2, 3, 3)
    known = torch.randint(0, 19, shape, generator=generator(9))
    keep = torch.rand(shape, generator=generator(10)) < 0.3
    keep[:, 1, 1:] = True
    given = dict(known=known.mT.contiguous().mT, keep=keep)
    with use_backend("triton"):
        ours = model.sample(shape, **given, generator=generator(5))
    with use_backend("reference"):
        assert torch.equal(ours, model.sample(shape, **given, generator=generator(5), cached=False))


BOTH = dict(top_k=5, top_p=0.5, temperature=2.0)


@interpreted
@pytest.mark.parametrize(
    "n_codes,options",
    [(35, dict()), (35, dict(temperature=0.0)), (35, dict(top_p=0.7)), (35, BOTH), (1, dict())],
    ids=str,
)
def test_the_choice_in_one_launch_is_that_of_torch(n_codes, options):
    """Ties, ids without probability, the ends of [0, 1), positions outside the mask, NaN and infinity."""
    from fastvq.ops.pixelcnn import triton_choice

    g = generator(n_codes)
    logits = 3 * torch.randn(9, n_codes, generator=g)
    logits[::2] = logits[::2].round()
    logits[1], logits[2] = 0, -torch.inf
    logits[2, n_codes // 2 :: 9] = 1
    logits[3, n_codes // 3], logits[4, n_codes // 2] = torch.nan, torch.inf
    uniforms = torch.rand(9, 2, 2, dtype=torch.float64, generator=g)
    uniforms[::4], uniforms[1::4] = 1 - 2.0**-53, 0
    mask = torch.arange(9)[:, None, None].expand(9, 2, 2) != 7
    ids, position, choice = torch.full((9, 2, 2), -5), torch.tensor([2]), Choice(**options)
    expected = ids.clone()
    expected[:, 1, 0] = torch.where(mask[:, 1, 0], sample_ids(logits, uniforms[:, 1, 0], choice), -5)
    triton_choice.sample_ids(logits, uniforms, mask.contiguous(), ids, position, *choice)
    assert torch.equal(ids, expected)


class _NoKernel:
    def __getitem__(self, grid):
        return lambda *args, **constants: None


def test_a_position_runs_no_torch_kernel_but_its_counter(monkeypatch):
    """Every launch of torch would be one more node of the CUDA graph that is replayed at every position."""
    from fastvq.ops.pixelcnn import triton_choice, triton_kernels

    for module, name in ((triton_kernels, "gate_step"), (triton_kernels, "linear_step"), (triton_choice, "_choose")):
        monkeypatch.setattr(module, name, _NoKernel())
    launched, used = [], PixelCNNSteps._used

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            launched.append(op.overloadpacket.__name__)
            return op(*args, **(kwargs or {}))

    def recorded(self):
        with Recorder():
            used(self)

    monkeypatch.setattr(PixelCNNSteps, "_used", recorded)
    model = make(n_layers=2, channels=4)
    with use_backend("triton") if triton_backend.interpreting() else nullcontext():
        model.to("cpu" if triton_backend.interpreting() else "cuda").sample((2, 1, 1), top_k=3)
    views_and_allocations = {"new_empty", "view", "split", "split_with_sizes", "select", "detach"}
    assert [name for name in launched if name not in views_and_allocations] == ["add_"]


@torch.no_grad()
def test_steps_are_those_of_pixelcnn_step(engine):
    model, shape = make(n_layers=2, channels=6), (2, 2, 3)
    expected, got, numbers = [], [], []
    with use_backend(engine):
        first, second = (model.sampler_state(shape, None, None) for _ in range(2))
    ids = torch.randint(0, 19, shape, generator=generator(4))
    steps = PixelCNNSteps(first, ids, lambda logits, at: (got.append(logits.clone()), numbers.append(int(at)))[0])
    for n in range(6):
        steps(wanted=n != 4)
        expected.append(pixelcnn_step(second, ids, *divmod(n, 3)))
    del expected[4]
    assert numbers == [0, 1, 2, 3, 5] and all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_bad_steps():
    state = make(n_layers=1, channels=4).sampler_state((2, 3, 4), None, None)
    with pytest.raises(ValueError, match=r"PixelCNNSteps: ids must be int64 \[2, 3, 4\]"):
        PixelCNNSteps(state, torch.zeros(2, 3, 3, dtype=torch.int64), lambda *_: None)
    with pytest.raises(ValueError, match="ids must be contiguous"):
        PixelCNNSteps(state, torch.zeros(2, 4, 3, dtype=torch.int64).mT, lambda *_: None)


def test_float64_is_refused():
    model = make(n_layers=1, channels=4).double()
    with (
        pytest.raises(ValueError, match=r"triton: (it computes in float32|torch sees no GPU|it takes CUDA tensors)"),
        use_backend("triton"),
    ):
        model.sampler_state((1, 2, 2), None, None)


@pytest.mark.needs_gpu
@torch.no_grad()
def test_captured_steps_are_those_that_are_launched_one_by_one():
    model, shape = make(n_layers=3, channels=33).cuda(), (5, 4, 6)
    ids = torch.randint(0, 19, shape, generator=generator(4)).cuda()
    first, second = (model.sampler_state(shape, None, None) for _ in range(2))
    assert first.backend == "triton"
    got = torch.empty(24, 5, 19, device="cuda")
    steps = PixelCNNSteps(first, ids, lambda logits, at: got.index_copy_(0, at, logits[None]))
    for n in range(24):
        steps(wanted=n % 5 != 4)
    assert set(steps.graphs) == {"row", "used", "passed"} and None not in steps.graphs.values()
    for n in range(24):
        logits = pixelcnn_step(second, ids, *divmod(n, 6))
        assert n % 5 == 4 or torch.equal(got[n], logits)


@pytest.mark.needs_gpu
def test_captured_samples_are_those_of_the_uncached_network():
    model = make(n_layers=3, channels=33, n_classes=3).cuda()
    labels = torch.tensor([0, 1, 2, 1, 0]).cuda()
    for options in (dict(), dict(temperature=0.0), dict(top_k=5, top_p=0.8, temperature=0.7)):
        draws = [
            model.sample((5, 4, 6), labels, generator=torch.Generator("cuda").manual_seed(5), cached=cached, **options)
            for cached in (True, False)
        ]
        assert torch.equal(*draws)
