"""The CUDA kernels of the masked convolution, compiled for the processor: against torch's convolution in float64, in
this process and under sanitizers."""

import numpy as np
import pytest
import torch

from fastvq.backends import views
from fastvq.ops import gated_masked_conv2d, masked_conv2d
from fastvq.ops.masked_conv import MASKS, cuda
from fastvq.ops.masked_conv.common import like_input
from tests.cuda_on_host import host
from tests.ops import test_masked_conv as plain
from tests.ops.test_masked_conv import case, leaves, literal_mask
from tests.support.cases import generator
from tests.support.tolerance import assert_within, gamma, roundoff, tensor_core_gamma

FIRST, LAST = torch.contiguous_format, torch.channels_last
# B, C_in, C_out, H, W, kernel: prime, one, wider than a tile of channels or of pixels, maps below the kernel; channels
# that come in whole chunks of sixteen bytes and ones that do not.
SHAPES = [
    ((2, 3, 5, 7, 9, (3, 3)), LAST),
    ((1, 1, 1, 1, 1, (3, 3)), FIRST),
    ((1, 17, 49, 5, 1, (5, 5)), LAST),
    ((2, 31, 67, 3, 2, (5, 5)), FIRST),
    ((1, 5, 34, 1, 139, (1, 5)), FIRST),
    ((1, 40, 130, 9, 15, (3, 3)), LAST),
    ((2, 16, 24, 9, 8, (7, 1)), FIRST),
]
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def gamma_of(dtype):
    """Sums of float32 are chains of fused multiply-adds; of narrower types they are the tensor core's."""
    return gamma if dtype == torch.float32 else tensor_core_gamma


def check(x, weight, bias, grad, used, **options):
    return plain.check(
        x, weight, bias, grad, used, lambda *t: masked_conv2d(*t, backend="cuda", **options), gamma_of(x.dtype)
    )


@pytest.mark.parametrize("shape,layout", SHAPES)
def test_values_and_gradients(shape, layout, cuda_on_host):
    for dtype in DTYPES:
        x, weight, bias, grad = case(shape, dtype=dtype, layout=layout)
        check(x, weight, bias, grad.contiguous(memory_format=layout), literal_mask("B", weight))


@pytest.mark.parametrize("mask", MASKS)
def test_masks(mask, cuda_on_host):
    x, weight, bias, grad = case((2, 7, 19, 6, 5, (5, 3)), 1)
    check(x, weight, bias, grad, literal_mask(mask, weight), mask=mask)


def test_any_bool_mask_and_none(cuda_on_host):
    x, weight, bias, grad = case((2, 6, 11, 5, 7, (3, 5)), 2)
    for taps in (torch.rand(3, 5, generator=generator(2)) < 0.4, torch.zeros(3, 5, dtype=torch.bool)):
        check(x, weight, bias, grad, taps.expand(weight.shape), mask=taps)
    x, weight, bias, grad = case((2, 3, 5, 4, 3, (1, 1)), 5)
    check(x, weight, bias, grad, literal_mask("A", weight), mask="A")


@pytest.mark.parametrize("mask", ["A", "B", "horizontal-A", "horizontal-B"])
def test_colours(mask, cuda_on_host):
    x, weight, bias, grad = case((2, 9, 21, 5, 4, (3, 3)), 3)
    check(x, weight, bias, grad, literal_mask(mask, weight, 3), mask=mask, colours=3)


def test_no_image(cuda_on_host):
    x, weight, bias = leaves(*case((0, 3, 6, 4, 5, (3, 3)))[:3])
    for op in (masked_conv2d, gated_masked_conv2d):
        out = op(x, weight, bias, backend="cuda")
        out.sum().backward()
        assert out.shape[0] == 0 and x.grad.shape == x.shape and not weight.grad.any() and not bias.grad.any()


def test_any_strides_give_the_same_bits(cuda_on_host):
    g = generator(6)
    big = torch.randn(2, 14, 5, 12, generator=g)
    weight, bias = torch.randn(4, 7, 3, 3, generator=g), torch.randn(4, generator=g)
    for x in (big[:, ::2, 1::2, ::3], big.permute(0, 1, 3, 2)[:2, 7:], big[:1, :1, :2].expand(2, 7, 2, 12)):
        grad = torch.randn(x.shape[0], 4, *x.shape[2:], generator=g)
        results = []
        for image, w, incoming in ((x, weight.mT.contiguous().mT, grad.mT.contiguous().mT), (x.clone(), weight, grad)):
            ours = leaves(image, w, bias)
            out = masked_conv2d(*ours, backend="cuda")
            out.backward(incoming)
            results.append([out.detach(), *(t.grad for t in ours)])
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_the_weight_gradient_in_spans(cuda_on_host):
    x, weight, bias, grad = case((2, 3, 4, 61, 67, (3, 1)), 8)
    check(x, weight, bias, grad, literal_mask("B", weight))


