"""fastvq.ops.quantize: values, losses, gradients, mask, estimators, on every backend and instruction set."""

import pytest
import torch
import torch.nn.functional as F

from fastvq.ops import nearest, quantize
from tests.conftest import CPU_ENGINES
from tests.support import oracle
from tests.support.cases import DTYPES, METRICS, gaussian, generator
from tests.support.tolerance import assert_within, gamma, roundoff

pytestmark = pytest.mark.every_isa


def literal(x, codebook, mask, metric, estimator, beta):
    """What the docstring says, by autograd in float64, from the oracle's indices. One codebook."""
    indices = oracle.nearest(x, codebook, metric)
    wide, codes = x.double(), F.embedding(indices, codebook.double())
    real = torch.ones_like(indices, dtype=torch.bool) if mask is None else mask
    if estimator == "straight_through":
        out = wide + (codes - wide).detach()
    elif estimator == "rotation":
        unit_x, unit_c = ((t / t.norm(dim=-1, keepdim=True)).detach() for t in (wide, codes))
        r = F.normalize(unit_x + unit_c, dim=-1)
        scale = (codes.norm(dim=-1, keepdim=True) / wide.norm(dim=-1, keepdim=True)).detach()
        along_r, along_x = (r * wide).sum(-1, keepdim=True), (unit_x * wide).sum(-1, keepdim=True)
        out = scale * (wide - 2 * r * along_r + 2 * unit_c * along_x)
    else:
        out = codes.detach()
    out = torch.where(real[..., None], out, 0)
    chosen_x, chosen_c = wide[real], codes[real]
    zero = (x.double() * 0).sum() + (codebook.double() * 0).sum()
    if not real.any():
        return out, torch.where(real, indices, -1), zero, zero
    commitment = beta * F.mse_loss(chosen_x, chosen_c.detach())
    return out, torch.where(real, indices, -1), commitment, F.mse_loss(chosen_c, chosen_x.detach())


def leaves(x, codebook):
    return x.detach().clone().requires_grad_(), codebook.detach().clone().requires_grad_()


def compare(x, codebook, backend, mask=None, metric="euclidean", estimator="straight_through", beta=0.25):
    """Values and gradients of all outputs together against the literal composition."""
    g = torch.randn(x.shape, generator=generator(1)).to(x.dtype)
    ours = leaves(x, codebook)
    theirs = leaves(x.double(), codebook.double())
    got = quantize(*ours, metric=metric, estimator=estimator, mask=mask, beta=beta, backend=backend)
    out, indices, commitment, codebook_loss = literal(*theirs, mask, metric, estimator, beta)

    assert torch.equal(got.indices, indices)
    assert got.quantized.dtype == x.dtype and got.quantized.stride() == torch.empty_like(x).stride()
    codes = torch.where((indices >= 0)[..., None], codebook[indices.clamp(min=0)], 0)
    assert torch.equal(got.quantized.detach(), codes.to(x.dtype))
    loss_dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    assert got.commitment_loss.dtype == got.codebook_loss.dtype == loss_dtype
    # The sum is float64 over exact or float64-rounded differences; one rounding to the loss's type.
    n_sum = x.numel() + 8
    for a, e in ((got.commitment_loss, commitment), (got.codebook_loss, codebook_loss)):
        assert_within(a, e, e.detach().abs() * (roundoff(loss_dtype) * 1.001 + gamma(n_sum, torch.float64)))

    ((got.quantized * g).sum() + 3 * got.commitment_loss + 5 * got.codebook_loss).backward()
    ((out * g.double()).sum() + 3 * commitment + 5 * codebook_loss).backward()
    assert ours[0].grad.dtype == x.dtype and ours[1].grad.dtype == codebook.dtype
    # Gradient to x: the estimator's term and the commitment's, each a few roundings in the kernel's arithmetic (for the
    # rotation three unit vectors and two dot products of D terms, each below |g|), then one to x's type.
    work = torch.float64 if x.dtype == torch.float64 else torch.float32
    real_rows = (indices >= 0)[..., None]
    length_g = g.double().norm(dim=-1, keepdim=True)
    if estimator == "rotation":
        lam = codes.double().norm(dim=-1, keepdim=True) / x.double().norm(dim=-1, keepdim=True)
        size = 10 * lam * length_g
        roundings = 2 * x.shape[-1] + 20
    else:
        size, roundings = g.double().abs(), 8
    pull = (3 * beta * 2 / max(1, int((indices >= 0).sum()) * x.shape[-1])) * (x.double().abs() + codes.double().abs())
    bound = gamma(roundings, work) * (size + pull) + roundoff(x.dtype) * theirs[0].grad.abs()
    tiny = torch.finfo(x.dtype).tiny
    assert_within(ours[0].grad, theirs[0].grad, torch.where(real_rows, bound + tiny, 0))
    # Gradient to the codebook: float64 sums of differences, one rounding to its type.
    chosen = torch.where(real_rows, x.double().abs() + codes.double().abs(), 0).reshape(-1, x.shape[-1])
    mass = torch.zeros_like(codebook, dtype=torch.float64)
    mass.index_add_(0, indices.clamp(min=0).reshape(-1), chosen)
    scale = 5 * 2 / max(1, int((indices >= 0).sum()) * x.shape[-1])
    bound = gamma(n_sum, torch.float64) * scale * mass + 2 * roundoff(loss_dtype) * theirs[1].grad.abs()
    bound = bound + roundoff(codebook.dtype) * theirs[1].grad.abs() + torch.finfo(codebook.dtype).tiny
    assert_within(ours[1].grad, theirs[1].grad, bound)


