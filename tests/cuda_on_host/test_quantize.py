"""Quantization and a training step by CUDA: the kernels against the definitions, here and under sanitizers."""

import numpy as np
import pytest
import torch

from fastvq.backends import views
from fastvq.ops import code_statistics, quantize, vq_step
from fastvq.ops.quantize import cuda, reference
from fastvq.ops.quantize.call import QuantizeBackwardCall
from fastvq.ops.statistics import cuda as statistics
from tests.cuda_on_host import host, test_ema
from tests.ops.test_quantize import compare, indices_changed_since, leaves
from tests.support.cases import DTYPES, HARD, METRICS, gaussian, generator
from tests.support.tolerance import assert_within, gamma, roundoff

BOTH = pytest.mark.parametrize("estimator", ["straight_through", "rotation"])
# The filter's shapes of block, the full scan alone (the last two), rows that fill no block, one lane a row to all 32.
SIZES = ((1, 1, 1), (7, 3, 2), (131, 117, 33), (257, 300, 5), (65, 131, 64), (40, 70, 600), (17, 5, 1100), (3, 5, 4097))

# Ways to add, and the shared memory of a card that takes them: the second's holds the scan, but no owners of 107 codes.
LIMITS = {"owners": host.SHARED_LIMIT, "sorted": 22 << 10, "atomics": host.SHARED_LIMIT}

SANITIZED_WAYS = ("owners", "atomics", "atomics", "sorted", "sorted", "owners", "atomics", "atomics")  # of the sizes


@pytest.fixture(params=LIMITS)
def way(request, cuda_on_host):
    """Options of a step that takes this way to add."""
    with host.shared_limit(LIMITS[request.param]):
        yield {"deterministic": request.param != "atomics"}


@BOTH
@pytest.mark.parametrize(("n", "k", "d"), SIZES)
def test_values_and_gradients(n, k, d, estimator, cuda_on_host):
    x, codebook = gaussian(n, k, d, generator(n + k + d))
    compare(x, codebook, "cuda", metric=METRICS[(n + d) % 3], estimator=estimator)


@BOTH
@pytest.mark.parametrize("x_dtype", DTYPES)
@pytest.mark.parametrize("codebook_dtype", DTYPES)
def test_any_mix_of_dtypes(x_dtype, codebook_dtype, estimator, cuda_on_host):
    x, codebook = gaussian(33, 7, 18, generator(2))
    mask = torch.rand(33, generator=generator(3)) < 0.7
    compare(x.to(x_dtype), codebook.to(codebook_dtype), "cuda", mask=mask, estimator=estimator)


@BOTH
def test_images_and_odd_strides(estimator, cuda_on_host):
    g = generator(5)
    images, codebook = torch.randn(2, 17, 5, 7, generator=g), torch.randn(31, 17, generator=g)
    for x in (
        images.movedim(1, -1),
        images.to(memory_format=torch.channels_last).movedim(1, -1),
        images.permute(3, 0, 2, 1),
        images.movedim(1, -1)[:, ::2, 1::3],
        torch.randn(9, 17 + 1, generator=g)[:, 1:],  # rows that no 16 bytes begin with
    ):
        compare(x, codebook.t().contiguous().t() if estimator == "rotation" else codebook, "cuda", estimator=estimator,
                mask=torch.rand(x.shape[:-1], generator=g) < 0.7)  # fmt: skip


@BOTH
def test_heads(estimator, cuda_on_host):
    g = generator(8)
    x, codebook = torch.randn(3, 2, 11, 17, generator=g), torch.randn(3, 7, 17, generator=g)
    mask = torch.rand(3, 2, 11, generator=g) < 0.7
    a, c = leaves(x, codebook)
    q = quantize(a, c, mask=mask, estimator=estimator, backend="cuda")
    (q.quantized.sum() + q.codebook_loss).backward()
    for h in range(3):
        one = leaves(x[h], codebook[h])
        alone = quantize(*one, mask=mask[h], estimator=estimator, backend="cuda")
        assert torch.equal(alone.quantized, q.quantized[h]) and torch.equal(alone.indices, q.indices[h])
        (alone.quantized.sum() + alone.codebook_loss * (mask[h].sum() / mask.sum())).backward()
        assert torch.equal(a.grad[h], one[0].grad)
        # The share, its product with the loss's weight, and the gradient are rounded to float32 on either side.
        assert_within(c.grad[h], one[1].grad, 8 * roundoff(torch.float32) * one[1].grad.abs().double())


