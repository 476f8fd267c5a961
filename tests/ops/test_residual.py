"""Residual quantization against the loop over nearest, its losses and gradients against literal autograd."""

import pytest
import torch
import torch.nn.functional as F
from torch.library import opcheck

from fastvq.ops import code_statistics, nearest, quantize, residual_quantize
from fastvq.ops.residual import reference
from tests.support.cases import DTYPES, METRICS, generator
from tests.support.tolerance import assert_within, gamma, roundoff

pytestmark = pytest.mark.every_isa


def draw(n, q, k, d, seed=0):
    g = generator(seed)
    scale = 0.5 ** torch.arange(q)[:, None, None]
    return torch.randn(n, d, generator=g), torch.randn(q, k, d, generator=g) * scale


def literal(x, codebooks, mask, metric, estimator, beta):
    """Autograd over the plain formulas; indices from nearest."""
    real = torch.ones(x.shape[:-1], dtype=torch.bool) if mask is None else mask
    residual, total = x, torch.zeros_like(x)
    indices, commitment, codebook = [], [], []
    for codes in codebooks:
        i = nearest(residual.detach().to(codebooks.dtype), codes.detach(), metric=metric)
        c = codes[i]
        commitment.append(beta * F.mse_loss(residual[real], c.detach()[real]))
        codebook.append(F.mse_loss(c[real], residual.detach()[real]))
        indices.append(torch.where(real, i, -1))
        total, residual = total + c.detach(), residual - c.detach()
    out = x + (total - x).detach() if estimator == "straight_through" else total
    return (
        torch.where(real[..., None], out, 0),
        torch.stack(indices, -1),
        torch.stack(commitment),
        torch.stack(codebook),
    )


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("n,q,k,d", [(1, 1, 1, 1), (65, 3, 17, 7), (300, 4, 127, 33)])
def test_values_and_gradients(n, q, k, d, metric, engine):
    x, codebooks = draw(n, q, k, d)
    mask = None if n == 1 else torch.rand(n, generator=generator(1)) < 0.7
    ours = x.clone().requires_grad_(), codebooks.clone().requires_grad_()
    theirs = x.clone().requires_grad_(), codebooks.clone().requires_grad_()
    got = residual_quantize(*ours, metric=metric, mask=mask, beta=0.25, statistics=True, backend=engine)
    out, indices, commitment, codebook = literal(*theirs, mask, metric, "straight_through", 0.25)
    assert torch.equal(got.indices, indices)
    assert_within(got.quantized, out, 4 * roundoff(torch.float32) * (x.abs() + codebooks.abs().amax((0, 1)) * q))
    # torch's float32 mean of n*d squares against our float64 one.
    for a, b in ((got.commitment_losses, commitment), (got.codebook_losses, codebook)):
        assert_within(a, b, gamma(n * d + 8, torch.float32) * b.abs())
    g, w = torch.randn(n, d, generator=generator(2)), torch.arange(1.0, q + 1)
    ((got.quantized * g).sum() + (got.commitment_losses * w).sum() + (got.codebook_losses / w).sum()).backward()
    ((out * g).sum() + (commitment * w).sum() + (codebook / w).sum()).backward()
    size = g.abs() + q * q * (x.abs() + q * codebooks.abs().amax((0, 1)))
    assert_within(ours[0].grad, theirs[0].grad, gamma(6 * q + 8, torch.float32) * size)
    used = torch.zeros(q, k).scatter_add_(1, indices.clamp(min=0).T, torch.ones(q, n))[..., None]
    mass = used * (x.abs().max() + q * codebooks.abs().max()) * 2 / (d * max(1, int((indices[:, 0] >= 0).sum())))
    assert_within(ours[1].grad, theirs[1].grad, gamma(n + 6 * q, torch.float32) * mass)
    residual = x
    for level in range(q):
        sums, counts = code_statistics(residual, indices[:, level], k)
        assert torch.equal(got.sums[level], sums) and torch.equal(got.counts[level], counts)
        residual = residual - torch.where((indices[:, level] >= 0)[:, None], codebooks[level][indices[:, level]], 0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_indices_are_those_of_the_loop(dtype, engine):
    x, codebooks = draw(500, 4, 65, 31)
    x = x.to(dtype).view(5, 100, 31)
    got = residual_quantize(x, codebooks, backend=engine)
    residual = x.to(torch.float64 if dtype == torch.float64 else torch.float32)
    total = torch.zeros_like(residual)
    for level in range(4):
        i = nearest(residual, codebooks[level], backend=engine)
        assert torch.equal(got.indices[..., level], i)
        residual, total = residual - codebooks[level][i], total + codebooks[level][i]
    assert torch.equal(got.quantized, total.to(dtype))
    fewer = residual_quantize(x, list(codebooks), n_levels=2, backend=engine)
    assert torch.equal(fewer.indices, got.indices[..., :2]) and fewer.commitment_losses.shape == (2,)


@pytest.mark.parametrize("estimator", ["straight_through", "rotation", "none"])
def test_one_level_is_quantize(estimator, engine):
    x, codebooks = draw(200, 1, 17, 5)
    mask = torch.arange(200) % 3 != 0
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    one = quantize(a, codebooks[0], estimator=estimator, mask=mask, backend=engine)
    many = residual_quantize(b, codebooks, estimator=estimator, mask=mask, backend=engine)
    assert torch.equal(one.quantized, many.quantized) and torch.equal(one.indices, many.indices[:, 0])
    assert one.commitment_loss == many.commitment_losses[0]
    for q, loss in ((one, one.commitment_loss), (many, many.commitment_losses[0])):
        out = loss if estimator == "none" else loss + (q.quantized * x).sum()
        out.backward()
    # Two dot products of D terms and a handful of roundings; lambda = |c| / |x|.
    lam = (codebooks[0][one.indices.clamp(min=0)].norm(dim=1) / x.norm(dim=1)).clamp(min=1)[:, None]
    bound = gamma(4 * 5 + 40, torch.float32) * 10 * lam * x.norm(dim=1, keepdim=True)
    assert_within(b.grad, a.grad, bound)


def rotations(x, c):
    """[N, D, D]: the rotation in the plane of x and c that takes the direction of x to that of c.

    Written in an orthonormal basis of the plane.
    """
    e = F.normalize(x, dim=-1)
    cosine = (F.normalize(c, dim=-1) * e).sum(-1, keepdim=True)
    beyond = F.normalize(c, dim=-1) - cosine * e
    sine = beyond.norm(dim=-1, keepdim=True)
    f = beyond / sine
    outer = lambda a, b: a[:, :, None] * b[:, None, :]  # noqa: E731
    in_plane = (cosine - 1)[..., None] * (outer(e, e) + outer(f, f)) + sine[..., None] * (outer(f, e) - outer(e, f))
    return torch.eye(x.shape[1], dtype=x.dtype) + in_plane


def rotation_over_levels(dtype, backend):
    """The gradient of quantized and of the losses to x: float64 autograd through the matrices of ``rotations``."""
    n, n_levels, d = 150, 4, 9
    x, codebooks = draw(n, n_levels, 17, d)
    x, g = x.to(dtype).requires_grad_(), torch.randn(n, d, generator=generator(2)).to(dtype)
    mask, weights = torch.arange(n) % 4 != 0, torch.arange(1.0, n_levels + 1)
    got = residual_quantize(x, codebooks, estimator="rotation", mask=mask, beta=0.25, backend=backend)
    ((got.quantized * g).sum() + (got.commitment_losses * weights).sum()).backward()

    wide = x.detach().double().requires_grad_()
    codes = [level[i].double() for level, i in zip(codebooks, got.indices.clamp(min=0).T, strict=True)]
    total, lengths = sum(codes), sum(c.norm(dim=1, keepdim=True) for c in codes)
    turn = rotations(wide.detach(), total)
    length = total.norm(dim=1, keepdim=True)
    scale = length / wide.detach().norm(dim=1, keepdim=True)
    assert_within((turn @ wide.detach()[..., None])[..., 0] * scale, total, 1e-12 * length)
    (scale * (turn @ wide[..., None])[..., 0] * g.double())[mask].sum().backward()
    rotated, loss, residual = wide.grad.clone(), 0, wide
    for w, c in zip(weights, codes, strict=True):
        loss = loss + w * 0.25 * F.mse_loss(residual[mask], c[mask])
        residual = residual - c
    loss.backward()

    # The kernels round the sum of the codes at each level. That turns it by roundings of the codes' lengths over its
    # own length, and the axis of the rotation, x^ + c^, by as much over the length of the axis. Two dot products of D
    # terms and a handful of roundings follow, and a few a level for the losses. The rotated gradient and the result may
    # each be rounded to x's dtype.
    work = torch.float64 if dtype == torch.float64 else torch.float32
    axis = (F.normalize(wide.detach(), dim=1) + F.normalize(total, dim=1)).norm(dim=1, keepdim=True)
    size = 10 * scale * g.double().norm(dim=1, keepdim=True) * (lengths / length) / axis
    size = size + weights.sum() * (wide.detach().abs() + lengths)
    bound = gamma(4 * d + 6 * n_levels + 40, work) * size + 1.01 * roundoff(dtype) * (wide.grad.abs() + rotated.abs())
    assert_within(x.grad[mask], wide.grad[mask], bound[mask])
    assert not x.grad[~mask].any()


@pytest.mark.interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_rotation_over_levels(dtype, engine):
    rotation_over_levels(dtype, engine)


def rotation_of_any_length(backend):
    """Lengths of x for which the factors, or the squares, leave float32's range."""
    x, codebooks = draw(53, 2, 1, 19)
    x = (x * torch.logspace(-36, 15, 53, dtype=torch.float64)[:, None]).float().requires_grad_()
    g = torch.randn(53, 19, generator=generator(2))
    got = residual_quantize(x, codebooks, estimator="rotation", backend=backend)
    (got.quantized * g).sum().backward()
    wide = x.detach().double().requires_grad_()
    one = quantize(wide, got.quantized[:1].detach().double(), estimator="rotation", backend="reference")
    (one.quantized * g.double()).sum().backward()
    lam = one.quantized.norm(dim=1, keepdim=True) / wide.norm(dim=1, keepdim=True)
    bound = gamma(2 * 19 + 20, torch.float32) * 10 * lam * g.double().norm(dim=1, keepdim=True)
    assert_within(x.grad, wide.grad, bound.detach() + torch.finfo(torch.float32).tiny)


@pytest.mark.interpreted
def test_rotation_of_any_length(engine):
    rotation_of_any_length(engine)


def test_threads_and_empty_input(engine, threads):
    x, codebooks = draw(3000, 3, 65, 31)
    results = []
    for n in (1, 2, 7):
        threads(n)
        results.append(residual_quantize(x, codebooks, statistics=True, backend=engine))
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))
    empty = residual_quantize(x[:0], codebooks, statistics=True, backend=engine)
    assert empty.indices.shape == (0, 3) and not empty.counts.any() and not empty.commitment_losses.any()