@pytest.mark.parametrize("estimator", ["straight_through", "rotation"])
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("n,k,d", [(1, 1, 1), (7, 3, 2), (65, 17, 31), (300, 127, 64), (131, 1000, 7)])
def test_values_and_gradients(n, k, d, metric, estimator, engine):
    x, codebook = gaussian(n, k, d, generator(n + k + d))
    compare(x, codebook, engine, metric=metric, estimator=estimator)


@pytest.mark.parametrize("x_dtype", DTYPES)
@pytest.mark.parametrize("codebook_dtype", DTYPES)
@pytest.mark.parametrize("estimator", ["straight_through", "rotation"])
def test_any_mix_of_dtypes(x_dtype, codebook_dtype, estimator, engine):
    x, codebook = gaussian(127, 65, 31, generator(2))
    compare(x.to(x_dtype), codebook.to(codebook_dtype), engine, estimator=estimator)


@pytest.mark.interpreted
@pytest.mark.parametrize("estimator", ["straight_through", "rotation"])
def test_mask(estimator, engine):
    g = generator(3)
    x, codebook = gaussian(200, 17, 31, g)
    mask = torch.rand(200, generator=g) < 0.5
    compare(x, codebook, engine, mask=mask, estimator=estimator)
    compare(x.view(4, 50, 31), codebook, engine, mask=mask.view(50, 4).t(), estimator=estimator)
    # What a masked vector holds does not matter.
    x[~mask] = torch.nan
    q = quantize(x, codebook, mask=mask, backend=engine)
    assert q.commitment_loss.isfinite() and (q.quantized[~mask] == 0).all() and (q.indices[~mask] == -1).all()


@pytest.mark.interpreted
def test_nothing_unmasked(engine):
    x, codebook = leaves(*gaussian(7, 5, 3, generator(4)))
    q = quantize(x, codebook, mask=torch.zeros(7, dtype=torch.bool), backend=engine)
    assert q.commitment_loss == 0 and q.codebook_loss == 0 and not q.quantized.any()
    (q.quantized.sum() + q.commitment_loss + q.codebook_loss).backward()
    assert not x.grad.any() and not codebook.grad.any()


@pytest.mark.interpreted
def test_no_vectors(engine):
    x, codebook = leaves(torch.empty(0, 3), torch.randn(5, 3))
    q = quantize(x, codebook, backend=engine)
    assert q.quantized.shape == (0, 3) and q.indices.shape == (0,) and q.commitment_loss == 0
    (q.quantized.sum() + q.commitment_loss + q.codebook_loss).backward()
    assert x.grad.shape == (0, 3) and not codebook.grad.any()


@pytest.mark.parametrize("estimator", ["straight_through", "rotation"])
def test_images_and_odd_strides(estimator, engine):
    g = generator(5)
    images, codebook = torch.randn(3, 17, 5, 7, generator=g), torch.randn(65, 17, generator=g)
    for x in (
        images.movedim(1, -1),
        images.to(memory_format=torch.channels_last).movedim(1, -1),
        images.permute(3, 0, 2, 1),
        images.movedim(1, -1)[:, ::2, 1::3],
    ):
        compare(x, codebook, engine, estimator=estimator)
        compare(x, codebook.t().contiguous().t(), engine, mask=torch.rand(x.shape[:-1], generator=g) < 0.7)


