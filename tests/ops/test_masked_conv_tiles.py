"""Masked convolutions of bfloat16 on matrix tiles, real or emulated, against torch's convolution in float64.

A result's sum goes through at most as many roundings as it has terms: within an instruction a product passes at most
the additions of its chain, one to join the chains and one to the sum, and products with padding are exact zeros.
"""

import pytest
import torch

from fastvq.ops import gated_masked_conv2d, masked_conv2d
from fastvq.ops.masked_conv import MASKS
from tests.conftest import CPU_ENGINES
from tests.ops.test_masked_conv import LAYOUTS, SHAPES, case, check, check_gated, leaves, literal_mask
from tests.support.cases import generator

TILES = [name for name in CPU_ENGINES if name in ("cpu-emulated", "cpu-amx")]
pytestmark = [
    pytest.mark.every_isa,
    pytest.mark.skipif(not TILES, reason="no matrix tiles here, and none were built in to stand for them"),
]
BF16 = torch.bfloat16


@pytest.fixture(params=TILES)
def tiles(request, use_engine):
    return use_engine(request.param)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [*SHAPES, (2, 65, 33, 4, 40, (3, 3)), (1, 32, 16, 3, 16, (3, 3))])
def test_values_and_gradients(shape, layout, tiles):
    x, weight, bias, grad = case(shape, 0, BF16, layout)
    grad = grad.contiguous(memory_format=layout)
    check(x, weight, bias, grad, literal_mask("B", weight), lambda *t: masked_conv2d(*t, backend=tiles))


@pytest.mark.parametrize("mask", [*MASKS, "custom"])
def test_masks(mask, tiles):
    x, weight, bias, grad = case((2, 7, 19, 6, 5, (5, 3)), 1, BF16)
    taps = torch.rand(5, 3, generator=generator(2)) < 0.4 if mask == "custom" else mask
    used = taps.expand(weight.shape) if mask == "custom" else literal_mask(mask, weight)
    check(x, weight, bias, grad, used, lambda *t: masked_conv2d(*t, mask=taps, backend=tiles))


@pytest.mark.parametrize("mask", ["A", "B"])
def test_colours(mask, tiles):
    x, weight, bias, grad = case((2, 9, 21, 5, 4, (3, 3)), 3, BF16)
    used = literal_mask(mask, weight, 3)
    check(x, weight, bias, grad, used, lambda *t: masked_conv2d(*t, mask=mask, colours=3, backend=tiles))


@pytest.mark.parametrize("condition", ["none", "vector", "map"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gated(layout, condition, tiles):
    check_gated(layout, condition, lambda *t: gated_masked_conv2d(*t, backend=tiles), dtype=BF16)


def test_threads_batch_and_strides_do_not_change_a_bit(tiles, threads):
    x, weight, bias, grad = case((17, 20, 50, 13, 17, (3, 3)), 7, BF16)  # several groups of images, work for 7 threads
    results = []
    for n in (1, 2, 7):
        threads(n)
        ours = leaves(x, weight, bias)
        out = masked_conv2d(*ours, backend=tiles)
        out.backward(grad)
        results.append([out.detach(), *(t.grad for t in ours)])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
    assert torch.equal(masked_conv2d(x[3:4], weight, bias, backend=tiles), results[0][0][3:4])
    turned = leaves(x.permute(0, 1, 3, 2).contiguous().permute(0, 1, 3, 2), weight, bias)
    out = masked_conv2d(*turned, backend=tiles)
    out.backward(grad.flip(0).contiguous().flip(0))
    assert all(torch.equal(a, b) for a, b in zip(results[0], (out.detach(), *(t.grad for t in turned)), strict=True))


def test_autocast_takes_the_tiles(tiles, use_engine):
    """Their order of additions is not that of float32 vectors: that it differs somewhere tells that they ran."""
    x, weight, bias, _ = case((2, 64, 64, 9, 9, (3, 3)), 8)
    with torch.autocast("cpu", BF16):
        out = masked_conv2d(x, weight, bias, backend=tiles)
        narrow = x.bfloat16(), weight.bfloat16(), bias.bfloat16()
        assert out.dtype == BF16 and torch.equal(out, masked_conv2d(*narrow, backend=tiles))
        assert not torch.equal(out, masked_conv2d(x, weight, bias, backend=use_engine("cpu-generic")))


def test_numbers_that_are_not_finite(tiles, use_engine):
    """They reach what they take part in, as on float32 vectors; masked weights take part in nothing."""
    x, weight, bias, _ = case((1, 5, 6, 4, 20, (3, 3)), 9, BF16)
    x[0, 2, 1, 7] = torch.inf
    weight[3, 1, 0, 0] = torch.nan
    weight[:, :, 2] = torch.nan
    out = masked_conv2d(x, weight, bias, backend=tiles)
    vectors = masked_conv2d(x, weight, bias, backend=use_engine("cpu-generic"))
    assert torch.equal(out.isfinite(), vectors.isfinite()) and not out.isfinite().all() and out.isfinite().any()
