"""Residual quantization by Triton's interpreter against the reference: indices equal, all else within its roundings."""

import pytest
import torch

pytest.importorskip("triton", reason="needs the package triton")
if torch.cuda.is_available():
    pytest.skip("the interpreter is used where there is no GPU", allow_module_level=True)
from fastvq.ops import residual_quantize
from fastvq.ops.nearest import triton_ as kernels
from tests.cases import METRICS
from tests.ops.test_residual import draw
from tests.tolerance import assert_within, gamma


def both(x, codebooks, g, w, **options):
    results = []
    for backend in ("triton", "reference"):
        leaves = x.clone().requires_grad_(), codebooks.clone().requires_grad_()
        out = residual_quantize(*leaves, backend=backend, **options)
        loss = (out.commitment_losses * w).sum() + (out.codebook_losses / w).sum()
        if options.get("estimator") != "none":
            loss = loss + (out.quantized * g).sum()
        loss.backward()
        results.append((out, leaves[0].grad, leaves[1].grad))
    return results


@pytest.mark.parametrize(
    "metric,estimator,dtype,masked",
    [
        ("euclidean", "straight_through", torch.float32, True),
        ("cosine", "rotation", torch.float32, False),
        ("dot", "none", torch.float32, True),
        ("euclidean", "rotation", torch.float64, True),
        ("euclidean", "straight_through", torch.bfloat16, False),
    ],
)
def test_against_the_reference(metric, estimator, dtype, masked, monkeypatch):
    monkeypatch.setattr(kernels, "FEW_SCORES", 0)
    n, q, k, d = 70, 3, 65, 17
    x, codebooks = draw(n, q, k, d)
    x = x.to(dtype).view(2, 35, d)
    g, w = torch.randn(2, 35, d, generator=torch.Generator().manual_seed(2)).to(dtype), torch.arange(1.0, q + 1)
    mask = torch.arange(n).view(2, 35) % 3 != 0 if masked else None
    (ours, grad_x, grad_c), (theirs, expected_x, expected_c) = both(
        x, codebooks, g, w, metric=metric, estimator=estimator, mask=mask, beta=0.25, statistics=True
    )
    assert torch.equal(ours.indices, theirs.indices)
    assert torch.equal(ours.quantized, theirs.quantized)
    assert torch.equal(ours.counts, theirs.counts) and torch.equal(ours.sums, theirs.sums)
    for a, b in ((ours.commitment_losses, theirs.commitment_losses), (ours.codebook_losses, theirs.codebook_losses)):
        assert a.dtype == b.dtype
        assert_within(a, b, 2 * torch.finfo(a.dtype).eps * b.abs())  # the last rounding, to either side
    # q levels of a product and a sum, two dot products of the rotation, and the rounding to x's dtype.
    size = g.double().abs().amax() * (1 + 2 * d) + q * (x.double().abs().amax() + q * codebooks.abs().amax())
    bound = gamma(4 * d + 6 * q + 40, torch.float64 if dtype == torch.float64 else torch.float32) * 10 * size
    assert_within(grad_x, expected_x, bound + torch.finfo(dtype).eps * expected_x.double().abs())
    assert_within(grad_c, expected_c, 2 * torch.finfo(torch.float32).eps * expected_c.abs())


@pytest.mark.parametrize("metric", METRICS)
def test_empty_strided_and_not_finite(metric):
    x, codebooks = draw(40, 2, 17, 5)
    empty = residual_quantize(x[:0], codebooks, metric=metric, statistics=True, backend="triton")
    assert empty.indices.shape == (0, 2) and not empty.counts.any() and not empty.commitment_losses.any()
    strided, levels = x.t().contiguous().t()[::2], codebooks.transpose(1, 2).contiguous().transpose(1, 2)
    got = residual_quantize(strided, levels, metric=metric, backend="triton")
    expected = residual_quantize(strided, codebooks, metric=metric, backend="reference")
    assert torch.equal(got.indices, expected.indices) and torch.equal(got.quantized, expected.quantized)
    x[3, 1] = torch.nan
    got = residual_quantize(x, codebooks, metric=metric, statistics=True, backend="triton")
    assert not got.indices[3].any() and got.commitment_losses.isnan().all()
    assert (got.counts.sum(1) == 39).all()