@pytest.mark.interpreted
def test_gradient_that_is_expanded_or_absent(engine):
    x, codebook = leaves(*gaussian(65, 17, 31, generator(6)))
    quantize(x, codebook, backend=engine).quantized.sum().backward()  # a zero-stride gradient
    assert (x.grad == 1).all() and not codebook.grad.any()
    x.grad = codebook.grad = None
    quantize(x, codebook, backend=engine).codebook_loss.backward()
    assert not x.grad.any() and codebook.grad.any()
    x.grad = codebook.grad = None
    quantize(x, codebook, backend=engine).commitment_loss.backward()
    assert x.grad.any() and not codebook.grad.any()


@pytest.mark.interpreted
def test_estimator_none_detaches(engine):
    x, codebook = leaves(*gaussian(65, 17, 31, generator(7)))
    q = quantize(x, codebook, estimator="none", backend=engine)
    assert not q.quantized.requires_grad and q.commitment_loss.requires_grad
    q.commitment_loss.backward()
    assert x.grad.any()


@pytest.mark.parametrize("metric", METRICS)
def test_heads(metric, engine):
    g = generator(8)
    x, codebook = torch.randn(3, 2, 31, 17, generator=g), torch.randn(3, 65, 17, generator=g)
    mask = torch.rand(3, 2, 31, generator=g) < 0.7
    a, c = leaves(x, codebook)
    q = quantize(a, c, metric=metric, mask=mask, backend=engine)
    q.codebook_loss.backward()
    for h in range(3):
        one = leaves(x[h], codebook[h])
        alone = quantize(*one, metric=metric, mask=mask[h], backend=engine)
        assert torch.equal(alone.quantized, q.quantized[h]) and torch.equal(alone.indices, q.indices[h])
        share = mask[h].sum() / mask.sum()
        (alone.codebook_loss * share).backward()
        assert_within(c.grad[h], one[1].grad, 8 * roundoff(torch.float32) * one[1].grad.abs().double())


@pytest.mark.interpreted
def test_rotation_where_none_is_defined(engine):
    codebook = torch.tensor([[1.0, 0.0], [0.0, 0.0], [-4.0, 0.0]])
    x = torch.tensor([[0.0, 0.0], [0.01, 0.01], [-3.0, 0.0], [2.0, 1.0]], requires_grad=True)
    q = quantize(x, codebook, estimator="rotation", metric="euclidean", backend=engine)
    g = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0], [7.0, 8.0]])
    q.quantized.backward(g)
    assert q.indices.tolist() == [1, 1, 2, 0]
    assert torch.equal(x.grad[:2], g[:2])  # x is zero; its code is zero
    assert_within(x.grad[2], g[2] * 4 / 3, 1e-5)  # x already points at its code: scaled only
    # Opposite: one code only, behind the vector.
    y = torch.tensor([[2.0, 0.0]], requires_grad=True)
    quantize(y, codebook[2:], estimator="rotation", backend=engine).quantized.backward(g[:1])
    assert torch.equal(y.grad, g[:1])


# |x| from far below to far above |c|: the factors of the rotation leave float32's range, the gradient does not.
@pytest.mark.interpreted
@pytest.mark.parametrize(("x_dtype", "codebook_dtype", "smallest", "largest", "code"), [
    (torch.float32, torch.float32, -36, 15, 1.0),
    (torch.float32, torch.bfloat16, -44, 15, 1e-10),
    (torch.bfloat16, torch.float32, -36, 15, 1.0),
    (torch.float32, torch.float64, -36, 15, 1.0),
    (torch.float64, torch.float64, -120, 100, 1.0),
])  # fmt: skip
def test_rotation_of_any_length(x_dtype, codebook_dtype, smallest, largest, code, engine):
    x, codebook = gaussian(53, 1, 19, generator(15))
    size = torch.logspace(smallest, largest, 53, dtype=torch.float64)[:, None]
    compare((x * size).to(x_dtype), (codebook * code).to(codebook_dtype), engine, estimator="rotation")


@pytest.mark.interpreted
def test_rotation_of_rows_that_are_not_finite(engine):
    for bad in (torch.nan, torch.inf):
        x, codebook = leaves(*gaussian(9, 3, 11, generator(16)))
        with torch.no_grad():
            x[3, 5] = bad
        quantize(x, codebook, estimator="rotation", backend=engine).quantized.sum().backward()
        assert x.grad[3].isnan().all() and x.grad[:3].isfinite().all() and x.grad[4:].isfinite().all()