@pytest.mark.parametrize("case", HARD)
def test_hard_cases(case, cuda_on_host):
    """What the filter settles and what it leaves to the scan, in one call: every row once, and the losses of all."""
    for dtype in (torch.float32, torch.float64):
        x, codebook = (t[:150].to(dtype) for t in HARD[case](generator(0)))
        check(quantize(x, codebook, beta=0.25, backend="cuda"), x, codebook)


def check(got, x, codebook, mask=None, metric="euclidean"):
    """Against the reference: all to the bit but the losses, which are doubles added in another order, rounded once."""
    quantized, commitment, codebook_loss, indices = reference.quantize(x, codebook, mask, metric, 0.25, "exact")
    assert torch.equal(got[1], indices)
    assert torch.equal(got[0].nan_to_num(), quantized.nan_to_num()) and torch.equal(got[0].isnan(), quantized.isnan())
    off = roundoff(codebook_loss.dtype) * 1.001 + 2 * gamma(x.numel() + 8, torch.float64)
    spoilt = not (x if mask is None else x[mask]).isfinite().all()  # infinity stands for no distance, as NaN does
    for ours, theirs in ((got[2], commitment), (got[3], codebook_loss)):
        theirs = torch.full_like(theirs, torch.nan) if spoilt else theirs
        assert_within(ours, theirs, off * theirs.double().abs() + torch.finfo(theirs.dtype).tiny)


def test_edges(cuda_on_host):
    x, codebook = leaves(*gaussian(7, 5, 3, generator(4)))
    q = quantize(x, codebook, mask=torch.zeros(7, dtype=torch.bool), backend="cuda")
    assert q.commitment_loss == 0 and q.codebook_loss == 0 and not q.quantized.any()
    (q.quantized.sum() + q.commitment_loss + q.codebook_loss).backward()
    assert not x.grad.any() and not codebook.grad.any()
    empty = torch.empty(0, 3, requires_grad=True)
    q = quantize(empty, codebook, backend="cuda")
    assert q.quantized.shape == (0, 3) and q.commitment_loss == 0
    (q.quantized.sum() + q.commitment_loss).backward()
    for bad in (torch.nan, torch.inf):
        x, codebook = leaves(*gaussian(65, 17, 31, generator(9)))
        with torch.no_grad():
            x[3, 5] = bad
        q = quantize(x, codebook, backend="cuda")
        assert q.indices[3] == 0 and q.commitment_loss.isnan() and torch.equal(q.quantized[3], codebook[0])
        (q.commitment_loss + q.codebook_loss).backward()
        assert not x.grad[3].isfinite().all() and codebook.grad.isfinite().all()
    # A zero-stride gradient, one that is absent, and rotations that are not defined.
    codebook = torch.tensor([[1.0, 0.0], [0.0, 0.0]])
    x = torch.tensor([[0.0, 0.0], [0.01, 0.01], [2.0, 1.0]], requires_grad=True)
    quantize(x, codebook, estimator="rotation", backend="cuda").quantized.sum().backward()
    assert (x.grad[:2] == 1).all()
    y = torch.tensor([[-2.0, 0.0]], requires_grad=True)
    quantize(y, codebook[:1], estimator="rotation", backend="cuda").quantized.sum().backward()
    assert (y.grad == 1).all()
    assert not quantize(y, codebook, estimator="none", backend="cuda").quantized.requires_grad


