"""Quantization by Triton in the interpreter: sizes, dtypes and layouts small enough for it, by the CPU's own tests."""

import pytest
import torch

from fastvq.backends import triton as triton_backend
from fastvq.ops import quantize

if triton_backend.unavailable() is not None or not triton_backend.interpreting():
    pytest.skip("the interpreter is used where there is no GPU", allow_module_level=True)

from fastvq.ops.quantize import triton_backward, triton_forward
from fastvq.ops.quantize.call import QuantizeBackwardCall
from fastvq.ops.statistics import triton_statistics
from tests.ops.test_quantize import compare, indices_changed_since, leaves
from tests.support.cases import gaussian, generator
from tests.support.tolerance import assert_within, roundoff

BOTH = pytest.mark.parametrize("estimator", ["straight_through", "rotation"])


@BOTH
@pytest.mark.parametrize("n,k,d,metric", [(1, 1, 1, "dot"), (7, 3, 2, "euclidean"), (65, 17, 31, "cosine"),
                                          (40, 5, 130, "euclidean")])  # fmt: skip
def test_values_and_gradients(n, k, d, metric, estimator):
    x, codebook = gaussian(n, k, d, generator(n + k + d))
    compare(x, codebook, "triton", metric=metric, estimator=estimator)


@BOTH
@pytest.mark.parametrize("x_dtype,codebook_dtype", [
    (torch.bfloat16, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.float16, torch.float64),
    (torch.float64, torch.float16), (torch.float64, torch.float64), (torch.float32, torch.bfloat16),
])  # fmt: skip
def test_dtypes(x_dtype, codebook_dtype, estimator):
    x, codebook = gaussian(33, 7, 17, generator(2))
    compare(x.to(x_dtype), codebook.to(codebook_dtype), "triton", estimator=estimator)


@BOTH
def test_images_and_odd_strides(estimator):
    g = generator(3)
    images, codebook = torch.randn(2, 9, 5, 7, generator=g), torch.randn(7, 9, generator=g)
    mask = torch.rand(2, 5, 7, generator=g) < 0.7
    compare(images.movedim(1, -1), codebook, "triton", estimator=estimator)
    compare(images.permute(3, 0, 2, 1), codebook.t().contiguous().t(), "triton", estimator=estimator)
    compare(images.movedim(1, -1)[:, ::2, 1::3], codebook, "triton", mask=mask[:, ::2, 1::3], estimator=estimator)


@BOTH
def test_heads(estimator):
    g = generator(4)
    x, codebook = torch.randn(3, 2, 11, 5, generator=g), torch.randn(3, 7, 5, generator=g)
    mask = torch.rand(3, 2, 11, generator=g) < 0.7
    a, c = leaves(x, codebook)
    q = quantize(a, c, mask=mask, estimator=estimator, backend="triton")
    (q.quantized.sum() + q.codebook_loss).backward()
    for h in range(3):
        one = leaves(x[h], codebook[h])
        alone = quantize(*one, mask=mask[h], estimator=estimator, backend="triton")
        assert torch.equal(alone.quantized, q.quantized[h]) and torch.equal(alone.indices, q.indices[h])
        (alone.quantized.sum() + alone.codebook_loss * (mask[h].sum() / mask.sum())).backward()
        assert torch.equal(a.grad[h], one[0].grad)
        # The share, its product with the loss's weight, and the gradient are rounded to float32 on either side.
        assert_within(c.grad[h], one[1].grad, 8 * roundoff(torch.float32) * one[1].grad.abs().double())


def test_rows_left_out(monkeypatch):
    monkeypatch.setattr(triton_statistics, "check_indices", lambda *_: None)  # as on a GPU
    indices_changed_since(lambda *given: triton_backward.quantize_backward(QuantizeBackwardCall(*given, None)))


def test_losses_of_many_blocks(monkeypatch):
    """More blocks than one step of the kernel that adds them, and the last a part of one."""
    monkeypatch.setattr(triton_forward, "BLOCKS", 2)
    x, codebook = gaussian(3 * triton_forward.TILES[0].meta["ROWS"] + 1, 3, 2, generator(5))
    compare(x, codebook, "triton")
