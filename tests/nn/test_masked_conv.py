"""fastvq.nn.MaskedConv2d and GatedMaskedConv2d."""

import pytest
import torch

from fastvq import nn
from fastvq.ops import gated_masked_conv2d, masked_conv2d
from tests.support.cases import generator


def test_forward_is_the_op():
    x, condition = torch.randn(2, 6, 5, 4, generator=generator(0)), torch.randn(2, 18, generator=generator(1))
    taps = torch.eye(3, dtype=torch.bool)
    for mask in ("A", "horizontal-B", taps):
        m, gated = nn.MaskedConv2d(6, 9, 3, mask=mask), nn.GatedMaskedConv2d(6, 9, 3, mask=mask)
        assert torch.equal(m(x), masked_conv2d(x, m.weight, m.bias, mask=mask))
        assert torch.equal(gated(x, condition), gated_masked_conv2d(x, gated.weight, gated.bias, condition, mask=mask))
    coloured = nn.MaskedConv2d(6, 9, (3, 5), mask="A", colours=3, bias=False)
    assert torch.equal(coloured(x), masked_conv2d(x, coloured.weight, mask="A", colours=3))
    assert coloured.weight.shape == (9, 6, 3, 5) and coloured.bias is None


def test_training_never_changes_masked_weights():
    m = nn.MaskedConv2d(3, 8, 5, mask="A")
    before = m.weight.detach().clone()
    optimizer = torch.optim.SGD(m.parameters(), lr=0.1)
    m(torch.randn(2, 3, 6, 6, generator=generator(2))).square().sum().backward()
    optimizer.step()
    changed = (m.weight != before).any(0).any(0).flatten()
    assert changed.tolist() == [i < 12 for i in range(25)]


def test_state_is_weight_and_bias():
    m = nn.MaskedConv2d(2, 4, 3, mask=torch.eye(3, dtype=torch.bool))
    assert set(m.state_dict()) == {"weight", "bias"}
    assert "mask='custom'" in repr(m) and "mask='B'" in repr(nn.GatedMaskedConv2d(2, 4, 3))
    assert m.weight.abs().max() <= 1 / (3 * 2) ** 0.5


@pytest.mark.parametrize(
    "arguments,message",
    [
        (dict(kernel_size=4), "kernel_size must be odd"),
        (dict(in_channels=0), "in_channels must be >= 1"),
        (dict(mask="C"), "mask must be one of"),
        (dict(mask=torch.ones(5, 5, dtype=torch.bool)), r"bool tensor \[3, 3\]"),
    ],
)
def test_bad_input(arguments, message):
    with pytest.raises(ValueError, match=message):
        nn.MaskedConv2d(**(dict(in_channels=2, out_channels=4, kernel_size=3) | arguments))


@pytest.mark.parametrize("kernel_size", [(3,), (3, 3, 3), [3], (3.0, 3)])
def test_a_kernel_size_of_other_lengths_is_named(kernel_size):
    with pytest.raises(
        ValueError, match=r"MaskedConv2d: kernel_size must be one integer or two \(height, width\), got"
    ):
        nn.MaskedConv2d(4, 6, kernel_size)
