"""Rows near the largest float32, infinite rows and no rows: the same rule on every backend."""

import itertools

import pytest
import torch

from fastvq import ops
from fastvq.nn import VectorQuantizer
from tests.cuda_on_host.host import cuda_on_host  # noqa: F401  (a fixture)

pytestmark = pytest.mark.interpreted
MOST = torch.finfo(torch.float32).max
INF = float("inf")


def _near_the_largest(sign: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows whose sum per code is beyond float32, and their codes."""
    x = torch.tensor([[3e38, 1.0, -3e38], [3.2e38, 2.0, -3e38], [1.0, 2.0, 3.0], [2.9e38, 4.0, -1e38]]) * sign
    return x, torch.tensor([0, 0, 1, 0])


EXPECTED = torch.tensor([[MOST, 7.0, -MOST], [1.0, 2.0, 3.0]])


def check_statistics(backend):
    for sign in (1.0, -1.0):
        x, indices = _near_the_largest(sign)
        sums, counts = ops.code_statistics(x, indices, 2, backend=backend)
        assert torch.equal(sums, EXPECTED * sign) and counts.tolist() == [3, 1]
    # More rows than a piece of a sorted kernel holds, which are joined after.
    sums, counts = ops.code_statistics(x[:1].expand(700, 3), torch.zeros(700, dtype=torch.int64), 1, backend=backend)
    assert torch.equal(sums, torch.tensor([[-MOST, -700.0, MOST]])) and counts.item() == 700


def check_step(backend):
    x, indices = _near_the_largest()
    codebook = torch.tensor([[3e38, 2.0, -2e38], [0.0, 0.0, 0.0]])
    step = ops.vq_step(x, codebook, backend=backend)
    assert torch.equal(step.indices, indices) and torch.equal(step.sums, EXPECTED)
    levels = torch.stack([codebook, codebook])
    found = ops.residual_quantize(x, levels, statistics=True, backend=backend)
    assert torch.equal(found.sums[0], EXPECTED) and found.sums.isfinite().all()


def check_update(backend):
    over_processes = torch.tensor([[INF, 7.0, -INF], [1.0, 2.0, 3.0]])  # whose sum is beyond float32
    for sums, smoothing in itertools.product((EXPECTED, over_processes), ("laplace", "none")):
        buffers = torch.tensor([[3e38, 2.0, -2e38], [0.0, 0.0, 0.0]]), torch.full((2, 3), 3e38), torch.ones(2)
        expected = tuple(b.clone() for b in buffers)
        arguments = sums, torch.tensor([3, 1])
        ops.ema_update_(*buffers, *arguments, decay=0.5, smoothing=smoothing, backend=backend)
        ops.ema_update_(*expected, *arguments, decay=0.5, smoothing=smoothing, backend="reference")
        for got, right in zip(buffers, expected, strict=True):
            assert got.isfinite().all() and torch.equal(got, right)


def check_replacement(backend):
    codebook, embed_sum, size = torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(2)
    x = torch.tensor([[3e38, 1.0, -3e38]])
    ops.replace_dead_codes_(codebook, embed_sum, size, x, threshold=2.0, backend=backend)
    assert torch.equal(codebook, x.expand(2, 3)) and torch.equal(embed_sum[0], torch.tensor([MOST, 2.0, -MOST]))
    # A row of float64 that float32 does not hold makes no code.
    wide = torch.tensor([[1e39, 1.0, 0.0]], dtype=torch.float64)
    n = ops.replace_dead_codes_(codebook, embed_sum, size.zero_(), wide, threshold=2.0, backend=backend)
    assert n == 0 and codebook.isfinite().all()


def check_losses(backend):
    """A vector that holds infinity has no distance from anything: NaN, as with NaN in it."""
    codebook = torch.randn(4, 3)
    for value in (INF, -INF, float("nan")):
        x = torch.randn(5, 3)
        x[2, 1] = value
        q = ops.quantize(x, codebook, backend=backend)
        assert q.commitment_loss.isnan() and q.codebook_loss.isnan() and q.indices[2] == 0
        r = ops.residual_quantize(x, codebook.expand(2, 4, 3), backend=backend)
        assert r.commitment_losses.isnan().all() and r.codebook_losses.isnan().all()
        mask = torch.arange(5) != 2
        assert ops.quantize(x, codebook, mask=mask, backend=backend).commitment_loss.isfinite()
        masked = ops.residual_quantize(x, codebook.expand(2, 4, 3), mask=mask, backend=backend)
        assert masked.commitment_losses.isfinite().all()


def check_no_rows(backend):
    for estimator in ("straight_through", "rotation", "none"):
        x, levels = torch.randn(0, 3, requires_grad=True), torch.randn(2, 4, 3, requires_grad=True)
        r = ops.residual_quantize(x, levels, estimator=estimator, backend=backend)
        (r.quantized.sum() + r.commitment_losses.sum() + r.codebook_losses.sum()).backward()
        assert x.grad.shape == (0, 3) and torch.equal(levels.grad, torch.zeros(2, 4, 3))
        x, codes = torch.randn(2, 0, 3, requires_grad=True), torch.randn(4, 3, requires_grad=True)
        q = ops.quantize(x, codes, estimator=estimator, backend=backend)
        (q.quantized.sum() + q.commitment_loss + q.codebook_loss).backward()
        assert x.grad.shape == (2, 0, 3) and torch.equal(codes.grad, torch.zeros(4, 3))


CHECKS = [check_statistics, check_step, check_update, check_replacement, check_losses, check_no_rows]


@pytest.mark.parametrize("check", CHECKS)
def test_every_engine(check, engine):
    check(engine)


@pytest.mark.parametrize("check", CHECKS)
def test_cuda_kernels_on_the_host(check, cuda_on_host):  # noqa: F811
    check(cuda_on_host)


@pytest.mark.parametrize("n_threads", [1, 2])
def test_sums_of_many_rows_do_not_depend_on_threads(n_threads, threads, engine):
    if engine == "triton":
        pytest.skip("the interpreter is not threaded")
    threads(n_threads)
    x = torch.full((40_000, 8), 1e38)
    x[::2] *= -1
    x[:, 3] = 1e38
    sums, counts = ops.code_statistics(x, torch.zeros(40_000, dtype=torch.int64), 1, backend=engine)
    assert counts.item() == 40_000 and sums[0].tolist() == [0, 0, 0, MOST, 0, 0, 0, 0]


def test_a_codebook_recovers_from_rows_near_the_largest():
    torch.manual_seed(0)
    vq = VectorQuantizer(4, 8, decay=0.5).train()
    vq(torch.full((64, 4), 3e38))
    assert vq.codebook.isfinite().all()
    for _ in range(400):
        vq(torch.randn(64, 4))
    assert vq.codebook.isfinite().all() and vq(torch.randn(64, 4)).commitment_loss < 1e3
