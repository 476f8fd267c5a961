"""Residual quantization by Triton's interpreter against the reference: indices equal, all else within its roundings."""

import pytest
import torch

pytest.importorskip("triton", reason="needs the package triton")
if torch.cuda.is_available():
    pytest.skip("the interpreter is used where there is no GPU", allow_module_level=True)
from fastvq.backends.tiles import Tile
from fastvq.ops import residual_quantize
from fastvq.ops.nearest import triton_ops as kernels
from fastvq.ops.residual import triton_levels, triton_ops
from fastvq.ops.residual.call import ResidualBackwardCall
from tests.ops.test_residual import draw, indices_changed_since, no_rows
from tests.support.cases import HARD, METRICS, gaussian, generator
from tests.support.tolerance import assert_within, gamma


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
    monkeypatch.setattr(kernels, "MIN_FILTERED_SCORES", 0)
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


def test_rows_left_out():
    no_rows("triton")
    indices_changed_since(lambda *given: triton_ops.residual_quantize_backward(ResidualBackwardCall(*given, None)))


@pytest.fixture
def one_launch(monkeypatch):
    """All calls in one launch, whose number is counted, even of small codebooks."""
    calls = []
    launch = triton_levels.residual_quantize
    monkeypatch.setattr(kernels, "MIN_FILTERED_SCORES", 0)
    monkeypatch.setattr(triton_levels, "residual_quantize", lambda *args: calls.append(args) or launch(*args))
    return calls


@pytest.fixture
def large_tiles(monkeypatch):
    meta = {"BM": 256, "BN": 1024, "GROUP": 8, "num_warps": 4, "num_stages": 1}
    monkeypatch.setattr(triton_levels, "TILES", [Tile(80, triton_levels.WIDEST, torch.float16, meta)])


def check(x, codebooks, metric="euclidean", mask=None):
    got = residual_quantize(x, codebooks, metric=metric, mask=mask, backend="triton")
    expected = residual_quantize(x, codebooks, metric=metric, mask=mask, backend="reference")
    wrong = (got.indices != expected.indices).nonzero()
    assert not len(wrong), f"{len(wrong)} of {got.indices.numel()} differ, the first at {wrong[0].tolist()}"
    torch.testing.assert_close(got.quantized, expected.quantized, rtol=0, atol=0, equal_nan=True)


# Codes that tie, differ in a last bit or cannot win; rows out of the filter's range. Both levels share a codebook, so
# the second meets what the first leaves: zeros, and differences of neighbours.
@pytest.mark.parametrize(
    "metric,case",
    [
        *[("euclidean", case) for case in ("duplicate_codes", "last_bit_apart", "midpoints_of_two_codes")],
        *[("euclidean", case) for case in ("collapsed_codebook", "norms_from_tiny_to_huge", "some_rows_not_finite")],
        ("cosine", "some_codes_not_finite"),
        ("dot", "permutations_of_one_vector"),
    ],
)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.usefixtures("large_tiles")
def test_hard_cases_in_one_launch(case, metric, one_launch):
    x, codebook = HARD[case](generator(0))
    check(x[-32:], codebook[:1024].expand(2, -1, -1), metric)
    assert len(one_launch) == 1


@pytest.mark.parametrize("dim", [1, 11, 12, 65, 128])
def test_one_launch_with_shipped_tiles_at_ugly_sizes(dim, one_launch):
    x, codebook = gaussian(131, 137, dim, generator(dim))
    codebooks = torch.stack([codebook + 3, codebook.flip(0) / 4])
    strided = torch.randn(131, 2 * dim, generator=generator(1))[:, ::2].copy_(x + 3)
    check(strided, codebooks.transpose(1, 2).contiguous().transpose(1, 2), mask=torch.arange(131) % 5 != 1)
    check(x[:1].bfloat16(), codebooks.bfloat16())
    assert len(one_launch) == 2


@pytest.mark.usefixtures("large_tiles")
def test_near_ties_of_every_number(one_launch):
    """Copies in one group, in two lanes, twice in a lane, three times in one (all codes are met), and in 20 lanes."""
    g = generator(5)
    x, codebook = gaussian(8, 3072, 16, g)
    copies = {0: [128], 1: [200], 2: [1024 + 2], 3: [1024 + 3, 2048 + 3], 4: list(range(40, 60))}
    for code, others in copies.items():
        codebook[others] = codebook[code].clone()
        x[code] = codebook[code] + 0.01 * x[code]
    got = residual_quantize(x, codebook.expand(2, -1, -1), backend="triton")
    assert got.indices[:5, 0].tolist() == [0, 1, 2, 3, 4]
    check(x, codebook.expand(2, -1, -1))


@pytest.mark.usefixtures("large_tiles")
def test_fast_finds_codes_that_stand_apart(one_launch):
    g = generator(6)
    codebooks = torch.randn(2, 100, 24, generator=g) * torch.tensor([1, 0.01])[:, None, None]
    chosen = torch.randint(100, (50, 2), generator=g)
    x = codebooks[0, chosen[:, 0]] + codebooks[1, chosen[:, 1]]
    x[7] = torch.nan
    chosen[7] = 0
    got = residual_quantize(x, codebooks, precision="fast", backend="triton")
    assert torch.equal(got.indices, chosen) and len(one_launch) == 1


def test_where_one_launch_serves():
    for x_dtype, dtype, q, k, d, served in (
        (torch.float32, torch.float32, 2, 1024, 128, True),
        (torch.bfloat16, torch.float32, 8, 1024, 8, True),
        (torch.float32, torch.float32, 1, 1024, 64, False),
        (torch.float32, torch.float32, 2, 1024, 129, False),
        (torch.float32, torch.float64, 2, 1024, 64, False),
        (torch.float64, torch.float32, 2, 1024, 64, False),
        (torch.float32, torch.float32, 2, 64, 64, False),
    ):
        x, codebooks = torch.empty(5, d, dtype=x_dtype), torch.empty(q, k, d, dtype=dtype)
        assert triton_levels.served(x, codebooks) == served
    for n, served in ((0, False), (32768, True), (32769, False)):
        assert triton_levels.served(torch.empty(n, 64), torch.empty(2, 1024, 64)) == served
