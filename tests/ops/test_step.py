"""fastvq.ops.vq_step: quantize and code_statistics to the bit, on every backend and instruction set."""

import pytest
import torch

from fastvq.ops import code_statistics, quantize, vq_step
from tests.conftest import CPU_ENGINES
from tests.support.cases import DTYPES, gaussian, generator

pytestmark = pytest.mark.every_isa


def compare(x, codebook, backend, heads=None, mask=None, **options):
    """Every output, and the gradients of all of them, against the two ops it stands for."""
    ours, theirs = ((x.detach().clone().requires_grad_(), codebook.detach().clone().requires_grad_()) for _ in range(2))
    step = vq_step(*ours, mask=mask, backend=backend, **options)
    q = quantize(*theirs, mask=mask, backend=backend, **options)
    sums, counts = code_statistics(x, q.indices, codebook.shape[-2], n_heads=heads, backend=backend)
    expected = (*q, sums, counts)
    for name, a, e in zip(step._fields, step, expected, strict=True):
        assert a.dtype == e.dtype and a.stride() == e.stride(), name
        assert torch.equal(a.detach().nan_to_num(7), e.detach().nan_to_num(7)), name
    assert not step.sums.requires_grad and not step.counts.requires_grad
    for r in (step, q):
        (r.quantized.square().sum() + 3 * r.commitment_loss + 5 * r.codebook_loss).backward()
    for a, e in zip(ours, theirs, strict=True):
        assert torch.equal(a.grad.nan_to_num(7), e.grad.nan_to_num(7))
    return step


@pytest.mark.parametrize("n,k,d", [(1, 1, 1), (7, 3, 2), (300, 127, 65), (1201, 17, 31)])
def test_values_and_gradients(n, k, d, engine):
    x, codebook = gaussian(n, k, d, generator(n + k + d))
    step = compare(x, codebook, engine, estimator="rotation", metric="dot", beta=0.25)
    assert step.counts.sum() == n


@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes_layouts_and_mask(dtype, engine):
    g = generator(1)
    images, codebook = torch.randn(3, 17, 9, 11, generator=g).to(dtype), torch.randn(65, 17, generator=g)
    for x in (images.movedim(1, -1), images.permute(3, 0, 2, 1), images.movedim(1, -1)[:, ::2, 1::3]):
        compare(x, codebook, engine, mask=torch.rand(x.shape[:-1], generator=g) < 0.7)
    nothing = torch.zeros(images.movedim(1, -1).shape[:-1], dtype=torch.bool)
    assert not compare(images.movedim(1, -1), codebook, engine, mask=nothing).counts.any()


@pytest.mark.interpreted
def test_heads_and_rows_that_are_not_finite(engine):
    g = generator(2)
    x, codebook = torch.randn(3, 2, 31, 7, generator=g), torch.randn(3, 9, 7, generator=g)
    compare(x, codebook, engine, heads=3)
    x[1, 0, 5, 3], x[2, 1, 7, 0] = torch.nan, torch.inf
    step = compare(x, codebook, engine, heads=3)
    assert step.counts.sum(-1).tolist() == [62, 61, 61] and step.sums.isfinite().all()
    empty = vq_step(x[:, :, :0], codebook, backend=engine)
    assert not empty.sums.any() and not empty.counts.any() and empty.commitment_loss == 0


@pytest.mark.parametrize("name", CPU_ENGINES)
def test_threads_and_definition(name, use_engine, threads):
    """One thread adds rows block by block, several in a pass of their own: both in row order."""
    backend = use_engine(name)
    x, codebook = gaussian(9001, 127, 33, generator(3))
    results = []
    for n in (1, 2, 7):
        threads(n)
        results.append(vq_step(x, codebook, backend=backend))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
    sums, counts = code_statistics(x, results[0].indices, 127, backend="reference")
    assert torch.equal(results[0].sums, sums) and torch.equal(results[0].counts, counts)


@pytest.mark.interpreted
def test_registration(engine):
    x, codebook = (t.requires_grad_() for t in gaussian(65, 17, 7, generator(4)))
    arguments = (x.view(5, 13, 7), codebook, torch.arange(65).view(5, 13) % 3 != 0, "euclidean", "rotation", 0.5)
    torch.library.opcheck(torch.ops.fastvq.vq_step.default, (*arguments, "exact", engine, True))


def test_compile_fullgraph():
    x, codebook = (t.requires_grad_() for t in gaussian(65, 17, 7, generator(5)))

    def run(x, codebook):
        step = vq_step(x, codebook, estimator="none")
        return step.quantized, step.commitment_loss + step.codebook_loss, step.sums, step.counts

    for eager, compiled in zip(
        run(x, codebook), torch.compile(run, fullgraph=True, backend="aot_eager")(x, codebook), strict=True
    ):
        assert torch.equal(eager, compiled) and eager.requires_grad == compiled.requires_grad


def test_quantizer_takes_this_path(monkeypatch):
    from fastvq.nn import VectorQuantizer, vector_quantizer

    calls = []

    def count(*arguments, **options):
        calls.append(1)
        return vq_step(*arguments, **options)

    monkeypatch.setattr(vector_quantizer, "vq_step", count)
    quantizer, x = VectorQuantizer(7, 17), gaussian(65, 17, 7, generator(6))[0]
    quantizer(x)
    quantizer.eval()(x)
    assert len(calls) == 1 and quantizer.counts.sum() == 65