@pytest.mark.parametrize("condition,layout", [("none", LAST), ("vector", FIRST), ("map", LAST), ("map", FIRST)])
def test_gated(condition, layout, cuda_on_host):
    plain.check_gated(layout, condition, lambda *t: gated_masked_conv2d(*t, backend="cuda"))


def test_gate_is_accurate_everywhere(cuda_on_host):
    plain.check_gate("cuda", "cpu", 6 * 2.0**-24)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gated_in_narrow_types(dtype, cuda_on_host):
    x, weight, bias, _ = case((2, 6, 74, 4, 5, (3, 3)), 9, dtype)  # channels of two tiles, the second part full
    condition = torch.randn(2, 74, generator=generator(10)).to(dtype)
    out, t, s = torch.ops.fastvq.gated_masked_conv2d(x, weight, bias, condition, "B", None, True, "cuda")
    check_gated(x, weight, bias, condition, out, t, s)


def least_rounding(dtype):
    """Below the smallest normal number a rounding is of absolute size."""
    return torch.finfo(dtype).smallest_normal * roundoff(dtype)


def check_gated(x, weight, bias, condition, out, t, s):
    """Pre-activations as sums of x's type; each factor has six roundings of its own, then the one to its type."""
    wide = [torch.where(literal_mask("B", weight), weight, 0).double(), bias.double()]
    y = plain.conv(x.double(), *wide) + condition.double()[:, :, None, None]
    size = plain.conv(x.double().abs(), *(w.abs() for w in wide)) + condition.double().abs()[:, :, None, None]
    n_taps = int(literal_mask("B", weight)[0, 0].sum())
    a, b = y.chunk(2, 1)
    of_a, of_b = (gamma_of(x.dtype)(n_taps * x.shape[1] + 3, torch.float32) * size).chunk(2, 1)
    own = 6 * 2.0**-24 + roundoff(x.dtype)
    least = least_rounding(x.dtype)
    assert_within(t, a.tanh(), of_a + own * a.tanh().abs() + least)
    assert_within(s, b.sigmoid(), of_b / 4 + own * b.sigmoid() + least)
    assert_within(out, a.tanh() * b.sigmoid(), of_a + of_b / 4 + 2 * own * (a.tanh() * b.sigmoid()).abs() + least)


def test_float64_is_refused_with_the_reason(cuda_on_host):
    with pytest.raises(ValueError, match="cuda: it adds in float32, for float32, float16 and bfloat16 tensors"):
        masked_conv2d(torch.zeros(1, 1, 2, 2).double(), torch.zeros(1, 1, 3, 3).double(), backend="cuda")


def image_arguments(t, buffer):
    if t is None:
        return [host.NOTHING] + [0] * 9
    return [buffer, views.DTYPES[t.dtype], *t.shape, *t.stride()]


def whole(t):
    """The bytes of a dense tensor, in the order they lie in memory."""
    return np.array(t.permute(0, 2, 3, 1).contiguous().view(torch.uint8).numpy()) if is_last(t) else host.as_bytes(t)


def is_last(t):
    return t.dim() == 4 and t.is_contiguous(memory_format=LAST) and not t.is_contiguous()


def back(data, like):
    flat = torch.frombuffer(bytearray(data), dtype=like.dtype)
    if is_last(like):
        b, c, h, w = like.shape
        return flat.view(b, h, w, c).permute(0, 3, 1, 2)
    return flat.view(like.shape)


