"""torch.func and forward-mode derivatives of the ops, against plain torch."""

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import grad, jacfwd, jacrev, jvp, vjp, vmap

from fastvq import ops
from fastvq.models import PixelCNN
from fastvq.ops.masked_conv import reference

BACKENDS = ["cpu", "reference"]


def _masked(backend):
    def op(x, weight, bias):
        return ops.masked_conv2d(x, weight, bias, mask="A", backend=backend)

    def plain(x, weight, bias):
        return reference._convolve(x, weight, bias, "A", None, 1)

    return op, plain


def _gated(backend):
    def op(x, weight, bias, condition=None):
        return ops.gated_masked_conv2d(x, weight, bias, condition, mask="B", backend=backend)

    def plain(x, weight, bias, condition=None):
        y = reference._convolve(x, weight, bias, "B", None, 1)
        if condition is not None:
            y = y + (condition if condition.dim() == 4 else condition[:, :, None, None])
        a, b = y.chunk(2, dim=1)
        return a.tanh() * b.sigmoid()

    return op, plain


CONVOLUTIONS = {"masked": _masked, "gated": _gated}


def _inputs(batch=3):
    torch.manual_seed(0)
    return torch.randn(batch, 2, 5, 4), torch.randn(6, 2, 3, 3), torch.randn(6)


@pytest.fixture(params=CONVOLUTIONS)
def pair(request, backend):
    return CONVOLUTIONS[request.param](backend)


@pytest.fixture(params=BACKENDS)
def backend(request):
    return request.param


def _close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("which", [(0,), (1,), (2,), (0, 1), (0, 1, 2)])
def test_forward_mode_of_the_convolutions(pair, which):
    op, plain = pair
    inputs = _inputs()
    tangents = [torch.randn_like(inputs[i]) for i in which]

    def only(f):
        def call(*moving):
            given = list(inputs)
            for i, t in zip(which, moving, strict=True):
                given[i] = t
            return f(*given)

        return call

    primals = tuple(inputs[i] for i in which)
    out, tangent = jvp(only(op), primals, tuple(tangents))
    expected, expected_tangent = jvp(only(plain), primals, tuple(tangents))
    _close(out, expected)
    _close(tangent, expected_tangent)
    assert tangent.abs().max() > 0
    with forward_ad.dual_level():
        dual = only(op)(*(forward_ad.make_dual(p, t) for p, t in zip(primals, tangents, strict=True)))
        _close(forward_ad.unpack_dual(dual).tangent, expected_tangent)


@pytest.mark.parametrize("shape", [(3, 6), (3, 6, 5, 4)])
def test_forward_mode_of_a_condition(shape, backend):
    op, plain = _gated(backend)
    x, weight, bias = _inputs()
    condition, tangent = torch.randn(shape), torch.randn(shape)
    found = jvp(lambda c: op(x, weight, bias, c), (condition,), (tangent,))
    _close(found, jvp(lambda c: plain(x, weight, bias, c), (condition,), (tangent,)))


def test_forward_mode_in_half_types_keeps_them():
    x, weight, bias = (t.bfloat16() for t in _inputs())
    for op, _ in (_masked("cpu"), _gated("cpu")):
        out, tangent = jvp(lambda x, op=op: op(x, weight, bias), (x,), (torch.ones_like(x),))
        assert out.dtype == tangent.dtype == torch.bfloat16 and out.shape == tangent.shape


def test_colours_have_a_forward_mode_too():
    x, weight, _ = _inputs()
    x, weight = x.repeat(1, 3, 1, 1)[:, :3], weight.repeat(1, 2, 1, 1)[:, :3]
    tangent = torch.randn_like(x)
    found = jvp(lambda x: ops.masked_conv2d(x, weight, mask="A", colours=3), (x,), (tangent,))[1]
    _close(found, reference._convolve(tangent, weight, None, "A", None, 3))


def test_reverse_mode_of_the_convolutions(pair):
    op, plain = pair
    inputs = _inputs()

    def loss(f):
        return lambda *given: f(*given).square().sum()

    for i in range(3):
        _close(grad(loss(op), argnums=i)(*inputs), grad(loss(plain), argnums=i)(*inputs))
    out, pull = vjp(op, *inputs)
    cotangent = torch.randn_like(out)
    _close(pull(cotangent), vjp(plain, *inputs)[1](cotangent))


def test_per_sample_gradients(pair):
    op, plain = pair
    x, weight, bias = _inputs()

    def per_sample(f):
        def loss(weight, bias, sample):
            return f(sample[None], weight, bias).square().sum()

        return vmap(grad(loss, argnums=(0, 1)), in_dims=(None, None, 0))(weight, bias, x)

    found = per_sample(op)
    assert found[0].shape == (3, *weight.shape)
    _close(found, per_sample(plain))


@pytest.mark.parametrize("in_dims", [(0, None, None), (1, None, None), (None, 0, 0), (0, 0, None)])
def test_vmap(pair, in_dims):
    op, plain = pair
    batch = 4
    inputs = []
    for t, d in zip(_inputs(), in_dims, strict=True):
        inputs.append(t if d is None else torch.randn(*t.shape[:d], batch, *t.shape[d:]))
    _close(vmap(op, in_dims)(*inputs), vmap(plain, in_dims)(*inputs))


