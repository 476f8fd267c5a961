"""The registered ops of the masked convolution and the sampler check what their kernels rely on."""

import pytest
import torch

from fastvq.models import PixelCNN
from fastvq.ops import gated_masked_conv2d, masked_conv2d, nearest, pack_codebook, pixelcnn_start, pixelcnn_step

OPS = torch.ops.fastvq
X, W, B = torch.randn(2, 4, 6, 5), torch.randn(8, 4, 3, 3), torch.randn(8)
TAPS, GRAD, HALF = torch.ones(3, 3, dtype=torch.bool), torch.randn(2, 8, 6, 5), torch.randn(2, 4, 6, 5)


def refused(op, arguments, place, wrong):
    given = list(arguments)
    given[place] = wrong
    with pytest.raises((ValueError, TypeError), match=r"fastvq.ops.\w+: "):
        getattr(OPS, op)(*given)


@pytest.mark.parametrize(
    "place,wrong",
    [
        (0, X[0]), (0, X[:, :3]), (0, X.half()), (0, X.long()), (1, W[:, :, :2]), (1, W.double()), (2, B[:7]),
        (2, B.half()), (3, "C"), (3, "B"), (4, TAPS[:1]), (4, TAPS.float()), (4, None), (5, 2), (5, 0),
    ],
)  # fmt: skip
def test_masked_conv(place, wrong, engine):
    refused("masked_conv2d", [X, W, B, "custom", TAPS, 1, engine], place, wrong)


@pytest.mark.parametrize(
    "place,wrong", [(0, GRAD[:1]), (0, GRAD.double()), (0, GRAD.half()), (2, W[:4]), (4, TAPS[:1])]
)
def test_masked_conv_backward(place, wrong, engine):
    refused("masked_conv2d_backward", [GRAD, X, W, "custom", TAPS, 1, True, True, True, engine], place, wrong)


@pytest.mark.parametrize("place,wrong", [(1, W[:7]), (3, GRAD[:, :4]), (3, GRAD.half()), (3, B), (5, TAPS[:1])])
def test_gated(place, wrong, engine):
    refused("gated_masked_conv2d", [X, W, B, GRAD, "custom", TAPS, True, engine], place, wrong)


@pytest.mark.parametrize("place,wrong", [(0, HALF[:1]), (1, HALF[:, :3]), (2, HALF.half())])
def test_gate_backward(place, wrong, engine):
    refused("gate_backward", [HALF, HALF, HALF, engine], place, wrong)


def test_a_layout_of_other_bytes():
    x, codebook = torch.randn(6, 40), torch.randn(10, 40)
    layout = pack_codebook(codebook, backend="cpu")._layout

    def lookup(given, codes=codebook):
        return OPS.nearest(x, codes, "euclidean", "exact", False, "cpu", given)

    assert torch.equal(lookup(layout), nearest(x, codebook))
    for wrong in (layout[:1], layout[:-64], layout[1:], layout.float(), torch.zeros_like(layout)):
        with pytest.raises(ValueError, match="layout must be what"):
            lookup(wrong)
    with pytest.raises(ValueError, match="packed codebook is of another codebook"):
        lookup(layout, torch.randn(11, 40))
    changed = layout.clone()
    changed[64:128] = 255
    with pytest.raises(ValueError, match="was changed since pack_codebook made it"):
        lookup(changed)


def state():
    torch.manual_seed(0)
    return PixelCNN(7, 8, 3), torch.zeros(2, 4, 5, dtype=torch.int64)


@pytest.mark.parametrize(
    "change",
    [
        {0: torch.zeros(2, 4, 6, dtype=torch.int64)}, {0: torch.zeros(2, 4, 5)}, {1: []}, {2: torch.zeros(3)},
        {3: torch.randn(3, 2, 3, 5, 32)}, {3: torch.randn(3, 2, 0, 5, 32)}, {4: [5, 3]}, {4: [5, 3, 2]}, {5: 4},
        {6: -1}, {7: "metal"},
    ],
)  # fmt: skip
def test_pixelcnn_step(change):
    model, ids = state()
    s = model.sampler_state((2, 4, 5), None, None)
    given = [ids, s.weights, s.cache, s.condition, list(s.kernel_sizes), 0, 0, s.backend]
    assert OPS.pixelcnn_step(*given).shape == (2, 7)
    for place, wrong in change.items():
        given[place] = wrong
    with pytest.raises((ValueError, TypeError), match=r"fastvq.ops.pixelcnn_\w+: "):
        OPS.pixelcnn_step(*given)


def test_devices_of_arguments():
    model, ids = state()
    with pytest.raises(ValueError, match="x and mask must be on one device, got cpu and meta"):
        masked_conv2d(X, W, mask=TAPS.to("meta"))
    with pytest.raises(ValueError, match="x and mask must be on one device, got cpu and meta"):
        gated_masked_conv2d(X, W, mask=TAPS.to("meta"))
    s = model.sampler_state((2, 4, 5), None, None)
    with pytest.raises(ValueError, match="weights and ids must be on one device, got cpu and meta"):
        pixelcnn_step(s, ids.to("meta"), 0, 0)
    given = [torch.randn(7, 8), *(torch.randn(1) for _ in range(3))]
    with pytest.raises(ValueError, match=r"weights must be \d+ tensors"):
        pixelcnn_start(given, [3], (2, 4, 5))
