"""The Triton kernels of the masked convolution: on a GPU, or without one in Triton's interpreter, on small sizes."""

import pytest
import torch

pytest.importorskip("triton", reason="needs the package triton")
from fastvq.backends import registry
from fastvq.backends import triton as triton_backend
from fastvq.ops import gated_masked_conv2d, masked_conv2d
from fastvq.ops.masked_conv import MASKS
from tests.ops import test_masked_conv as plain
from tests.ops.test_masked_conv import case, leaves, literal_mask
from tests.support.cases import generator
from tests.support.tolerance import assert_within, gamma, roundoff, tensor_core_gamma

DEVICE = "cpu" if triton_backend.interpreting() else "cuda"
pytestmark = [] if triton_backend.interpreting() else [pytest.mark.needs_gpu]
LAST, FIRST = torch.channels_last, torch.contiguous_format


@pytest.fixture(autouse=True)
def _one_thread(threads):
    threads(1)  # the interpreter's tensors are tiny


def on_device(op, **options):
    """op by the Triton kernels, with arguments and result on the CPU."""

    def run(*tensors):
        return op(*(t.to(DEVICE) for t in tensors), backend="triton", **options).cpu()

    return run


# B, C_in, C_out, H, W, kernel: prime, one, wider than a tile of channels or of pixels, maps below the kernel.
SHAPES = [
    ((2, 3, 5, 7, 9, (3, 3)), LAST),
    ((1, 1, 1, 1, 1, (3, 3)), FIRST),
    ((1, 17, 49, 5, 1, (5, 5)), LAST),
    ((2, 31, 67, 3, 2, (7, 7)), FIRST),
    ((2, 5, 34, 1, 139, (1, 5)), LAST),
    ((2, 16, 48, 17, 8, (7, 1)), FIRST),
]


@pytest.mark.parametrize("shape,layout", SHAPES)
def test_values_and_gradients(shape, layout):
    x, weight, bias, grad = case(shape, layout=layout)
    grad = grad.contiguous(memory_format=layout)
    out = plain.check(
        x, weight, bias, grad, literal_mask("B", weight), on_device(masked_conv2d), gamma=tensor_core_gamma
    )
    last = x.is_contiguous(memory_format=LAST) and not x.is_contiguous()
    assert out.is_contiguous(memory_format=LAST if last else FIRST)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_dtypes(dtype):
    shape = (1, 65, 130, 9, 17, (3, 3)) if dtype == torch.float16 else (2, 19, 35, 6, 9, (3, 3))
    x, weight, bias, grad = case(shape, 4, dtype, LAST)
    plain.check(x, weight, bias, grad, literal_mask("B", weight), on_device(masked_conv2d), gamma=tensor_core_gamma)


@pytest.mark.parametrize("mask", MASKS)
def test_masks(mask):
    x, weight, bias, grad = case((2, 7, 19, 6, 5, (5, 3)), 1)
    run = on_device(masked_conv2d, mask=mask)
    plain.check(x, weight, bias, grad, literal_mask(mask, weight), run, gamma=tensor_core_gamma)


def test_any_bool_mask():
    g = generator(2)
    x, weight, bias, grad = case((2, 6, 11, 5, 7, (3, 5)), 2)
    none = torch.zeros(3, 5, dtype=torch.bool)
    for taps in (torch.rand(3, 5, generator=g) < 0.4, none):
        run = on_device(masked_conv2d, mask=taps.to(DEVICE))
        plain.check(x, weight, bias, grad, taps.expand(weight.shape), run, gamma=tensor_core_gamma)


@pytest.mark.parametrize("mask", ["A", "B", "horizontal-A", "horizontal-B"])
def test_colours(mask):
    x, weight, bias, grad = case((2, 9, 21, 5, 4, (3, 3)), 3)
    run = on_device(masked_conv2d, mask=mask, colours=3)
    plain.check(x, weight, bias, grad, literal_mask(mask, weight, 3), run, gamma=tensor_core_gamma)


def test_colours_of_one_tap_leave_the_weight_alone():
    x, weight, bias, grad = case((2, 3, 3, 4, 3, (1, 1)), 3)
    used, before = literal_mask("A", weight, 3), weight.clone()
    plain.check(x, weight, bias, grad, used, on_device(masked_conv2d, mask="A", colours=3), gamma=tensor_core_gamma)
    assert torch.equal(weight, before)


def test_no_tap_and_no_image():
    x, weight, bias, grad = case((2, 3, 5, 4, 3, (1, 1)), 5)
    run = on_device(masked_conv2d, mask="A")
    plain.check(x, weight, bias, grad, literal_mask("A", weight), run, gamma=tensor_core_gamma)
    x, weight, bias = leaves(*case((0, 3, 6, 4, 5, (3, 3)))[:3])
    for op in (masked_conv2d, gated_masked_conv2d):
        out = on_device(op)(x, weight, bias)
        out.sum().backward()
        assert out.shape[0] == 0 and x.grad.shape == x.shape and not weight.grad.any() and not bias.grad.any()


