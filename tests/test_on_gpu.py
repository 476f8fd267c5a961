"""What only a GPU can show: every kernel there against float64 on the CPU, streams, graphs, size, autocast, repetition.

Marked needs_gpu: skipped where torch sees none. ``benchmarks/gpu_report.py`` runs them.
"""

import pytest
import torch

import fastvq
from fastvq.backends.registry import BACKENDS
from fastvq.models import PixelCNN
from fastvq.nn import VectorQuantizer
from fastvq.ops import (
    code_statistics,
    ema_update_,
    gated_masked_conv2d,
    masked_conv2d,
    nearest,
    quantize,
    residual_quantize,
    vq_step,
)
from tests.support import oracle
from tests.support.cases import DTYPES, HARD, METRICS, gaussian, generator
from tests.support.tolerance import assert_within, gamma

pytestmark = pytest.mark.needs_gpu
ON_GPU = [b.name for b in BACKENDS.values() if b.name not in ("cpu", "reference")]


@pytest.fixture(params=ON_GPU)
def backend(request):
    reason = BACKENDS[request.param].unavailable()
    if reason is not None:
        pytest.skip(f"{request.param}: {reason}")
    return request.param


def on_gpu(*tensors):
    return [t.cuda() for t in tensors]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("case", HARD)
def test_hard_cases(case, metric, dtype, backend):
    x, codebook = (t.to(dtype) for t in HARD[case](generator(0)))
    got = nearest(*on_gpu(x, codebook), metric=metric, backend=backend)
    assert torch.equal(got.cpu(), oracle.nearest(x, codebook, metric))


