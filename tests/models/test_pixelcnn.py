"""fastvq.models.PixelCNN: what a position depends on, conditions, loss."""

import math

import pytest
import torch
import torch.nn.functional as F

from fastvq.models import PixelCNN
from tests.support.cases import generator
from tests.support.tolerance import assert_within


@pytest.fixture(autouse=True)
def _one_thread(threads):
    threads(1)  # tensors this small gain nothing from torch's threads


def make(n_codes=11, channels=6, n_layers=3, seed=0, dtype=torch.float64, **options):
    torch.manual_seed(seed)
    return PixelCNN(n_codes, channels, n_layers, **options).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_depends_on_exactly_what_came_before(dtype):
    """By perturbation, both ways: a changed id reaches every later position in its field, no other."""
    model = make(n_layers=2, kernel_size=3, first_kernel_size=3, dtype=dtype)
    assert model.reach == 2
    h, w = 7, 8
    ids = torch.randint(0, 11, (1, h, w), generator=generator(1))
    with torch.no_grad():
        base = model(ids)
        for y in range(h):
            for x in range(w):
                other = ids.clone()
                other[0, y, x] = (other[0, y, x] + 1) % 11
                changed = (model(other) != base).any(1)[0]
                for i in range(h):
                    for j in range(w):
                        before = y < i or (y == i and x < j)
                        # Rows above reach it through the vertical stack, up to `reach` columns to either side.
                        near = i - y <= model.reach and abs(x - j) <= model.reach
                        assert bool(changed[i, j]) == (before and near), ((y, x), (i, j))


def test_gradient_sees_the_same_positions():
    model = make(n_layers=2)
    embedded = model.embedding(torch.randint(0, 11, (1, 6, 6), generator=generator(2))).detach().requires_grad_()
    model.embedding.forward = lambda ids: embedded
    logits = model(torch.zeros(1, 6, 6, dtype=torch.int64))
    (g,) = torch.autograd.grad(logits[0, :, 3, 2].sum(), embedded)
    touched = g.abs().sum(-1)[0] != 0
    assert touched.flatten()[: 3 * 6 + 2].all() and not touched.flatten()[3 * 6 + 2 :].any()


def test_layers_agree_with_a_literal_network():
    """The same numbers from torch's own convolutions with masked weights."""
    model = make(n_classes=4, condition_channels=3)
    ids = torch.randint(0, 11, (2, 6, 4), generator=generator(3))
    labels, condition = torch.tensor([1, 3]), torch.randn(2, 3, 3, 2, generator=generator(4), dtype=torch.float64)

    def masked(module, x, rows, columns):
        weight = torch.zeros_like(module.weight)
        weight[:, :, :rows, :columns] = module.weight[:, :, :rows, :columns]
        return F.conv2d(x, weight, module.bias, padding=(weight.shape[2] // 2, weight.shape[3] // 2))

    def gate(y):
        a, b = y.chunk(2, 1)
        return a.tanh() * b.sigmoid()

    added = model.map_condition(condition).repeat_interleave(2, 2).repeat_interleave(2, 3)
    added = (added + model.label_condition(labels)[:, :, None, None]).chunk(3, 1)
    v = h = model.embedding(ids).permute(0, 3, 1, 2)
    skip = 0
    for i, layer in enumerate(model.layers):
        k, see = model.kernel_sizes[i], 0 if i == 0 else 1
        of_v, of_h = added[i].chunk(2, 1)
        new_v = gate(masked(layer.vertical, v, k // 2 + see, k) + of_v)
        v = new_v if i == 0 else v + new_v
        out = layer.out(gate(masked(layer.horizontal, h, 1, k // 2 + see) + layer.link(v) + of_h))
        skip = skip + out[:, -6:]
        h = out[:, :6] if i == 0 else h + out[:, :6]
    expected = model.head[1](model.head[0](skip.relu()).relu())
    # float64 against float64: a few thousand roundings of numbers of order one.
    assert_within(model(ids, labels, condition), expected, 1e-12)


def test_loss_in_nats_and_bits():
    model = make()
    ids = torch.randint(0, 11, (3, 5, 4), generator=generator(5))
    loss = model.loss(ids)
    p = torch.log_softmax(model(ids).float(), 1).gather(1, ids[:, None])
    assert_within(loss.nats.detach(), -p.mean().detach(), 1e-5)
    assert_within(loss.bits, loss.nats.detach() / math.log(2), 1e-6)
    assert loss.nats.requires_grad and not loss.bits.requires_grad


def test_every_parameter_learns():
    model = make(n_classes=3, condition_channels=2, dtype=torch.float32)
    ids = torch.randint(0, 11, (2, 6, 6), generator=generator(6))
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = model.loss(ids, torch.tensor([0, 2]), torch.randn(2, 2, 3, 3, generator=generator(7)))
        loss.nats.backward()
        optimizer.step()
        losses.append(loss.nats.item())
    assert all(p.grad is not None for p in model.parameters())
    assert losses[-1] < 0.8 * losses[0]


def test_autocast_trains():
    model = make(dtype=torch.float32)
    ids = torch.randint(0, 11, (2, 6, 6), generator=generator(8))
    with torch.autocast("cpu", torch.bfloat16):
        loss = model.loss(ids)
    loss.nats.backward()
    assert loss.nats.dtype == torch.float32 and loss.nats.isfinite()
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())
    # bfloat16 keeps 8 bits: the mean loss of log 11 = 2.4 stays within a few of its units.
    assert_within(loss.nats.detach(), model.loss(ids).nats.detach(), 0.05)


def test_bad_input():
    with pytest.raises(ValueError, match="n_codes must be >= 1"):
        PixelCNN(0, 4, 2)
    with pytest.raises(ValueError, match="kernel_size must be odd"):
        PixelCNN(5, 4, 2, kernel_size=2)
    ids = torch.zeros(2, 4, 4, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"ids must be int64 \[B, h, w\]"):
        make()(ids.float())
    with pytest.raises(ValueError, match="labels must be given"):
        make(n_classes=3)(ids)
    with pytest.raises(ValueError, match="condition must be None"):
        make()(ids, condition=torch.zeros(2, 1, 4, 4))
    with pytest.raises(ValueError, match=r"labels must be int64 \[2\]"):
        make(n_classes=3)(ids, torch.zeros(3, dtype=torch.int64))
    for labels, error, message in (
        (1, TypeError, r"labels must be int64 \[2\], one a picture, got int; for one class, torch.full"),
        (torch.tensor([0, 3]), ValueError, r"labels must be in \[0, 3\), got 3 at row \(1,\)"),
        (torch.tensor([-1, 0]), ValueError, r"labels must be in \[0, 3\), got -1 at row \(0,\)"),
    ):
        with pytest.raises(error, match=message):
            make(n_classes=3)(ids, labels)
        with pytest.raises(error, match=message):
            make(n_classes=3).sample((2, 4, 4), labels)
    for wrong in (-1, 99):
        with pytest.raises(ValueError, match=rf"PixelCNN: ids must be in \[0, \d+\), got {wrong} at row"):
            make()(torch.full_like(ids, wrong))
    with pytest.raises(TypeError, match=r"PixelCNN: ids must be int64 \[B, h, w\], got list"):
        make()([[[0]]])
    with pytest.raises(TypeError, match=r"sample: known must be torch.int64 \[1, 1, 1\], got list"):
        make().sample((1, 1, 1), known=[[[0]]])
    with pytest.raises(ValueError, match="h dividing 4"):
        make(condition_channels=3)(ids, condition=torch.zeros(2, 3, 3, 3, dtype=torch.float64))