def test_any_strides_and_two_runs_give_the_same_bits():
    g = generator(6)
    big = torch.randn(2, 14, 5, 12, generator=g).to(DEVICE)
    weight, bias = torch.randn(4, 7, 3, 3, generator=g).to(DEVICE), torch.randn(4, generator=g).to(DEVICE)
    for x in (big[:, ::2, 1::2, ::3], big.permute(0, 1, 3, 2)[:2, 7:], big[:1, :1, :2].expand(2, 7, 2, 12)):
        grad = torch.randn(x.shape[0], 4, *x.shape[2:], generator=g).to(DEVICE)
        results = []
        for image, w, incoming in ((x, weight.mT.contiguous().mT, grad.mT.contiguous().mT), (x.clone(), weight, grad)):
            ours = leaves(image, w, bias)
            out = masked_conv2d(*ours, backend="triton")
            out.backward(incoming)
            results.append([out.detach(), *(t.grad for t in ours)])
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_slices_and_the_batch(monkeypatch):
    """The weight's gradient in many slices of the pixels, numbered in 64 bits; an image alone gives the same bits."""
    from fastvq.ops.masked_conv import triton_ops

    monkeypatch.setattr(triton_ops, "SHORTEST_SLICE", 50)
    monkeypatch.setattr(triton_ops, "WIDE_FROM", 1)
    x, weight, bias, grad = case((5, 20, 33, 7, 9, (3, 3)), 7)
    out = plain.check(x, weight, bias, grad, literal_mask("B", weight), on_device(masked_conv2d), tensor_core_gamma)
    assert torch.equal(on_device(masked_conv2d)(x[3:4], weight, bias), out[3:4])


@pytest.mark.parametrize("condition,layout", [("none", LAST), ("vector", FIRST), ("map", LAST), ("map", FIRST)])
def test_gated(condition, layout):
    plain.check_gated(layout, condition, on_device(gated_masked_conv2d), gamma=tensor_core_gamma)


def test_gate_is_accurate_everywhere():
    plain.check_gate("triton", DEVICE, 8 * 2.0**-24)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_gated_dtypes(dtype):
    """As the gate of the convolution of the same dtype, and the same kept factors' gradient."""
    x, weight, bias, _ = case((2, 6, 10, 4, 5, (3, 3)), 9, dtype)
    condition = torch.randn(2, 10, generator=generator(10)).to(dtype)
    out, t, s = (
        r.cpu()
        for r in torch.ops.fastvq.gated_masked_conv2d(
            *(v.to(DEVICE) for v in (x, weight, bias, condition)), "B", None, True, "triton"
        )
    )
    used = literal_mask("B", weight)
    wide = [torch.where(used, weight, 0).double(), bias.double()]
    y = plain.conv(x.double(), *wide) + condition.double()[:, :, None, None]
    size = plain.conv(x.double().abs(), *(w.abs() for w in wide)) + condition.double().abs()[:, :, None, None]
    a, b = y.chunk(2, 1)
    of_a, of_b = (tensor_core_gamma(5 * 6 + 2, dtype) * size).chunk(2, 1)
    own = 8 * (2.0**-24 if dtype == torch.bfloat16 else 2.0**-53) + roundoff(dtype)
    assert_within(t, a.tanh(), of_a + own * a.tanh().abs())
    assert_within(s, b.sigmoid(), of_b / 4 + own * b.sigmoid())
    assert_within(out, a.tanh() * b.sigmoid(), of_a + of_b / 4 + 2 * own * (a.tanh() * b.sigmoid()).abs())
    grad = torch.randn(out.shape, generator=generator(11)).to(dtype)
    both = torch.ops.fastvq.gate_backward(*(v.to(DEVICE) for v in (grad, t, s)), "triton").cpu()
    g, t, s = grad.double(), t.double(), s.double()
    expected = torch.cat([g * s * (1 - t * t), g * t * (s * (1 - s))], 1)
    # Five roundings of factors that are at most one, then the one to dtype.
    work = torch.float64 if dtype == torch.float64 else torch.float32
    assert_within(both, expected, gamma(5, work) * g.abs().repeat(1, 2, 1, 1) + roundoff(dtype) * expected.abs())


def test_registration():
    x, weight, bias, _ = (t.to(DEVICE) for t in case((2, 3, 6, 5, 4, (3, 3)), 17))
    condition = torch.randn(2, 6, generator=generator(18)).to(DEVICE)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    given = leaves(x, weight, bias, condition)
    plain_op, gate_op = torch.ops.fastvq.masked_conv2d.default, torch.ops.fastvq.gated_masked_conv2d.default
    torch.library.opcheck(plain_op, (*given[:3], "A", None, 3, "triton"), test_utils=checks)
    torch.library.opcheck(gate_op, (*given, "B", None, True, "triton"), test_utils=checks)


def test_it_says_why_it_cannot_serve(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setattr(registry, "_serves", set())
    with pytest.raises(ValueError, match=r"triton: (torch sees no GPU|it takes CUDA tensors, x is on cpu)"):
        masked_conv2d(torch.zeros(1, 1, 2, 2), torch.zeros(1, 1, 3, 3), backend="triton")