def test_jacobians(pair):
    op, plain = pair
    x, weight, bias = _inputs(batch=1)
    for jacobian in (jacrev, jacfwd):
        _close(jacobian(lambda b: op(x, weight, b))(bias), jacobian(lambda b: plain(x, weight, b))(bias))


def test_a_second_derivative_is_refused_in_one_sentence(pair):
    op, _ = pair
    x, weight, bias = _inputs()

    def loss(x):
        return op(x, weight, bias).square().sum()

    with pytest.raises(RuntimeError, match="a second derivative was asked for"):
        grad(lambda x: grad(loss)(x).square().sum())(x)
    with pytest.raises(RuntimeError, match="a forward-mode derivative was asked for"):
        jvp(grad(loss), (x,), (torch.ones_like(x),))


def _quantizers():
    torch.manual_seed(1)
    codes, levels = torch.randn(5, 3), torch.randn(2, 5, 3)

    def quantize(x, estimator="rotation"):
        q = ops.quantize(x, codes, estimator=estimator)
        return q.quantized.square().sum() + q.commitment_loss

    def step(x):
        q = ops.vq_step(x, codes)
        return q.quantized.square().sum() + q.commitment_loss

    def residual(x):
        q = ops.residual_quantize(x, levels)
        return q.quantized.square().sum() + q.commitment_losses.sum()

    return {"quantize": quantize, "vq_step": step, "residual_quantize": residual}


@pytest.mark.parametrize("name", _quantizers())
def test_quantizers_in_reverse_mode_and_batches(name):
    f, x = _quantizers()[name], torch.randn(4, 6, 3)
    leaf = x[0].clone().requires_grad_()
    f(leaf).backward()
    _close(grad(f)(x[0]), leaf.grad)
    _close(vmap(grad(f))(x)[0], leaf.grad)
    assert vmap(f)(x).shape == (4,)


@pytest.mark.parametrize("name", _quantizers())
def test_quantizers_refuse_forward_mode_in_one_sentence(name):
    f, x = _quantizers()[name], torch.randn(6, 3)
    message = rf"fastvq.ops.{name}: a forward-mode derivative was asked for .* use the backward"
    with pytest.raises(RuntimeError, match=message):
        jvp(f, (x,), (torch.ones_like(x),))
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match=message):
        f(forward_ad.make_dual(x, torch.ones_like(x)))
    with forward_ad.dual_level():  # a level without a tangent changes nothing
        assert f(x).isfinite()


def _without_gradients():
    """Calls that take a tensor [6, 3] as the argument that the name ends with."""
    torch.manual_seed(2)
    x, ids, counts = torch.randn(6, 3), torch.zeros(6, dtype=torch.int64), torch.ones(6, dtype=torch.int64)

    def update(place):
        def call(t):
            given = [torch.randn(6, 3), torch.randn(6, 3), torch.randn(6, 3)]
            given[place] = t
            ops.ema_update_(*given[:2], torch.ones(6), given[2], counts, decay=0.9)
            return given[0].sum()

        return call

    def replace(place):
        def call(t):
            given = [torch.randn(6, 3), torch.randn(6, 3), torch.ones(6), x]
            given[place] = t
            ops.replace_dead_codes_(*given, threshold=2.0)
            return given[0].sum()

        return call

    def start(t):
        torch.manual_seed(3)
        sizes = ((6, 3, 3, 3), 6, (6, 3, 1, 1), 6, (6, 3, 1, 3), 6, (3, 3, 1, 1), 3, (3, 3, 1, 1), 3, (6, 3, 1, 1), 6)
        state = ops.pixelcnn_start([t, *map(torch.randn, sizes)], [3], (1, 2, 2), backend="reference")
        return ops.pixelcnn_step(state, torch.zeros(1, 2, 2, dtype=torch.int64), 0, 0).sum()

    return {
        "code_statistics": lambda t: ops.code_statistics(t, ids, 5)[0].sum(),
        "ema_update_ codebook": update(0),
        "ema_update_ embed_sum": update(1),
        "ema_update_ sums": update(2),
        "replace_dead_codes_ codebook": replace(0),
        "replace_dead_codes_ x": replace(3),
        "pack_codebook": lambda t: ops.quantize(x, ops.pack_codebook(t)).quantized.sum(),
        "pixelcnn_start": start,
    }


@pytest.mark.parametrize("name", _without_gradients())
def test_ops_without_gradients_refuse_forward_mode_in_one_sentence(name):
    f, x = _without_gradients()[name], torch.randn(6, 3)
    message = rf"fastvq.ops.{name.split()[0]}: a forward-mode derivative was asked for .* use the backward"
    with pytest.raises(RuntimeError, match=message):
        jvp(f, (x.clone(),), (torch.ones_like(x),))
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match=message):
        f(forward_ad.make_dual(x.clone(), torch.ones_like(x)))
    with forward_ad.dual_level():
        assert f(x.clone()).isfinite()


def test_a_state_with_a_tangent_is_refused():
    with torch.no_grad():
        model = PixelCNN(6, 3, 1, first_kernel_size=3)
        state = model.sampler_state((1, 2, 2), None, None)
    ids = torch.zeros(1, 2, 2, dtype=torch.int64)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(state.cache, torch.ones_like(state.cache))
        with pytest.raises(RuntimeError, match=r"fastvq.ops.pixelcnn_step: a forward-mode derivative was asked for"):
            ops.pixelcnn_step(state._replace(cache=dual), ids, 0, 0)
        assert ops.pixelcnn_step(state, ids, 0, 0).isfinite().all()
