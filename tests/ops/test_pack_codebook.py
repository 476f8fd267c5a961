"""A codebook packed once gives what the plain one gives, and keeps nothing of the tensor it was made from."""

import copy
import pickle

import pytest
import torch
from torch.library import opcheck

from fastvq.backends import cpu as cpu_backend
from fastvq.ops import PackedCodebook, nearest, pack_codebook, quantize
from tests.support import oracle
from tests.support.cases import DTYPES, HARD, METRICS, gaussian, generator

pytestmark = pytest.mark.every_isa


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("case", HARD)
def test_hard_cases(case, metric, engine):
    x, codebook = HARD[case](generator(0))
    packed = pack_codebook(codebook, metric=metric, backend=engine)
    for precision in ("exact", "fast"):
        plain = nearest(x, codebook, metric=metric, precision=precision, backend=engine)
        assert torch.equal(nearest(x, packed, metric=metric, precision=precision), plain)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "k", "d"), [(1, 1, 1), (65, 127, 17), (300, 1000, 64)])
def test_against_the_oracle(n, k, d, dtype, engine):
    x, codebook = (t.to(dtype) for t in gaussian(n, k, d, generator(n)))
    assert torch.equal(nearest(x, pack_codebook(codebook, backend=engine)), oracle.nearest(x, codebook))


def test_heads_and_strides(engine):
    g = generator(1)
    x, codebook = torch.randn(3, 65, 17, generator=g), torch.randn(3, 17, 127, generator=g).mT
    assert torch.equal(nearest(x, pack_codebook(codebook, backend=engine)), nearest(x, codebook))
    shared = codebook[:1].expand(3, 127, 17)
    assert torch.equal(nearest(x, pack_codebook(shared, backend=engine)), nearest(x, shared))


@pytest.mark.parametrize("estimator", ["straight_through", "rotation", "none"])
def test_quantize(estimator, engine):
    x, codebook = gaussian(65, 127, 17, generator(2))
    x.requires_grad_()
    mask = torch.arange(65) % 3 != 0
    grads = []
    for codes in (codebook, pack_codebook(codebook, backend=engine)):
        q = quantize(x, codes, estimator=estimator, mask=mask, beta=0.5, backend=engine)
        (q.quantized.sin().sum() + q.commitment_loss).backward()
        grads.append((*q, x.grad))
        x.grad = None
    for plain, packed in zip(*grads, strict=True):
        assert torch.equal(plain, packed)


def test_it_owns_its_codes():
    x, codebook = gaussian(65, 127, 17, generator(3))
    expected = nearest(x, codebook)
    packed = pack_codebook(codebook)
    codebook.zero_()
    packed.codebook.zero_()
    assert torch.equal(nearest(x, packed), expected)
    assert torch.equal(quantize(x, packed).indices, expected)


def test_copies():
    x, codebook = gaussian(65, 127, 17, generator(4))
    packed = pack_codebook(codebook, metric="cosine", backend="reference")
    for other in (packed, pickle.loads(pickle.dumps(packed)), copy.deepcopy(packed), packed.to("cpu")):
        assert (other.metric, other.backend, other.shape, other.dtype) == (
            "cosine", "reference", (127, 17), torch.float32
        )  # fmt: skip
        assert torch.equal(nearest(x, other, metric="cosine"), nearest(x, codebook, metric="cosine"))
    assert packed.to("cpu") is packed and packed.to("meta").device.type == "meta"
    assert repr(packed) == (
        "PackedCodebook([127, 17], torch.float32, metric='cosine', device=cpu, backend='reference', 0.00 MiB packed)"
    )


@pytest.mark.skipif(len(cpu_backend.available_isas()) < 2, reason="one instruction set alone")
def test_under_another_instruction_set(monkeypatch):
    x, codebook = gaussian(65, 127, 17, generator(5))
    monkeypatch.setenv("FASTVQ_CPU_ISA", "generic")
    packed = pack_codebook(codebook)
    monkeypatch.setenv("FASTVQ_CPU_ISA", cpu_backend.available_isas()[-1])
    assert torch.equal(nearest(x, packed), nearest(x, codebook))


def test_operator(engine):
    x, codebook = gaussian(65, 127, 17, generator(6))
    packed = pack_codebook(codebook, backend=engine)
    opcheck(torch.ops.fastvq.nearest.default, (x, codebook, "euclidean", "exact", False, engine, packed._layout))
    compiled = torch.compile(lambda x: nearest(x, packed), fullgraph=True)
    assert torch.equal(compiled(x), nearest(x, codebook))


@pytest.mark.parametrize(
    "codebook,options,error,message",
    [
        (torch.zeros(3), {}, ValueError, r"codebook must be \[K, D\], or \[H, K, D\] with heads, got \[3\]"),
        (torch.zeros(0, 3), {}, ValueError, r"codebook must have at least one code \(K >= 1\), got \[0, 3\]"),
        (torch.zeros(3, 0), {}, ValueError, r"codebook must have at least one element a code \(D >= 1\), got \[3, 0\]"),
        (torch.zeros(0, 3, 4), {}, ValueError, r"codebook must have at least one head \(H >= 1\), got \[0, 3, 4\]"),
        (torch.zeros(3, 4).int(), {}, TypeError, r"codebook must be float32, float64, float16 or bfloat16, got"),
        ([[1.0]], {}, TypeError, r"codebook must be a torch.Tensor, got list"),
        (torch.zeros(3, 4), {"metric": "l2"}, ValueError, r"metric must be one of 'euclidean', 'cosine', 'dot'"),
        (torch.zeros(3, 4), {"backend": "metal"}, ValueError, r"backend must be one of .*, got 'metal'"),
    ],
)
def test_errors(codebook, options, error, message):
    with pytest.raises(error, match=r"fastvq.ops.pack_codebook: " + message):
        pack_codebook(codebook, **options)


@pytest.mark.parametrize("op", [nearest, quantize])
def test_errors_of_a_call(op):
    packed = pack_codebook(torch.zeros(3, 4), metric="dot")
    assert isinstance(packed, PackedCodebook)
    with pytest.raises(ValueError, match=rf"{op.__name__}: the codebook was packed for metric 'dot', got metric='euc"):
        op(torch.zeros(2, 4), packed)
    with pytest.raises(ValueError, match=r"codebook must be \[K, D\] with D = 5 to match x, got \[3, 4\]"):
        op(torch.zeros(2, 5), packed, metric="dot")


@pytest.mark.skipif(cpu_backend.unavailable() is not None, reason="the extension is not built")
def test_the_kernel_refuses_the_layout_of_another_codebook():
    x, codebook = gaussian(5, 127, 17, generator(7))
    layout = pack_codebook(codebook[:64])._layout
    with pytest.raises(ValueError, match=r"packed codebook is of another codebook, metric or instruction set"):
        torch.ops.fastvq.nearest(x, codebook, "euclidean", "exact", False, "cpu", layout)
