"""The ops as torch operators: opcheck, compile, autocast, export, inference and fake tensors."""

import warnings

import pytest
import torch
from torch.library import opcheck

from fastvq.ops import nearest, quantize
from tests.support.cases import METRICS, gaussian, generator


def pair(requires_grad=False):
    x, codebook = gaussian(65, 17, 7, generator(0))
    return x.view(5, 13, 7).requires_grad_(requires_grad), codebook.requires_grad_(requires_grad)


@pytest.mark.parametrize("metric", METRICS)
def test_opcheck_nearest(metric, engine):
    opcheck(torch.ops.fastvq.nearest.default, (*pair(), metric, "exact", False, engine))
    heads = torch.randn(2, 9, 7), torch.randn(2, 5, 7)
    opcheck(torch.ops.fastvq.nearest.default, (*heads, metric, "exact", True, engine))


@pytest.mark.interpreted
@pytest.mark.parametrize("estimator", ["straight_through", "rotation", "none"])
def test_opcheck_quantize(estimator, engine):
    x, codebook = pair(requires_grad=True)
    mask = torch.arange(65).view(5, 13) % 3 != 0
    opcheck(torch.ops.fastvq.quantize.default, (x, codebook, mask, "euclidean", estimator, 0.5, "exact", engine))
    images = torch.randn(2, 7, 3, 4).movedim(1, -1).requires_grad_()
    opcheck(torch.ops.fastvq.quantize.default, (images, codebook, None, "dot", estimator, 0.5, "exact", engine))


@pytest.mark.interpreted
def test_opcheck_quantize_backward(engine):
    x, codebook = pair()
    indices, loss = nearest(x, codebook), torch.tensor(2.0)
    for needs in ((True, True), (True, False), (False, True)):
        opcheck(
            torch.ops.fastvq.quantize_backward.default,
            (x, codebook, indices, torch.randn_like(x), loss, loss, "rotation", 0.5, *needs, engine),
        )


def test_compile_fullgraph(engine):
    x, codebook = pair(requires_grad=True)

    def step(x, codebook):
        q = quantize(x, codebook, beta=0.25, backend=engine)
        return q.quantized * 2, q.indices, nearest(x, codebook, backend=engine), q.commitment_loss + q.codebook_loss

    results = []
    for run in (step, torch.compile(step, fullgraph=True)):
        x.grad = codebook.grad = None
        out = run(x, codebook)
        (out[0].sum() + out[3]).backward()
        results.append((*out, x.grad, codebook.grad))
    for eager, compiled in zip(*results, strict=True):
        assert torch.equal(eager, compiled)


def test_autocast_keeps_every_index(engine):
    x, codebook = gaussian(4000, 512, 64, generator(1))
    expected = nearest(x, codebook, backend=engine)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(nearest(x, codebook, backend=engine), expected)
        q = quantize(x, codebook, backend=engine)
        assert torch.equal(q.indices, expected)
        assert q.quantized.dtype == torch.float32 and q.commitment_loss.dtype == torch.float32
        # What autocast makes of a layer before: bfloat16 vectors against the float32 codebook.
        narrow = torch.nn.functional.linear(x, torch.eye(64))
        assert narrow.dtype == torch.bfloat16
        assert torch.equal(quantize(narrow, codebook, backend=engine).indices, nearest(narrow.float(), codebook))
    # The product that others use loses some of them there.
    with torch.autocast("cpu", torch.bfloat16):
        lossy = (2 * x @ codebook.T - codebook.square().sum(1)).argmax(1)
    assert (lossy != expected).any()


def test_export(engine):
    class Tokenizer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("codebook", torch.randn(17, 7))

        def forward(self, x):
            return nearest(x, self.codebook, backend=engine)

    tokenizer, x = Tokenizer(), pair()[0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        rows = torch.export.Dim("rows")
        exported = torch.export.export(tokenizer, (x,), dynamic_shapes={"x": {0: rows}})
    assert torch.equal(exported.module()(x[:3]), tokenizer(x[:3]))


def test_inference_mode_and_no_grad(engine):
    x, codebook = pair(requires_grad=True)
    for mode in (torch.inference_mode, torch.no_grad):
        with mode():
            q = quantize(x, codebook, backend=engine)
        assert not q.quantized.requires_grad and q.indices.shape == (5, 13)
