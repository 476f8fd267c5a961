"""Tensors without memory of their own: the meta device, tracing, subclasses that wrap others. A right result, or an
error that says so; no kernel ever gets a null address."""

import pytest
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.tensor import DeviceMesh, Replicate, Shard, distribute_tensor
from torch.testing._internal.two_tensor import TwoTensor

from fastvq.models import PixelCNN
from fastvq.ops import nearest, pack_codebook, pixelcnn_start, pixelcnn_step, quantize, replace_dead_codes_
from tests.support.cases import gaussian, generator

SHAPE = (2, 4, 5)
X, CODES = gaussian(30, 7, 16, generator(0))


def sampler_weights():
    torch.manual_seed(0)
    model = PixelCNN(7, 8, 2)
    modules = [m for layer in model.layers for m in (layer.vertical, layer.link, layer.horizontal, layer.out)]
    weights = [model.embedding.weight, *(p for m in (*modules, *model.head) for p in (m.weight, m.bias))]
    return [w.detach() for w in weights], model.kernel_sizes


def all_calls(wrap):
    """What the calls on ``wrap``ped tensors return: (indices, indices by a packed codebook, logits of a position)."""
    weights, sizes = sampler_weights()
    x, codes = wrap(X), wrap(CODES)
    state = pixelcnn_start([wrap(w) for w in weights], sizes, SHAPE)
    ids = wrap(torch.zeros(SHAPE, dtype=torch.int64))
    packed = nearest(x, pack_codebook(codes))
    return nearest(x, codes), packed, quantize(x, codes).indices, pixelcnn_step(state, ids, 0, 0)


@pytest.mark.filterwarnings("error")
def test_meta():
    found = all_calls(lambda t: t.to("meta"))
    assert all(t.is_meta for t in found) and [list(t.shape) for t in found] == [[30], [30], [30], [2, 7]]


def test_fake_tensors():
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        found = all_calls(mode.from_tensor)
    assert [list(t.shape) for t in found] == [[30], [30], [30], [2, 7]]


def test_a_subclass_that_wraps_others():
    found = all_calls(lambda t: TwoTensor(t.clone(), t.clone()))
    for got, expected in zip(found, all_calls(lambda t: t), strict=True):
        assert isinstance(got, TwoTensor) and torch.equal(got.a, got.b)
        assert torch.equal(got.a, expected)


@pytest.fixture
def mesh():
    """Two processes, of which this one alone exists."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield DeviceMesh("cpu", [0, 1])
    dist.destroy_process_group()


@pytest.mark.parametrize("placement", [Replicate(), Shard(0)], ids=str)
def test_distributed_tensors(placement, mesh):
    """How an op is cut over processes is not known: torch says so, and names the op. Each part by itself is served."""
    weights, sizes = sampler_weights()
    x, codes = (distribute_tensor(t, mesh, [placement]) for t in (X, CODES))
    cut = [distribute_tensor(w, mesh, [placement]) for w in weights]
    for op, call in (
        ("nearest", lambda: nearest(x, codes)),
        ("quantize", lambda: quantize(x, codes)),
        ("pack_codebook", lambda: pack_codebook(codes)),
        ("pixelcnn_pack", lambda: pixelcnn_start(cut, sizes, SHAPE)),
    ):
        with pytest.raises((NotImplementedError, RuntimeError), match=f"fastvq.{op}.default .* sharding strategy"):
            call()
    local = nearest(x.to_local(), pack_codebook(codes.to_local()))
    assert torch.equal(local, nearest(X[: len(local)], CODES[: len(codes.to_local())]))


def test_condition_on_another_device():
    model = PixelCNN(7, 8, 2, condition_channels=3)
    weights, sizes = sampler_weights()
    condition = torch.zeros(2, 2, 4, 5, 4 * 8, device="meta")
    message = "fastvq.ops.pixelcnn_start: condition must be on the weights' device, cpu, got meta; move one"
    with pytest.raises(ValueError, match=message):
        pixelcnn_start(weights, sizes, SHAPE, condition=condition)
    with pytest.raises(ValueError, match="PixelCNN: the model and condition must be on one device, got cpu and meta"):
        model.sample(SHAPE, condition=torch.zeros(2, 3, 4, 5, device="meta"))


@pytest.mark.parametrize("place", range(5))
def test_memory_that_was_given_back(place):
    """A tensor whose storage was resized to nothing, as sharding libraries do: an error, not the end of the process."""
    given = [torch.randn(5, 4), torch.randn(5, 4), torch.zeros(5), torch.randn(6, 4), torch.randn(5, 4)]
    given[place].untyped_storage().resize_(0)
    with pytest.raises(TypeError, match="a kernel needs a tensor with memory of its own"):
        if place < 4:
            replace_dead_codes_(*given[:4], threshold=1.0)
        else:
            pack_codebook(given[4])