@pytest.mark.parametrize("kind", host.SANITIZERS)
def test_under_sanitizers(kind, tmp_path):
    calls, checks = host.Calls(), []
    cases = [(shape, layout, DTYPES[i % 3]) for i, (shape, layout) in enumerate(SHAPES)]
    cases += [((1, 16, 20, 5, 4, (3, 3)), LAST, torch.bfloat16)]
    if kind == "thread":  # which takes a minute a shape; these have several tiles, steps, taps and kinds of chunk
        cases = [cases[0], *cases[5:]]
    for i, (shape, layout, dtype) in enumerate(cases):
        x, weight, bias, grad = case(shape, i, dtype, layout)
        used = literal_mask("B", weight)
        weight = torch.where(used, weight, torch.nan)
        grad = grad.contiguous(memory_format=layout)
        view = cuda._weight_view(weight, "B", None, 1)
        weight_arguments = [host.Buffer(1), *view[1:2], *view[2], *view[3:5], host.NOTHING, *view[6:]]
        module = host.module()

        def workspace(n_bytes):
            return np.full(n_bytes, 0xFF, np.uint8)

        def empty(t):
            return torch.full_like(t, torch.nan)

        out = like_input(x, weight.shape[0])
        calls.add(
            "masked_conv_forward",
            [whole(x), host.as_bytes(weight), host.as_bytes(bias), whole(empty(out)),
             workspace(module.masked_conv_workspace(view, False, False))],
            [*image_arguments(x, host.Buffer(0)), *weight_arguments, host.Buffer(2),
             *image_arguments(out, host.Buffer(3)), host.Buffer(4)],
        )  # fmt: skip
        calls.add(
            "masked_conv_backward",
            [whole(x), host.as_bytes(weight), whole(grad), whole(empty(x)), host.as_bytes(empty(weight)),
             host.as_bytes(empty(bias)), workspace(module.masked_conv_workspace(view, False, True)),
             workspace(module.masked_conv_weight_grad_workspace(views.image_view(x), view))],
            [*image_arguments(x, host.Buffer(0)), *image_arguments(grad, host.Buffer(2)), *weight_arguments,
             *image_arguments(x, host.Buffer(3)), *map(host.Buffer, (4, 5, 6, 7))],
        )  # fmt: skip
        checks.append((x, weight, bias, grad, used, out))
    results = calls.run(kind, tmp_path)
    for i, (x, weight, bias, grad, used, out) in enumerate(checks):
        forward, backward = results[2 * i], results[2 * i + 1]
        made = back(forward[3], out), back(backward[3], x), back(backward[4], weight), back(backward[5], bias)
        plain.check(x, weight, bias, grad, used, lambda *t, m=made: Made.apply(*t, *m), gamma_of(x.dtype))


class Made(torch.autograd.Function):
    """A convolution whose output and gradients are at hand."""

    @staticmethod
    def forward(ctx, x, weight, bias, out, *grads):
        ctx.grads = grads
        return out.clone(memory_format=torch.preserve_format)

    @staticmethod
    def backward(ctx, _):
        return *ctx.grads, None, None, None, None


@pytest.mark.parametrize("kind", host.SANITIZERS)
def test_gated_under_sanitizers(kind, tmp_path):
    calls, checks = host.Calls(), []
    for i, dtype in enumerate(DTYPES):
        x, weight, bias, _ = case((2, 6, 74, 4, 5, (3, 3)), i, dtype, LAST if i % 2 else FIRST)
        condition = torch.randn(2, 74, generator=generator(10)).to(dtype)
        wide = condition[:, :, None, None].expand(-1, -1, *x.shape[2:])
        out = like_input(x, 37)
        empty = torch.full_like(out, torch.nan)
        view = cuda._weight_view(weight, "B", None, 1)
        workspace = np.full(host.module().masked_conv_workspace(view, True, False), 0xFF, np.uint8)
        calls.add(
            "gated_masked_conv_forward",
            [whole(x), host.as_bytes(weight), host.as_bytes(bias), host.as_bytes(condition), *[whole(empty)] * 3,
             workspace],
            [*image_arguments(x, host.Buffer(0)), host.Buffer(1), *view[1:2], *view[2], *view[3:5], host.NOTHING,
             *view[6:], host.Buffer(2), *image_arguments(wide, host.Buffer(3)), *image_arguments(out, host.Buffer(4)),
             *image_arguments(out, host.Buffer(5)), *image_arguments(out, host.Buffer(6)), host.Buffer(7)],
        )  # fmt: skip
        grad, t, s = (torch.rand(out.shape, generator=generator(11 + j)).to(dtype) for j in range(3))
        both = torch.full((2, 74, 4, 5), torch.nan, dtype=dtype)
        calls.add(
            "gate_backward",
            [*map(host.as_bytes, (grad, t, s, both))],
            [v for j, image in enumerate((grad, t, s, both)) for v in image_arguments(image, host.Buffer(j))],
        )
        checks.append((x, weight, bias, condition, out, (grad, t, s, both)))
    results = calls.run(kind, tmp_path)
    for i, (x, weight, bias, condition, out, (grad, t, s, both)) in enumerate(checks):
        made = results[2 * i]
        check_gated(x, weight, bias, condition, back(made[6], out), back(made[4], out), back(made[5], out))
        check_gate_gradient(grad, t, s, back(results[2 * i + 1][3], both))


def check_gate_gradient(grad, t, s, both):
    g, t, s = grad.double(), t.double(), s.double()
    expected = torch.cat([g * s * (1 - t * t), g * t * (s * (1 - s))], 1)
    # Five roundings of factors that are at most one, then the one to the result's type.
    bound = gamma(5, torch.float32) * g.abs().repeat(1, 2, 1, 1) + roundoff(both.dtype) * expected.abs()
    assert_within(both, expected, bound + least_rounding(both.dtype))
