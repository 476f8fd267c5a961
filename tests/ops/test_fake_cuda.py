"""Every op on fake tensors of a device that need not be here: shape, dtype and device of what it returns."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from fastvq import ops

F32, F64, F16, BF16, INT = torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64
EACH_DTYPE = pytest.mark.parametrize("dtype,loss", [(F32, F32), (F64, F64), (F16, F32), (BF16, F32)])


@pytest.fixture(autouse=True)
def _fake():
    with FakeTensorMode():
        yield


def cuda(*shape, dtype=F32):
    return torch.empty(shape, device="cuda", dtype=dtype)


def holds(results, *expected):
    """Each result is a CUDA tensor of that (shape, dtype)."""
    assert [(tuple(t.shape), t.dtype, t.device.type) for t in results] == [(*e, "cuda") for e in expected]


@EACH_DTYPE
def test_nearest_and_quantize(dtype, loss):
    codebook = cuda(512, 64)
    for x in (cuda(4, 9, 64, dtype=dtype), cuda(4, 64, 3, 3, dtype=dtype).flatten(2).movedim(1, -1)):
        q = ops.quantize(x, codebook, mask=cuda(4, 9, dtype=torch.bool), estimator="rotation")
        holds([ops.nearest(x, codebook), *q], ((4, 9), INT), (x.shape, dtype), ((4, 9), INT), ((), loss), ((), loss))
        assert q.quantized.stride() == x.stride()
    heads = cuda(3, 5, 64, dtype=dtype)
    holds([ops.nearest(heads, cuda(3, 512, 64))], ((3, 5), INT))
    holds(ops.quantize(heads, cuda(3, 512, 64))[:2], ((3, 5, 64), dtype), ((3, 5), INT))
    holds(ops.quantize(cuda(0, 64, dtype=dtype), codebook)[:2], ((0, 64), dtype), ((0,), INT))


@EACH_DTYPE
def test_vq_step(dtype, loss):
    x, codebook = cuda(4, 9, 64, dtype=dtype), cuda(4, 512, 64)
    losses = ((), loss), ((), loss)
    step = ops.vq_step(x, codebook, mask=cuda(4, 9, dtype=torch.bool), deterministic=False)
    holds(step, (x.shape, dtype), ((4, 9), INT), *losses, (codebook.shape, loss), ((4, 512), INT))


@EACH_DTYPE
def test_gradient_of_quantize(dtype, loss):
    # The op itself: autograd on a fake CUDA tensor wants the streams of a real one.
    x, codebook, scalar = cuda(4, 9, 64, dtype=dtype), cuda(512, 64), cuda(dtype=loss)
    for need_x, need_codebook in ((True, True), (True, False), (False, True)):
        gradients = torch.ops.fastvq.quantize_backward(
            x, codebook, cuda(4, 9, dtype=INT), x, scalar, scalar, "rotation", 1.0, need_x, need_codebook, None
        )
        holds(gradients, (x.shape if need_x else (0,), dtype), (codebook.shape if need_codebook else (0,), F32))


@EACH_DTYPE
def test_residual_quantize(dtype, loss):
    x, codebooks = cuda(4, 9, 64, dtype=dtype), cuda(3, 512, 64)
    # The op itself: the function takes a level out by its number, for which torch wants to be built with CUDA.
    out, commitment, pull, indices, sums, counts = torch.ops.fastvq.residual_quantize(
        x, codebooks, None, "euclidean", "rotation", 1.0, True, "exact", None
    )
    wide = F64 if dtype == F64 else F32
    holds([out, commitment, pull, indices], (x.shape, dtype), ((3,), loss), ((3,), loss), ((4, 9, 3), INT))
    holds([sums, counts], ((3, 512, 64), wide), ((3, 512), INT))
    gradients = torch.ops.fastvq.residual_quantize_backward(
        x, codebooks, indices, x, commitment, pull, "rotation", 1.0, True, True, None
    )
    holds(gradients, (x.shape, dtype), (codebooks.shape, F32))


@EACH_DTYPE
def test_code_statistics(dtype, loss):
    x, indices = cuda(4, 9, 64, dtype=dtype), cuda(4, 9, dtype=INT)
    for deterministic in (True, False):
        holds(ops.code_statistics(x, indices, 512, deterministic=deterministic), ((512, 64), loss), ((512,), INT))
    holds(ops.code_statistics(x, indices, 512, n_heads=4), ((4, 512, 64), loss), ((4, 512), INT))


@pytest.mark.parametrize("dtype", [F32, F64])
def test_learning(dtype):
    codebook, embed_sum, size = cuda(512, 64, dtype=dtype), cuda(512, 64, dtype=dtype), cuda(512, dtype=dtype)
    ops.ema_update_(codebook, embed_sum, size, cuda(512, 64), cuda(512, dtype=INT), decay=0.99)
    replaced = torch.ops.fastvq.replace_dead_codes_(
        codebook, embed_sum, size, cuda(4, 9, 64, dtype=BF16), cuda(512), 1.0, None
    )
    holds([codebook, embed_sum, size, replaced], ((512, 64), dtype), ((512, 64), dtype), ((512,), dtype), ((), INT))


@pytest.mark.parametrize("dtype", [F32, F16, BF16])
def test_masked_convolution(dtype):
    x, weight, bias = cuda(2, 16, 8, 8, dtype=dtype), cuda(32, 16, 3, 3, dtype=dtype), cuda(32, dtype=dtype)
    holds([ops.masked_conv2d(x, weight, bias)], ((2, 32, 8, 8), dtype))
    holds([ops.gated_masked_conv2d(x, weight, bias, cuda(2, 32, dtype=dtype))], ((2, 16, 8, 8), dtype))
    gradients = torch.ops.fastvq.masked_conv2d_backward(
        cuda(2, 32, 8, 8, dtype=dtype), x, weight, "B", None, 1, True, True, True, None
    )
    holds(gradients, (x.shape, dtype), (weight.shape, dtype), (bias.shape, dtype))
    half = cuda(2, 16, 8, 8, dtype=dtype)
    holds([torch.ops.fastvq.gate_backward(half, half, half, None)], ((2, 32, 8, 8), dtype))


def test_pixelcnn_step():
    c, n_codes = 8, 17
    shapes = [(n_codes, c)]
    for out in (2 * c, c):
        shapes += [(2 * c, c, 3, 3), (2 * c,), (2 * c, c, 1, 1), (2 * c,), (2 * c, c, 1, 3), (2 * c,), (out, c, 1, 1)]
        shapes.append((out,))
    shapes += [(c, c, 1, 1), (c,), (n_codes, c, 1, 1), (n_codes,)]
    # The state of a backend is made at once, so one has to be named that asks nothing of a card.
    state = ops.pixelcnn_start([cuda(*s) for s in shapes], (3, 3), (2, 4, 4), backend="reference")
    assert state.cache.device.type == "cuda"
    holds([ops.pixelcnn_step(state, cuda(2, 4, 4, dtype=INT), 0, 0)], ((2, n_codes), F32))
