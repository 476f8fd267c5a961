"""fastvq.ops.masked_conv2d and gated_masked_conv2d against torch's convolution in float64, on every engine."""

import pytest
import torch
import torch.nn.functional as F

from fastvq.ops import gated_masked_conv2d, masked_conv2d
from fastvq.ops.masked_conv import MASKS, reference
from tests.conftest import CPU_ENGINES
from tests.support.cases import generator
from tests.support.tolerance import assert_within, gamma, roundoff

# B, C_in, C_out, H, W, kernel: prime, one, off-tile, maps below the kernel, wider than a chunk of the gradient.
SHAPES = [
    (2, 3, 5, 7, 9, (3, 3)),
    (1, 1, 1, 1, 1, (3, 3)),
    (1, 17, 49, 5, 1, (5, 5)),
    (2, 31, 67, 3, 2, (11, 11)),
    (3, 33, 64, 13, 11, (3, 7)),
    (2, 5, 34, 1, 139, (1, 5)),
    (1, 64, 130, 9, 33, (3, 3)),
    (2, 16, 48, 17, 8, (7, 1)),
]
LAYOUTS = [torch.contiguous_format, torch.channels_last]


def literal_mask(mask, weight, colours=1):
    """The definition, weight by weight."""
    c_out, c_in, kh, kw = weight.shape
    used = torch.zeros(weight.shape, dtype=torch.bool)
    for y in range(kh):
        for x in range(kw):
            above, row, left, centre = y < kh // 2, y == kh // 2, x < kw // 2, x == kw // 2
            tap = {
                "A": above or (row and left),
                "B": above or (row and (left or centre)),
                "vertical-A": above,
                "vertical-B": above or row,
                "horizontal-A": row and left,
                "horizontal-B": row and (left or centre),
            }[mask]
            used[:, :, y, x] = tap
            if row and centre and colours > 1:
                for o in range(c_out):
                    for i in range(c_in):
                        of_out, of_in = o * colours // c_out, i * colours // c_in
                        used[o, i, y, x] = of_in < of_out if mask.endswith("A") else of_in <= of_out
    return used


def case(shape, seed=0, dtype=torch.float32, layout=torch.contiguous_format):
    b, c_in, c_out, h, w, (kh, kw) = shape
    g = generator(seed)
    x = torch.randn(b, c_in, h, w, generator=g).to(dtype).contiguous(memory_format=layout)
    weight = torch.randn(c_out, c_in, kh, kw, generator=g).to(dtype)
    bias = torch.randn(c_out, generator=g).to(dtype)
    grad = torch.randn(b, c_out, h, w, generator=g).to(dtype)
    return x, weight, bias, grad


def leaves(*tensors):
    return [t.detach().clone(memory_format=torch.preserve_format).requires_grad_() for t in tensors]