def test_rows_left_out(cuda_on_host, monkeypatch):
    monkeypatch.setattr(statistics, "check_indices", lambda *_: None)  # as on a GPU
    indices_changed_since(lambda *given: cuda.quantize_backward(QuantizeBackwardCall(*given, None)))


def step_data(n, k, d, seed):
    """Ties, rows that are not finite, and a mask."""
    x, codebook = gaussian(n, k, d, generator(seed))
    if n > 20 and k > 1:
        x[3] = codebook[0] = codebook[1]
        x[5, d - 1], x[n - 1] = torch.inf, torch.nan
    return x, codebook, torch.rand(n, generator=generator(seed)) < 0.7


@pytest.mark.parametrize(("n", "k", "d"), SIZES[1:5])
def test_step(n, k, d, way):
    x, codebook, mask = step_data(n, k, d, 6)
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        rows = x.to(dtype)
        step = vq_step(rows, codebook, mask=mask, beta=0.25, backend="cuda", **way)
        check(step, rows, codebook, mask)
        test_ema.check(step.sums, step.counts, rows, step.indices, k, **way)
        if way["deterministic"]:
            alone = code_statistics(rows, step.indices, k, backend="cuda")
            assert torch.equal(step.sums, alone[0]) and torch.equal(step.counts, alone[1])


def test_step_of_heads_and_images(way):
    g = generator(7)
    images, codebook = torch.randn(3, 2, 9, 5, 7, generator=g), torch.randn(3, 17, 9, generator=g)
    x, mask = images.movedim(2, -1), torch.rand(3, 2, 5, 7, generator=g) < 0.7
    a, c = leaves(x, codebook)
    step, q = vq_step(a, c, mask=mask, backend="cuda", **way), quantize(x, codebook, mask=mask, backend="cuda")
    assert all(torch.equal(s, t) for s, t in zip(step, q, strict=False))
    for h in range(3):
        test_ema.check(step.sums[h], step.counts[h], x[h], q.indices[h], 17, **way)
    (step.quantized.sum() + step.codebook_loss).backward()
    assert torch.equal(a.grad, mask[..., None].expand_as(x).to(x.dtype)) and c.grad.any()
    nothing = vq_step(x[:, :0], codebook, backend="cuda", **way)
    assert not nothing.sums.any() and not nothing.counts.any() and nothing.codebook_loss == 0


def add_forward(calls, x, codebook, metric, mask, deterministic):
    """A step of x [N, D]; outputs and workspace hold NaN."""
    _, rows = views.rows_view(x, None)
    codes = views.codes_view(codebook)
    wide = np.float64 if x.dtype == torch.float64 else np.float32
    workspace = np.full(host.module().quantize_workspace(rows, codes, deterministic), 0xFF, np.uint8)
    calls.add(
        "quantize_forward",
        [host.as_bytes(x), host.as_bytes(codebook), host.as_bytes(mask), host.as_bytes(torch.full_like(x, torch.nan)),
         np.full(x.shape[0], -9, np.int64), *(np.full(1, np.nan, wide) for _ in range(2)),
         np.full(codebook.shape, np.nan, wide), np.full(codebook.shape[0], -9, np.int64), workspace],
        [host.Buffer(0), *rows[1:], host.Buffer(1), *codes[1:], views.metric_code(metric), 0, host.Buffer(2), 0.25,
         deterministic, host.Buffer(3), *rows[1:], *map(host.Buffer, (4, 5, 6, 7, 8, 9))],
    )  # fmt: skip


def as_tensor(data, like):
    return torch.frombuffer(bytearray(data), dtype=like.dtype).view(like.shape) if like.numel() else like