@pytest.mark.interpreted
def test_rows_that_are_not_finite(engine):
    x, codebook = leaves(*gaussian(65, 17, 31, generator(9)))
    with torch.no_grad():
        x[3, 5] = torch.nan
    q = quantize(x, codebook, backend=engine)
    assert q.indices[3] == 0 and q.commitment_loss.isnan() and q.codebook_loss.isnan()
    assert torch.equal(q.quantized[3], codebook[0])
    (q.commitment_loss + q.codebook_loss).backward()
    assert x.grad[3].isnan().any() and codebook.grad.isfinite().all()


@pytest.mark.parametrize("estimator", ["straight_through", "rotation"])
def test_threads_do_not_change_anything(estimator, engine, threads):
    x, codebook = gaussian(5000, 127, 33, generator(10))
    results = []
    for n in (1, 2, 7):
        threads(n)
        a, c = leaves(x, codebook)
        q = quantize(a, c, estimator=estimator, backend=engine)
        (q.quantized.square().sum() + q.commitment_loss + q.codebook_loss).backward()
        results.append((q.quantized, q.indices, q.commitment_loss, q.codebook_loss, a.grad, c.grad))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_instruction_sets_agree_to_the_bit(use_engine):
    x, codebook = gaussian(500, 127, 33, generator(11))
    losses = set()
    for name in CPU_ENGINES:
        q = quantize(x, codebook, backend=use_engine(name))
        losses.add((q.commitment_loss.item(), q.codebook_loss.item()))
    assert len(losses) == 1


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("estimator", ["straight_through", "none"])
def test_gradcheck_of_the_losses(metric, estimator, engine):
    # Well separated clusters, so that the finite differences cross no boundary between codes.
    g = generator(12)
    codebook = 10 * torch.eye(5, dtype=torch.float64) + 0.1 * torch.randn(5, 5, generator=g, dtype=torch.float64)
    x = codebook[torch.randint(5, (9,), generator=g)] + 0.1 * torch.randn(9, 5, generator=g, dtype=torch.float64)
    mask = torch.arange(9) % 3 != 0
    x, codebook = leaves(x, codebook)

    def commitment(a):
        return quantize(
            a, codebook.detach(), metric=metric, estimator=estimator, mask=mask, beta=0.7, backend=engine
        ).commitment_loss

    def pull(c):
        return quantize(x.detach(), c, metric=metric, estimator=estimator, mask=mask, backend=engine).codebook_loss

    assert torch.autograd.gradcheck(commitment, (x,))
    assert torch.autograd.gradcheck(pull, (codebook,))


@pytest.mark.interpreted
def test_second_derivative_raises(engine):
    x, codebook = leaves(*gaussian(7, 5, 3, generator(13)))
    (g,) = torch.autograd.grad(quantize(x, codebook, backend=engine).commitment_loss, x, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivative"):
        g.sum().backward()


def test_indices_are_those_of_nearest(engine):
    x, codebook = gaussian(500, 127, 33, generator(14))
    for metric in METRICS:
        for precision in ("exact", "fast"):
            q = quantize(x, codebook, metric=metric, precision=precision, backend=engine)
            assert torch.equal(q.indices, nearest(x, codebook, metric=metric, precision=precision, backend=engine))


def indices_changed_since(backward):
    """``backward`` leaves a row out where its index is no code, as it leaves a masked row out."""
    x, codebook = gaussian(9, 5, 7, generator(6))
    g, one = torch.randn(9, 7, generator=generator(7)), torch.ones(())
    indices = nearest(x, codebook, backend="reference")
    changed, masked = indices.clone(), indices.clone()
    for row, bad in ((0, 5), (3, 2**62), (4, -2), (8, -(2**63))):
        changed[row], masked[row] = bad, -1
    for estimator in ("straight_through", "rotation"):
        # Of a mean the changed rows still count as members.
        got, expected = (
            backward(x, codebook, i, g, None, None, estimator, 0.25, True, False)[0] for i in (changed, masked)
        )
        assert torch.equal(got, expected) and not got[masked < 0].any() and got[masked >= 0].any(-1).all()
    _, got = backward(x, codebook, changed, None, None, one, "none", 0.25, False, True)
    _, expected = backward(x, codebook, masked, None, None, one, "none", 0.25, False, True)
    real = (masked >= 0).sum() / (changed >= 0).sum()
    assert_within(got, expected * real, 4 * roundoff(torch.float32) * expected.abs().double())
