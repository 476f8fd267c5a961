"""Residual quantization by the CUDA kernels, their source compiled for the processor: all levels in one launch."""

import numpy as np
import pytest
import torch

from fastvq.backends import views
from fastvq.ops import residual_quantize
from fastvq.ops.residual import cuda
from fastvq.ops.residual.call import ResidualBackwardCall
from tests.cuda_on_host import host
from tests.ops.test_residual import draw, indices_changed_since, no_rows, rotation_of_any_length, rotation_over_levels
from tests.support import oracle
from tests.support.cases import DTYPES, HARD, METRICS, generator
from tests.support.tolerance import assert_within, gamma

ROWS, CODES = 17, 300  # of each hard case
# A shape of block for each; the last but one is too wide for one launch, the last needs one row of a second block.
SIZES = ((1, 1, 1, 1), (7, 2, 17, 7), (31, 3, 65, 31), (65, 3, 127, 64), (40, 2, 130, 129), (17, 2, 31, 400),
         (3, 2, 7, 1000), (129, 2, 3, 2))  # fmt: skip


def expected(x, codebooks, metric, mask=None):
    """(indices [N, Q], sums of codes [N, D], sums of squares [Q]): a level after another by the oracle."""
    residual, total = x.float(), torch.zeros(x.shape)
    real = torch.ones(x.shape[0], dtype=torch.bool) if mask is None else mask
    indices, squares = [], []
    for codes in codebooks.float():
        i = oracle.nearest(residual, codes, metric)
        indices.append(torch.where(real, i, -1))
        squares.append((residual.double() - codes[i].double())[real].square().sum())
        total, residual = total + torch.where(real[:, None], codes[i], 0), residual - codes[i]
    return torch.stack(indices, -1), total, torch.stack(squares)


@pytest.mark.parametrize("case", HARD)
def test_hard_cases(case, cuda_on_host):
    x, codebook = HARD[case](generator(0))
    x, codebook = x[:ROWS], codebook[:CODES]
    codebooks = torch.stack([codebook, codebook.flip(0) / 3])
    for metric in METRICS:
        indices, total, _ = expected(x, codebooks, metric)
        got = residual_quantize(x, codebooks, metric=metric, backend="cuda")
        assert torch.equal(got.indices, indices), metric
        assert torch.equal(got.quantized.nan_to_num(1.5), total.nan_to_num(1.5)), metric


@pytest.mark.parametrize("limit", [host.SHARED_LIMIT, 163 << 10])
@pytest.mark.parametrize(("n", "q", "k", "d"), SIZES)
def test_sizes(n, q, k, d, limit, cuda_on_host):
    x, codebooks = draw(n, q, k, d, n + d)
    mask = torch.rand(n, generator=generator(n)) < 0.8
    with host.shared_limit(limit):
        for metric, given in zip(METRICS, (None, mask, mask), strict=True):
            indices, total, squares = expected(x, codebooks, metric, given)
            got = residual_quantize(x, codebooks, metric=metric, mask=given, backend="cuda")
            assert torch.equal(got.indices, indices) and torch.equal(got.quantized, total)
            mean = squares / (max(1, n if given is None else int(given.sum())) * d)
            bound = gamma(1, torch.float32) * mean  # rounded once; what the sums lost before is far less
            assert_within(got.codebook_losses, mean, bound + 4 * gamma(n * d, torch.float64) * mean)


@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes_and_layouts(dtype, cuda_on_host):
    x, codebooks = draw(45, 2, 17, 6)
    images = x.to(dtype).view(3, 3, 5, 6).movedim(-1, 1).contiguous().movedim(1, -1)  # channels first
    for rows, levels in (
        (images, codebooks), (x.to(dtype)[::2], codebooks.mT.contiguous().mT), (x.to(dtype)[:0], codebooks.half()),
    ):  # fmt: skip
        ours, theirs = (residual_quantize(rows, levels, statistics=True, backend=b) for b in ("cuda", "reference"))
        assert torch.equal(ours.indices, theirs.indices) and torch.equal(ours.quantized, theirs.quantized)
        assert ours.quantized.stride() == theirs.quantized.stride()
        assert torch.equal(ours.counts, theirs.counts)
        size = residual_quantize(rows.abs(), levels.abs(), statistics=True, backend="reference").sums.double().abs()
        assert_within(ours.sums, theirs.sums, 2 * torch.finfo(ours.sums.dtype).eps * (theirs.sums.abs() + size))