@pytest.mark.parametrize("kind", host.SANITIZERS)
def test_under_sanitizers(kind, tmp_path):
    calls, checks = host.Calls(), []
    # ThreadSanitizer is ten times slower, and a race shows at any size that fills a block: every other one for it.
    for i, (n, k, d) in enumerate(SIZES if kind == "address" else SIZES[::2]):
        x, codebook, mask = step_data(n, k, d, i)
        x, codebook = x.to(DTYPES[i % 4]), codebook.to(DTYPES[i // 2 % 4])
        add = SANITIZED_WAYS[SIZES.index((n, k, d))]
        calls.add("shared_limit", [], [LIMITS[add]])
        with host.shared_limit(LIMITS[add]):
            add_forward(calls, x, codebook, METRICS[i % 3], mask, add != "atomics")
        checks += [None, (x, codebook, mask, METRICS[i % 3], add != "atomics")]
    for results, case in zip(calls.run(kind, tmp_path), checks, strict=True):
        if case is None:
            continue
        x, codebook, mask, metric, deterministic = case
        loss = torch.empty((), dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)
        like = (x, torch.empty(len(x), dtype=torch.int64), loss, loss, codebook.to(loss.dtype),
                torch.empty(len(codebook), dtype=torch.int64))  # fmt: skip
        *outputs, sums, counts = map(as_tensor, results[3:9], like)
        check(outputs, x, codebook, mask, metric)
        test_ema.check(sums, counts, x, outputs[1], len(codebook), deterministic)


@pytest.mark.parametrize("kind", host.SANITIZERS)
def test_gradients_under_sanitizers(kind, tmp_path):
    calls, expected = host.Calls(), []
    for i, (n, k, d) in enumerate(SIZES[1:5] if kind == "address" else SIZES[1:3]):
        x, codebook = gaussian(n, k, d, generator(i))
        g, indices = torch.randn(n, d, generator=generator(i)), torch.randint(-1, k, (n,), generator=generator(i))
        grad_x, grad_codebook = torch.full_like(x, torch.nan), torch.full_like(codebook, torch.nan)
        counts = torch.bincount(indices[indices >= 0], minlength=k)
        sums = torch.zeros(k, d, dtype=torch.float64)
        sums.index_add_(0, indices[indices >= 0], x.double()[indices >= 0])
        weight, n_real = torch.tensor(3.0), (indices >= 0).sum()
        _, rows = views.rows_view(x, None)
        codes = views.codes_view(codebook)
        rotation = i % 2 == 1
        loss = [host.Buffer(5), 0, host.Buffer(6), 0.25]
        calls.add(
            "quantize_backward",
            [*map(host.as_bytes, (x, codebook, g, indices, grad_x)), host.as_bytes(weight[None]),
             host.as_bytes(n_real[None]), *map(host.as_bytes, (sums, counts, grad_codebook))],
            [host.Buffer(0), *rows[1:], host.Buffer(2), *rows[1:], host.Buffer(4), *rows[1:], host.Buffer(1),
             *codes[1:], host.Buffer(3), rotation, *loss, host.Buffer(9), *codes[1:], host.Buffer(7), host.Buffer(8)],
        )  # fmt: skip
        estimator = "rotation" if rotation else "straight_through"
        arguments = (x, codebook, indices, g, weight, weight / 4, estimator, 0.25, True, True)
        expected.append((*reference.quantize_backward(*arguments), *arguments[:4]))
    for results, (to_x, to_codes, x, codebook, indices, g) in zip(calls.run(kind, tmp_path), expected, strict=True):
        # A few roundings of doubles, in sums of D or N terms, then one to float32.
        doubles = gamma(4 * max(x.shape) + 60, torch.float64)
        code = codebook.double()[indices.clamp(min=0)]
        size = (x.double().abs() + code.abs()) * 3
        size += 10 * (1 + code.norm(dim=-1) / x.double().norm(dim=-1))[:, None] * g.double().norm(dim=-1, keepdim=True)
        size *= (indices >= 0)[:, None]
        assert_within(as_tensor(results[4], x), to_x, 2 * roundoff(x.dtype) * to_x.double().abs() + doubles * size)
        mass = (x.double().abs().sum(0) + len(x) * codebook.double().abs()) * 3
        bound = 2 * roundoff(x.dtype) * to_codes.double().abs() + doubles * mass
        assert_within(as_tensor(results[9], codebook), to_codes, bound)