@pytest.mark.parametrize(
    "codebooks,options,message",
    [
        (torch.zeros(7, 3), {}, r"codebooks must be \[Q, K, D\] with Q >= 1, got \[7, 3\]"),
        (torch.zeros(2, 7, 4), {}, r"codebook must be \[K, D\] with D = 3"),
        ([torch.zeros(7, 3), torch.zeros(6, 3)], {}, r"all of one shape, got \[\[7, 3\], \[6, 3\]\]"),
        ([], {}, r"at least one \[K, D\]"),
        (torch.zeros(2, 7, 3), {"n_levels": 3}, r"n_levels must be 1 ... 2, got 3"),
        (torch.zeros(2, 7, 3), {"metric": "l1"}, r"metric must be one of"),
    ],
)
def test_misuse(codebooks, options, message):
    with pytest.raises(ValueError, match="fastvq.ops.residual_quantize: .*" + message):
        residual_quantize(torch.zeros(5, 3), codebooks, **options)


def test_as_an_operator(engine):
    x, codebooks = draw(30, 2, 7, 5)
    x.requires_grad_()
    codebooks.requires_grad_()
    mask = torch.arange(30) % 4 != 0
    op = torch.ops.fastvq.residual_quantize.default
    for statistics in (False, True):
        opcheck(op, (x, codebooks, mask, "euclidean", "rotation", 0.5, statistics, "exact", engine))
    (g,) = torch.autograd.grad(residual_quantize(x, codebooks).commitment_losses.sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivative"):
        g.sum().backward()
    compiled = torch.compile(lambda a, c: residual_quantize(a, c, backend=engine)[:4], fullgraph=True)
    assert all(map(torch.equal, compiled(x, codebooks), residual_quantize(x, codebooks, backend=engine)[:4]))


def indices_changed_since(backward):
    """``backward`` leaves a row out where one of its indices is no code, as it leaves a masked row out."""
    x, codebooks = draw(9, 3, 11, 7)
    g, w = torch.randn(9, 7, generator=generator(2)), torch.arange(1.0, 4)
    indices = residual_quantize(x, codebooks, backend="reference").indices
    changed, masked = indices.clone(), indices.clone()
    for row, level, bad in ((0, 0, 11), (2, 1, 2**62), (5, 2, -1), (6, 0, -1), (7, 1, -(2**63))):
        changed[row, level], masked[row] = bad, -1
    for estimator in ("straight_through", "rotation", "none"):
        got, expected = (backward(x, codebooks, i, g, w, w, estimator, 0.25, True, True) for i in (changed, masked))
        assert all(map(torch.equal, got, expected)) and not got[0][masked[:, 0] < 0].any()
        assert got[1].isfinite().all() and got[0][masked[:, 0] >= 0].any(-1).all()


def no_rows(backend):
    """Empty gradients of every estimator."""
    for estimator in ("straight_through", "rotation", "none"):
        x, codebooks = torch.randn(0, 7, requires_grad=True), torch.randn(3, 5, 7, requires_grad=True)
        q = residual_quantize(x, codebooks, estimator=estimator, backend=backend)
        (q.quantized.sum() + q.commitment_losses.sum() + q.codebook_losses.sum()).backward()
        assert x.grad.shape == (0, 7) and not codebooks.grad.any()


def test_indices_changed_since():
    indices_changed_since(reference.residual_quantize_backward)


def test_no_rows(engine):
    no_rows(engine)