@pytest.mark.parametrize(
    ("metric", "estimator", "dtype", "masked"),
    [
        ("euclidean", "straight_through", torch.float32, True),
        ("cosine", "rotation", torch.float32, True),
        ("dot", "none", torch.float32, False),
        ("euclidean", "rotation", torch.float64, True),
        ("euclidean", "straight_through", torch.bfloat16, False),
    ],
)
def test_gradients(metric, estimator, dtype, masked, cuda_on_host):
    n, q, k, d = 35, 3, 17, 7
    x, codebooks = draw(n, q, k, d)
    x, w = x.to(dtype), torch.arange(1.0, q + 1)
    g = torch.randn(n, d, generator=generator(2)).to(dtype)
    mask = torch.arange(n) % 3 != 0 if masked else None
    results = []
    for backend in ("cuda", "reference"):
        leaves = x.clone().requires_grad_(), codebooks.clone().requires_grad_()
        out = residual_quantize(
            *leaves, metric=metric, estimator=estimator, mask=mask, beta=0.25, backend=backend
        )  # fmt: skip
        loss = (out.commitment_losses * w).sum() + (out.codebook_losses / w).sum()
        (loss if estimator == "none" else loss + (out.quantized * g).sum()).backward()
        results.append((out, leaves[0].grad, leaves[1].grad))
    (ours, grad_x, grad_c), (theirs, expected_x, expected_c) = results
    for a, b in ((ours.commitment_losses, theirs.commitment_losses), (ours.codebook_losses, theirs.codebook_losses)):
        assert a.dtype == b.dtype
        assert_within(a, b, 2 * torch.finfo(a.dtype).eps * b.abs())  # the last rounding, to either side
    # q levels of a product and a sum, two dot products of the rotation, and the rounding to x's dtype.
    size = g.double().abs().amax() * (1 + 2 * d) + q * (x.double().abs().amax() + q * codebooks.abs().amax())
    bound = gamma(4 * d + 6 * q + 40, torch.float64 if dtype == torch.float64 else torch.float32) * 10 * size
    assert_within(grad_x, expected_x, bound + torch.finfo(dtype).eps * expected_x.double().abs())
    assert_within(grad_c, expected_c, 2 * torch.finfo(torch.float32).eps * expected_c.abs())


def test_rotation_over_levels(cuda_on_host):
    rotation_over_levels(torch.float32, "cuda")


def test_rotation_of_any_length(cuda_on_host):
    rotation_of_any_length("cuda")


def test_rows_left_out(cuda_on_host):
    no_rows("cuda")
    indices_changed_since(lambda *given: cuda.residual_quantize_backward(ResidualBackwardCall(*given, None)))


def test_rows_that_are_not_finite(cuda_on_host):
    x, codebooks = draw(40, 2, 17, 5)
    x[3, 1] = torch.nan
    got = residual_quantize(x, codebooks, statistics=True, backend="cuda")
    assert not got.indices[3].any() and got.commitment_losses.isnan().all()
    assert (got.counts.sum(1) == 39).all()


@pytest.mark.parametrize("kind", host.SANITIZERS)
def test_under_sanitizers(kind, tmp_path):
    """The one launch, and rows that it scores against every code itself."""
    calls, right = host.Calls(), []
    cases = [draw(n, q, k, d, n) for n, q, k, d in SIZES if d < 400]
    for case in ("some_codes_not_finite", "all_codes_equal"):
        x, codebook = HARD[case](generator(0))
        cases.append((x[:ROWS].contiguous(), codebook[:CODES].repeat(2, 1, 1)))
    for i, (x, codebooks) in enumerate(cases):
        (n, d), q = x.shape, codebooks.shape[0]
        mask = torch.rand(n, generator=generator(i)) < 0.7
        rows, codes = views.rows_view(x, None)[1], views.codes_view(codebooks)
        module = host.module()
        workspace = np.full(module.residual_workspace(codes), 0xFF, np.uint8)
        squares = np.full((q, module.residual_parts(rows, codes)), np.nan)
        buffers = [
            host.as_bytes(x), host.as_bytes(codebooks), host.as_bytes(mask), np.full((n, d), np.nan, np.float32),
            np.full((n, q), -9, np.int64), squares, workspace,
        ]  # fmt: skip
        calls.add(
            "residual_quantize", buffers,
            [host.Buffer(0), *rows[1:], host.Buffer(1), *codes[1:], views.metric_code(METRICS[i % 3]),
             host.Buffer(2), host.Buffer(3), *rows[1:], *map(host.Buffer, (4, 5, 6))],
        )  # fmt: skip
        right.append(expected(x, codebooks, METRICS[i % 3], mask))
    for i, (buffers, (indices, total, squares)) in enumerate(zip(calls.run(kind, tmp_path), right, strict=True)):
        assert np.array_equal(np.frombuffer(buffers[4], np.int64), indices.numpy().ravel()), f"call {i}"
        assert np.array_equal(np.frombuffer(buffers[3], np.float32), total.numpy().ravel()), f"call {i}"
        found = torch.from_numpy(np.frombuffer(buffers[5]).reshape(squares.numel(), -1).sum(1))
        assert_within(found, squares, 4 * gamma(total.numel(), torch.float64) * squares)
