"""``torch.ops.fastvq.*``, which graphs call without the public functions, check what the kernels rely on."""

import pytest
import torch

from fastvq.ops import nearest, quantize, residual_quantize
from fastvq.ops.nearest import cpu
from tests.support.cases import gaussian, generator

OPS = torch.ops.fastvq
X, C = gaussian(50, 10, 8, generator(0))
I64 = torch.int64
INDICES = torch.arange(50) % 10
G, ONE, FLAG = torch.randn(50, 8), torch.tensor(1.0), torch.ones(50, dtype=torch.bool)
SUMS, COUNTS, SIZE = torch.zeros(10, 8), torch.zeros(10, dtype=I64), torch.ones(10)
LEVELS, CHOSEN, Q3 = torch.randn(3, 10, 8), torch.zeros(50, 3, dtype=I64), torch.ones(3)


def refused(op, arguments, place, wrong):
    given = [a.clone() if isinstance(a, torch.Tensor) else a for a in arguments]
    given[place] = wrong
    with pytest.raises((ValueError, TypeError), match=rf"fastvq.ops.{op}: "):
        getattr(OPS, op)(*given)


@pytest.mark.parametrize(
    "place,wrong",
    [
        (0, torch.randn(50, 7)), (0, torch.randn(50, 8).long()), (0, torch.randn(())), (1, torch.randn(0, 8)),
        (1, torch.randn(8)), (1, torch.randn(2, 10, 8)), (1, torch.randn(1, 2, 10, 8)), (2, "l2"), (3, "half"),
        (5, "metal"),
    ],
)  # fmt: skip
def test_nearest(place, wrong, engine):
    refused("nearest", [X, C, "euclidean", "exact", False, engine], place, wrong)


@pytest.mark.parametrize("op", ["quantize", "vq_step"])
@pytest.mark.parametrize(
    "place,wrong",
    [(0, X[:, :7]), (1, C[:0]), (2, FLAG[:1]), (2, FLAG.float()), (3, "l2"), (6, "half")],
)
def test_quantize(op, place, wrong, engine):
    last = [None] if op == "quantize" else [True]
    refused(op, [X, C, FLAG, "euclidean", "none", 1.0, "exact", engine, *last], place, wrong)


@pytest.mark.parametrize(
    "place,wrong",
    [
        (0, X[:7]), (1, C[:, :7]), (2, INDICES[:5]), (2, INDICES.int()), (3, G[:9]), (3, G.double()),
        (4, torch.ones(2)), (5, torch.ones(50)), (6, "gumbel"),
    ],
)  # fmt: skip
def test_quantize_backward(place, wrong, engine):
    arguments = [X, C, INDICES, G, ONE, ONE, "rotation", 1.0, True, True, engine]
    refused("quantize_backward", arguments, place, wrong)


@pytest.mark.parametrize(
    "place,wrong",
    [(0, X[:, :0]), (1, INDICES[:5]), (1, INDICES.int()), (2, 0), (3, 3), (3, 0)],
)
def test_code_statistics(place, wrong, engine):
    refused("code_statistics", [X, INDICES, 10, None, True, engine], place, wrong)


@pytest.mark.parametrize(
    "place,wrong",
    [
        (0, C[:, :0].clone()), (0, C.half()), (1, torch.zeros(2, 8)), (1, SUMS.double()), (2, torch.ones(9)),
        (3, torch.zeros(2, 8)), (3, SUMS.half()), (4, COUNTS[:5]), (4, COUNTS.int()), (7, "linear"),
    ],
)  # fmt: skip
def test_ema_update(place, wrong, engine):
    refused("ema_update_", [C, SUMS, SIZE, SUMS, COUNTS, 0.9, 1e-5, "laplace", False, engine], place, wrong)


@pytest.mark.parametrize(
    "place,wrong",
    [(0, C[0]), (1, torch.zeros(2, 8)), (2, torch.ones(9)), (3, X[:, :7]), (3, X.long()), (4, torch.rand(3))],
)
def test_replace_dead_codes(place, wrong, engine):
    refused("replace_dead_codes_", [C, SUMS, SIZE, X, torch.rand(10), 2.0, engine], place, wrong)


@pytest.mark.parametrize("place,wrong", [(0, X[:, :7]), (1, LEVELS[0]), (1, LEVELS[:0]), (2, FLAG[:1])])
def test_residual_quantize(place, wrong, engine):
    arguments = [X, LEVELS, FLAG, "euclidean", "none", 1.0, True, "exact", engine]
    refused("residual_quantize", arguments, place, wrong)


@pytest.mark.parametrize(
    "place,wrong",
    [
        (1, LEVELS[:2]), (2, CHOSEN[:5]), (2, CHOSEN[:, :2]), (2, CHOSEN.int()), (3, G[:9]), (3, G.half()), (4, ONE),
        (5, torch.ones(2)),
    ],
)  # fmt: skip
def test_residual_quantize_backward(place, wrong, engine):
    arguments = [X, LEVELS, CHOSEN, G, Q3, Q3, "rotation", 1.0, True, True, engine]
    refused("residual_quantize_backward", arguments, place, wrong)


@pytest.mark.parametrize("estimator", ["straight_through", "rotation", "none"])
@pytest.mark.parametrize("bad", [10, -2, 2**62, -(2**63)])
def test_indices_changed_before_the_backward(estimator, bad, engine):
    x, codebook = X.clone().requires_grad_(), C.clone().requires_grad_()
    q = quantize(x, codebook, estimator=estimator, backend=engine)
    q.indices.data[7] = bad
    with pytest.raises(ValueError, match=rf"quantize_backward: indices must be .* got {bad} at row \(7,\)"):
        (q.quantized.sum() + q.commitment_loss + q.codebook_loss).backward()
    r = residual_quantize(x, LEVELS, estimator=estimator, backend=engine)
    r.indices.data[7, 1] = bad
    with pytest.raises(ValueError, match=rf"residual_quantize_backward: indices must be .* got {bad} at row \(7, 1\)"):
        (r.quantized.sum() + r.commitment_losses.sum()).backward()


def test_a_level_without_a_code(use_engine):
    """-1 on one level of a vector that has codes on the others would be read before the codebook."""
    x = X.clone().requires_grad_()
    r = residual_quantize(x, LEVELS, backend="cpu")
    r.indices.numpy()[3, 2] = -1
    with pytest.raises(ValueError, match=r"got -1 at row \(3, 2\)"):
        r.commitment_losses.sum().backward()


def test_pack_codebook():
    refused("pack_codebook", [C, "dot"], 0, C[0])
    refused("pack_codebook", [C, "dot"], 0, C.long())
    refused("pack_codebook", [C, "dot"], 1, "l2")
    with pytest.raises(ValueError, match=r"fastvq.ops.pack_codebook: codebook must be on the CPU, got meta"):
        cpu.pack(C.to("meta"), "dot")  # through the op, a codebook on a GPU comes here


def test_right_calls_still_run(engine):
    assert torch.equal(OPS.nearest(X, C, "dot", "exact", False, engine), nearest(X, C, metric="dot"))
    grads = OPS.quantize_backward(X, C, INDICES, None, None, None, "none", 1.0, True, True, engine)
    assert not any(g.any() for g in grads)