def conv(x, weight, bias):
    return F.conv2d(x, weight, bias, padding=(weight.shape[2] // 2, weight.shape[3] // 2))


def check(x, weight, bias, grad, used, run, gamma=gamma):
    """Output and all gradients of run(x, weight, bias) within gamma_n times the sum of magnitudes, weights NaN where
    masked. Sums are float32 below float64 inputs, then rounded to x's dtype."""
    wide = [t.double() for t in (x, torch.where(used, weight, 0), bias)]
    theirs, sizes = leaves(*wide), leaves(*(t.abs() for t in wide))
    expected, magnitude = conv(*theirs), conv(*sizes)
    expected.backward(grad.double())
    magnitude.backward(grad.double().abs())

    ours = leaves(x, torch.where(used, weight, torch.nan), bias)
    actual = run(*ours)
    actual.backward(grad)
    work = torch.float64 if x.dtype == torch.float64 else torch.float32
    n_taps = int(used.any(0).any(0).sum())
    pixels = x.shape[0] * x.shape[2] * x.shape[3]
    lengths = n_taps * x.shape[1] + 2, n_taps * weight.shape[0] + 2, pixels + 2, pixels + 2
    for name, a, e, m, n in zip(
        ("out", "grad x", "grad weight", "grad bias"),
        (actual, *(t.grad for t in ours)),
        (expected, *(t.grad for t in theirs)),
        (magnitude, *(t.grad for t in sizes)),
        lengths,
        strict=True,
    ):
        assert a.dtype == x.dtype, name
        if name == "grad weight":
            assert (a[~used] == 0).all()
            e, m = torch.where(used, e, 0), torch.where(used, m, 0)
        assert_within(a.detach(), e.detach(), gamma(n, work) * m.detach() + roundoff(x.dtype) * e.detach().abs())
    return actual


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradients(shape, layout, engine):
    x, weight, bias, grad = case(shape, layout=layout)
    used = literal_mask("B", weight)
    out = check(
        x, weight, bias, grad.contiguous(memory_format=layout), used, lambda *t: masked_conv2d(*t, backend=engine)
    )
    if x.is_contiguous(memory_format=layout) and not x.is_contiguous():
        assert out.is_contiguous(memory_format=layout)
    else:
        assert out.is_contiguous()


@pytest.mark.parametrize("mask", MASKS)
def test_masks(mask, engine):
    x, weight, bias, grad = case((2, 7, 19, 6, 5, (5, 3)), 1)
    check(x, weight, bias, grad, literal_mask(mask, weight), lambda *t: masked_conv2d(*t, mask=mask, backend=engine))


def test_any_bool_mask(engine):
    g = generator(2)
    for seed in range(5):
        x, weight, bias, grad = case((2, 6, 11, 5, 7, (3, 5)), seed)
        taps = torch.rand(3, 5, generator=g) < 0.4
        check(
            x,
            weight,
            bias,
            grad,
            taps.expand(weight.shape),
            lambda *t, m=taps: masked_conv2d(*t, mask=m, backend=engine),
        )
    none = torch.zeros(3, 5, dtype=torch.bool)
    out = masked_conv2d(x, weight, bias, mask=none, backend=engine)
    assert torch.equal(out, bias[None, :, None, None].expand_as(out))


@pytest.mark.parametrize("mask", ["A", "B", "horizontal-A", "horizontal-B"])
def test_colours(mask, engine):
    x, weight, bias, grad = case((2, 9, 21, 5, 4, (3, 3)), 3)
    used = literal_mask(mask, weight, 3)
    check(x, weight, bias, grad, used, lambda *t: masked_conv2d(*t, mask=mask, colours=3, backend=engine))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_dtypes(dtype):
    for layout in LAYOUTS:
        x, weight, bias, grad = case((2, 19, 35, 6, 9, (3, 3)), 4, dtype, layout)
        check(x, weight, bias, grad, literal_mask("B", weight), lambda *t: masked_conv2d(*t, backend="reference"))


@pytest.mark.parametrize("name", CPU_ENGINES)
def test_bfloat16_on_every_instruction_set(name, use_engine):
    backend = use_engine(name)
    x, weight, bias, grad = case((2, 19, 35, 6, 9, (3, 3)), 5, torch.bfloat16)
    check(x, weight, bias, grad, literal_mask("B", weight), lambda *t: masked_conv2d(*t, backend=backend))


def test_empty_batch(engine):
    x, weight, bias = leaves(*case((0, 3, 6, 4, 5, (3, 3)))[:3])
    for run in (masked_conv2d, gated_masked_conv2d):
        out = run(x, weight, bias, backend=engine)
        out.sum().backward()
        assert out.shape[0] == 0 and x.grad.shape == x.shape and not weight.grad.any() and not bias.grad.any()


def test_odd_strides(engine):
    g = generator(6)
    big = torch.randn(4, 14, 11, 26, generator=g)
    weight, bias = torch.randn(10, 7, 3, 3, generator=g), torch.randn(10, generator=g)
    for x in (big[:, ::2, 1::2, ::3], big.permute(0, 1, 3, 2)[:2, 7:], big[:1, :1].expand(3, 7, 11, 26)):
        grad = torch.randn(x.shape[0], 10, *x.shape[2:], generator=g)
        ours, plain = leaves(x), leaves(x.contiguous())
        a = masked_conv2d(x, weight, bias, backend=engine)
        assert torch.equal(a, masked_conv2d(x.contiguous(), weight, bias, backend=engine))
        for (leaf,), incoming in ((ours, grad.mT.contiguous().mT), (plain, grad)):
            masked_conv2d(leaf, weight.mT.contiguous().mT, bias, backend=engine).backward(incoming)
        assert torch.equal(ours[0].grad, plain[0].grad)


@pytest.mark.parametrize("name", CPU_ENGINES)
def test_threads_and_batch_do_not_change_a_bit(name, use_engine, threads):
    backend = use_engine(name)
    x, weight, bias, grad = case((29, 20, 50, 13, 17, (3, 3)), 7)  # work enough for 7 threads
    results = []
    for n in (1, 2, 7):
        threads(n)
        ours = leaves(x, weight, bias)
        out = masked_conv2d(*ours, backend=backend)
        out.backward(grad)
        gated = gated_masked_conv2d(x, weight, bias, backend=backend)
        results.append([out.detach(), gated, *(t.grad for t in ours)])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
    assert torch.equal(masked_conv2d(x[3:4], weight, bias, backend=backend), results[0][0][3:4])


def test_large_images_in_bands_and_groups():
    # Wider and higher than a band of scratch, more images than a group of the weight gradient.
    x, weight, bias, grad = case((5, 40, 33, 90, 70, (3, 3)), 8)
    check(x, weight, bias, grad, literal_mask("B", weight), lambda *t: masked_conv2d(*t))


@pytest.mark.parametrize("condition_kind", ["none", "vector", "map"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gated(layout, condition_kind, engine):
    check_gated(layout, condition_kind, lambda *t: gated_masked_conv2d(*t, backend=engine))


def check_gated(layout, condition_kind, run, gamma=gamma, dtype=torch.float32):
    shape = (2, 13, 34, 6, 9, (3, 3))
    x, weight, bias, _ = case(shape, 9, dtype, layout)
    g = generator(10)
    grad = torch.randn(2, 17, 6, 9, generator=g).to(dtype)
    used = literal_mask("B", weight)
    condition = {
        "none": None,
        "vector": torch.randn(2, 34, generator=g).to(dtype),
        "map": torch.randn(2, 34, 6, 9, generator=g).to(dtype).contiguous(memory_format=layout),
    }[condition_kind]
    given = [] if condition is None else [condition]

    def literal(x, weight, bias, *condition):
        y = conv(x, weight, bias)
        if condition:
            y = y + (condition[0] if condition[0].dim() == 4 else condition[0][:, :, None, None])
        a, b = y.chunk(2, 1)
        return y, a.tanh() * b.sigmoid()

    wide = [t.double() for t in (x, torch.where(used, weight, 0), bias, *given)]
    theirs = leaves(*wide)
    _, expected = literal(*theirs)
    expected.backward(grad.double())
    magnitude, _ = literal(*(t.abs() for t in wide))

    ours = leaves(x, torch.where(used, weight, torch.nan), bias, *given)
    actual = run(*ours)
    actual.backward(grad)
    u = roundoff(torch.float32)
    # What is returned or kept in a narrower type is rounded once more.
    kept = roundoff(dtype) if dtype != torch.float32 else 0.0

    def assert_near(a, e, bound):
        assert_within(a, e, bound + kept * (e.abs() + bound))

    # The pre-activations' error e; the gate's derivatives are at most 1 and 1/4, its own roundings 6 + 6 + 1.
    e = gamma(5 * 13 + 3, torch.float32) * magnitude
    of_a, of_b = e.chunk(2, 1)
    assert_near(actual.detach(), expected.detach(), of_a + of_b / 4 + 13 * u * expected.detach().abs())
    # The gradient at a pre-activation: its derivatives in a and b are at most 1 per unit of gradient; the products
    # that make it have at most 12 + 6 roundings of factors that are at most 1. Kept factors t and s that are off by a
    # relative r put s (1 - t^2) off by less than 3 r and t s (1 - s) by less than 2 r, each is then rounded: 4 r.
    error = (of_a + of_b + 20 * u + 4.1 * kept) * grad.double().abs()
    both = torch.cat([error, error], 1)
    pulled = leaves(*(t.abs() for t in wide))
    size = grad.double().abs()
    torch.autograd.backward(
        conv(*pulled[:3]), both + gamma(pixels_of(x) + 34 * 5, torch.float32) * size.repeat(1, 2, 1, 1)
    )
    for a, t, m in zip(ours[:3], theirs, pulled, strict=False):
        assert_near(a.grad, t.grad if a.grad.dim() == 1 or a is ours[0] else torch.where(used, t.grad, 0), m.grad)
    if condition is not None:
        bound = (
            both
            if condition.dim() == 4
            else both.sum((2, 3)) + gamma(54, torch.float32) * 4 * size.repeat(1, 2, 1, 1).sum((2, 3))
        )
        assert_near(ours[3].grad, theirs[3].grad, bound)


def pixels_of(x):
    return x.shape[0] * x.shape[2] * x.shape[3]


@pytest.mark.parametrize("name", CPU_ENGINES)
def test_gate_is_accurate_everywhere(name, use_engine):
    """tanh and sigmoid within 6 * 2^-24, relative."""
    check_gate(use_engine(name), "cpu", 6 * 2.0**-24)


def check_gate(backend, device, bound):
    g = generator(11)
    spread = torch.randn(4000, generator=g) * torch.pow(10.0, torch.rand(4000, generator=g) * 40 - 38)
    values = torch.cat(
        [spread, torch.linspace(-100, 100, 2001), torch.tensor([0.0, -0.0, 1e-45, torch.inf, -torch.inf, torch.nan])]
    )
    x = values.view(1, 1, 1, -1)
    condition = x.expand(1, 2, 1, -1).to(device)  # added to zeros: it reaches the gate as it is
    zeros = torch.zeros_like(x, device=device), torch.zeros(2, 1, 1, 1, device=device)
    out, t, s = (
        r.cpu() for r in torch.ops.fastvq.gated_masked_conv2d(*zeros, None, condition, "B", None, True, backend)
    )
    exact_t, exact_s = x.double().tanh(), x.double().sigmoid()
    tiny = 2.0**-125
    # Below the normal range tanh(x) = x is still exact; sigmoid is cut at exp(-87).
    assert_within(t, exact_t, bound * exact_t.abs() + 2.0**-149)
    assert_within(s, exact_s, bound * exact_s.abs() + tiny)
    assert_within(out, exact_t * exact_s, 2.01 * bound * (exact_t * exact_s).abs() + tiny)


@pytest.mark.parametrize("run", ["masked", "gated"])
def test_gradcheck_of_the_reference(run):
    x, weight, bias, _ = case((2, 3, 6, 4, 3, (3, 3)), 12, torch.float64)
    condition = torch.randn(2, 6, 4, 3, generator=generator(13), dtype=torch.float64)
    for mask, colours in (("B", 1), ("A", 3), (torch.rand(3, 3, generator=generator(14)) < 0.5, 1)):
        if run == "masked":
            inputs = leaves(x, weight, bias)
            assert torch.autograd.gradcheck(
                lambda *t, m=mask, c=colours: masked_conv2d(*t, mask=m, colours=c, backend="reference"), inputs
            )
        elif colours == 1:
            inputs = leaves(x, weight, bias, condition)
            assert torch.autograd.gradcheck(
                lambda *t, m=mask: gated_masked_conv2d(*t, mask=m, backend="reference"), inputs
            )


def test_autocast():
    x, weight, bias, _ = case((2, 8, 12, 5, 6, (3, 3)), 15)
    inputs = leaves(x, weight, bias)
    with torch.autocast("cpu", torch.bfloat16):
        out, gated = masked_conv2d(*inputs), gated_masked_conv2d(*inputs)
    assert out.dtype == gated.dtype == torch.bfloat16
    assert torch.equal(out, masked_conv2d(*(t.bfloat16() for t in inputs)))
    (out.float().sum() + gated.float().sum()).backward()
    assert all(t.grad.dtype == torch.float32 for t in inputs)


def test_eval_keeps_nothing():
    x, weight, bias, _ = case((1, 4, 6, 5, 5, (3, 3)), 16)
    _, t, s = torch.ops.fastvq.gated_masked_conv2d(x, weight, bias, None, "B", None, False, None)
    assert t.numel() == s.numel() == 0
    assert gated_masked_conv2d(x, weight, bias).grad_fn is None


def test_registration():
    x, weight, bias, _grad = case((2, 3, 6, 5, 4, (3, 3)), 17)
    condition, taps = torch.randn(2, 6, generator=generator(18)), torch.eye(3, dtype=torch.bool)
    plain, gate = torch.ops.fastvq.masked_conv2d.default, torch.ops.fastvq.gated_masked_conv2d.default
    xg, wg, bg, cg = leaves(x, weight, bias, condition)
    torch.library.opcheck(plain, (xg, wg, bg, "A", None, 3, None))
    torch.library.opcheck(plain, (xg.to(memory_format=torch.channels_last), wg, None, "custom", taps, 1, "cpu"))
    torch.library.opcheck(gate, (xg, wg, bg, cg, "B", None, True, None))
    torch.library.opcheck(gate, (x, weight, None, None, "vertical-B", None, False, "reference"))


def test_compile():
    x, weight, bias, _grad = case((2, 3, 6, 5, 4, (3, 3)), 19)
    condition = torch.randn(2, 6, generator=generator(20))

    def run(x, weight, bias, condition):
        return gated_masked_conv2d(x, weight, bias, condition, mask="vertical-B").sum() + masked_conv2d(x, weight).sum()

    plain, compiled = leaves(x, weight, bias, condition), leaves(x, weight, bias, condition)
    run(*plain).backward()
    torch.compile(run, fullgraph=True, backend="aot_eager")(*compiled).backward()
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(plain, compiled, strict=True))


def test_second_derivative_raises():
    x, weight, _, _ = case((1, 2, 4, 3, 3, (3, 3)), 21)
    x, weight = leaves(x, weight)
    for run in (masked_conv2d, gated_masked_conv2d):
        (g,) = torch.autograd.grad(run(x, weight).square().sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="second derivative"):
            g.sum().backward()
    # The plain-torch definition has one.
    out = reference.masked_conv2d(x.double(), weight.double(), None, "B", None, 1)
    assert out.requires_grad


BAD = [
    (dict(x=torch.zeros(1, 2, 4)), ValueError, r"x must be \[B, C_in, H, W\]"),
    (dict(x=torch.zeros(1, 2, 0, 4)), ValueError, "H, W >= 1"),
    (dict(x=torch.zeros(1, 2, 4, 4, dtype=torch.int32)), TypeError, "x must be float32"),
    (dict(weight=torch.zeros(4, 3, 3, 3)), ValueError, "C_in = 2 to match x"),
    (dict(weight=torch.zeros(4, 2, 2, 3)), ValueError, "odd kernel sizes"),
    (dict(weight=torch.zeros(4, 2, 3, 3, dtype=torch.float64)), TypeError, "weight must be torch.float32, as x"),
    (dict(bias=torch.zeros(3)), ValueError, r"bias must be \[4\]"),
    (dict(mask="C"), ValueError, "mask must be one of 'A'"),
    (dict(mask=torch.ones(3, 3)), TypeError, "bool tensor, got torch.float32"),
    (dict(mask=torch.ones(5, 3, dtype=torch.bool)), ValueError, r"mask must be \[3, 3\]"),
    (dict(colours=3), ValueError, "colours must divide the channels"),
    (dict(colours=2, mask="vertical-A"), ValueError, "goes with mask"),
    (dict(backend="abacus"), ValueError, "backend must be one of"),
]


@pytest.mark.parametrize("change,error,message", BAD)
def test_bad_input(change, error, message):
    arguments = dict(x=torch.zeros(1, 2, 4, 4), weight=torch.zeros(4, 2, 3, 3)) | change
    with pytest.raises(error, match=message) as caught:
        masked_conv2d(**arguments)
    assert str(caught.value).startswith("fastvq.ops.masked_conv2d: ")


def test_bad_gated_input():
    x = torch.zeros(1, 2, 4, 4)
    with pytest.raises(ValueError, match=r"weight must be \[2 \* C"):
        gated_masked_conv2d(x, torch.zeros(3, 2, 3, 3))
    with pytest.raises(ValueError, match=r"condition must be \[1, 4\] or \[1, 4, 4, 4\]"):
        gated_masked_conv2d(x, torch.zeros(4, 2, 3, 3), condition=torch.zeros(1, 4, 2, 2))
    with pytest.raises(ValueError, match="cpu: it computes in float32"):
        gated_masked_conv2d(x.double(), torch.zeros(4, 2, 3, 3).double(), backend="cpu")