@pytest.mark.parametrize("shape", [(4099, 1000, 65), (513, 17, 1), (1, 1, 1), (300, 4096, 8), (257, 127, 1000)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_sizes(shape, dtype, backend):
    x, codebook = (t.to(dtype) for t in gaussian(*shape, generator(1)))
    for metric in METRICS:
        got = nearest(*on_gpu(x, codebook), metric=metric, backend=backend)
        assert torch.equal(got.cpu(), oracle.nearest(x, codebook, metric))


@pytest.mark.parametrize("case", ["duplicate_codes", "last_bit_apart", "norms_from_tiny_to_huge", "mean_offset"])
def test_hard_cases_of_residual_levels(case):
    x, codebook = HARD[case](generator(0))
    codebooks = codebook.expand(3, -1, -1)
    got = residual_quantize(*on_gpu(x, codebooks), backend="triton")
    expected = residual_quantize(x, codebooks, backend="reference")
    assert torch.equal(got.indices.cpu(), expected.indices)
    torch.testing.assert_close(got.quantized.cpu(), expected.quantized, rtol=0, atol=0, equal_nan=True)


def test_two_runs_are_the_same_to_the_bit(backend):
    x, codebook, gradient = on_gpu(*gaussian(20000, 512, 64, generator(2)), torch.randn(20000, 64))

    def run():
        a, c = x.clone().requires_grad_(), codebook.clone().requires_grad_()
        q = quantize(a, c, estimator="rotation", backend=backend)
        torch.autograd.backward([q.quantized, q.commitment_loss, q.codebook_loss], [gradient, None, None])
        r = residual_quantize(x, codebook.view(4, 128, 64), statistics=True, backend=backend)
        return [*q, a.grad, c.grad, *code_statistics(x, q.indices, 512, backend=backend), *r]

    for first, second in zip(run(), run(), strict=True):
        assert torch.equal(first, second)


def test_a_training_step(backend):
    x, codebook = on_gpu(*gaussian(20000, 512, 64, generator(2)))
    q = quantize(x, codebook, backend=backend)
    alone = code_statistics(x, q.indices, 512, backend=backend)
    step, again, loose = (vq_step(x, codebook, deterministic=d, backend=backend) for d in (True, True, False))
    for got, other, expected in zip(step, again, (*q, *alone), strict=True):
        assert torch.equal(got, other) and torch.equal(got, expected)
    assert all(torch.equal(a, b) for a, b in zip(loose[:4], q, strict=True)) and torch.equal(loose.counts, alone[1])
    sizes = torch.zeros(512, 64, dtype=torch.float64, device="cuda").index_add_(0, q.indices, x.double().abs())
    assert_within(loose.sums, alone[0], 2 * gamma(int(alone[1].max()) + 2, torch.float32) * sizes)
    results = []
    for device in ("cuda", "cpu"):
        buffers = [t.to(device, copy=True) for t in (codebook, codebook, torch.rand(512, generator=generator(9)))]
        torch.ops.fastvq.replace_dead_codes_(
            *buffers, x.to(device), torch.rand(512, generator=generator(10)).to(device), 0.3,
            backend if device == "cuda" else "reference",
        )  # fmt: skip
        results.append([t.cpu() for t in buffers])
    assert all(map(torch.equal, *results))


def test_a_stream_of_its_own(backend):
    x, codebook = on_gpu(*gaussian(30000, 512, 64, generator(3)))
    expected = nearest(x, codebook, backend=backend)
    side = torch.cuda.Stream()
    for _ in range(5):
        late = torch.zeros_like(x)
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            torch.cuda._sleep(20_000_000)  # a kernel on another stream would read late before it is filled
            late.copy_(x)
            got = nearest(late, codebook, backend=backend)
        side.synchronize()
        assert torch.equal(got, expected)


def test_a_cuda_graph_replays_with_new_input(backend):
    x, codebook = on_gpu(*gaussian(5000, 300, 64, generator(4)))
    sums = codebook.clone()
    sizes = torch.ones(300, device="cuda")

    def step():
        q = quantize(x, codebook, backend=backend)
        ema_update_(codebook.clone(), sums, sizes, *code_statistics(x, q.indices, 300, backend=backend),
                    decay=0.9, backend=backend)  # fmt: skip
        return q

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        held = step()
    for seed in (5, 6):
        x.copy_(torch.randn(5000, 64, generator=generator(seed)))
        graph.replay()
        expected = quantize(x.cpu(), codebook.cpu(), backend="cpu")
        assert torch.equal(held.indices.cpu(), expected.indices)
        assert torch.equal(held.quantized.cpu(), expected.quantized)


def test_more_than_2_31_elements(backend):
    n, d = 2**31 // 64 + 1000, 64
    x = torch.randn(n, d, dtype=torch.bfloat16, device="cuda")
    codebook = torch.randn(256, d, device="cuda")
    q = quantize(x, codebook, backend=backend)
    for part in (slice(0, 500), slice(n - 500, n)):
        expected = oracle.nearest(x[part].cpu(), codebook.cpu(), "euclidean")
        assert torch.equal(q.indices[part].cpu(), expected)
        assert torch.equal(q.quantized[part], codebook[q.indices[part]].bfloat16())
    _, counts = code_statistics(x, q.indices, 256, backend=backend)
    assert torch.equal(counts, torch.bincount(q.indices, minlength=256))


def test_training_under_autocast_keeps_the_indices(backend):
    torch.manual_seed(7)
    module = VectorQuantizer(64, 256).cuda()
    twin = VectorQuantizer(64, 256).cuda()
    twin.load_state_dict(module.state_dict())
    with fastvq.use_backend(backend):
        for _ in range(20):
            x = torch.randn(3000, 64, device="cuda", requires_grad=True)
            with torch.autocast("cuda", dtype=torch.bfloat16):
                low = module(x)
            plain = twin(x)
            (low.quantized.sum() + low.commitment_loss).backward()
            assert torch.equal(low.indices, plain.indices) and bool(x.grad.isfinite().all())
    assert torch.equal(module.codebook, twin.codebook)


@pytest.mark.parametrize("mask", ["A", "B", "vertical-B", "horizontal-A"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_masked_convolution(mask, dtype, backend):
    g = generator(8)
    x, weight = torch.randn(2, 37, 13, 11, generator=g).to(dtype), torch.randn(42, 37, 5, 5, generator=g).to(dtype)
    bias, grad = torch.randn(42, generator=g).to(dtype), torch.randn(2, 42, 13, 11, generator=g).to(dtype)

    def run(device, dtype, backend):
        leaves = [t.to(device, dtype).requires_grad_() for t in (x, weight, bias)]
        out = masked_conv2d(*leaves, mask=mask, backend=backend)
        gated = gated_masked_conv2d(*leaves, mask=mask, backend=backend)
        return [out, gated, *torch.autograd.grad(out, leaves, grad.to(device, dtype))]

    def magnitudes():
        leaves = [t.double().abs().requires_grad_() for t in (x, weight, bias)]
        out = masked_conv2d(*leaves, mask=mask, backend="reference")
        return [
            out,
            out.chunk(2, 1)[0] + out.chunk(2, 1)[1] + 1,
            *torch.autograd.grad(out, leaves, grad.double().abs()),
        ]

    expected = run("cpu", torch.float64, "reference")
    terms = max(37 * 25, 42 * 25, 2 * 13 * 11) + 16
    for got, want, size in zip(run("cuda", dtype, backend), expected, magnitudes(), strict=True):
        bound = gamma(terms, torch.float32) * size + torch.finfo(dtype).eps * want.abs()
        assert_within(got.cpu(), want, bound)


@pytest.mark.parametrize("channels,batch", [(20, 1), (20, 9), (128, 18)])
def test_samples_are_those_of_the_uncached_network(channels, batch, backend, monkeypatch):
    # cuDNN's convolutions, which the uncached network runs, round their operands to 10 bits unless told not to.
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    torch.manual_seed(9)
    model = PixelCNN(300, channels, 4, n_classes=3).cuda()
    shape, labels = (batch, 5, 7), torch.arange(batch, device="cuda") % 3
    known, keep = torch.randint(300, shape, device="cuda"), torch.rand(shape, device="cuda") < 0.3
    keep[:, 2, 1:] = True
    for options in (dict(), dict(temperature=0.0), dict(top_k=40, top_p=0.8, temperature=0.7)):

        def sample(name, cached, options=options):
            with fastvq.use_backend(name):
                return model.sample(shape, labels, known=known, keep=keep, cached=cached,
                                    generator=torch.Generator("cuda").manual_seed(5), **options)  # fmt: skip

        drawn = sample(backend, True)
        assert torch.equal(drawn, sample(backend, True)) and torch.equal(drawn, sample("reference", False))
