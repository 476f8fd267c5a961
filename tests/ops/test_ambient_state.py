"""Nothing depends on torch's default dtype or default device: the same bits under any."""

from contextlib import contextmanager

import pytest
import torch

from fastvq.models import VQVAE, PixelCNN, edit
from fastvq.ops import (
    code_statistics,
    ema_update_,
    gated_masked_conv2d,
    masked_conv2d,
    nearest,
    pack_codebook,
    pixelcnn_start,
    pixelcnn_step,
    quantize,
    replace_dead_codes_,
    residual_quantize,
    vq_step,
)  # fmt: skip
from tests.support.cases import gaussian, generator


@contextmanager
def ambient(default):
    if isinstance(default, torch.dtype):
        before = torch.get_default_dtype()
        torch.set_default_dtype(default)
        try:
            yield
        finally:
            torch.set_default_dtype(before)
    else:
        with torch.device(default):
            yield


def all_ops(engine):
    """Every op forward and backward, on tensors that were made before."""
    x, codebook = gaussian(60, 20, 40, generator(0))
    image, weight, mask = torch.randn(2, 4, 6, 5), torch.randn(8, 4, 3, 3), torch.arange(60) % 7 != 0
    levels = torch.stack([codebook, codebook / 3])
    taps, uniforms_from = torch.rand(3, 3) < 0.5, torch.Generator().manual_seed(1)
    leaves = [t.requires_grad_() for t in (x, codebook, levels, image, weight)]

    def run():
        results = [nearest(x, codebook, backend=engine), nearest(x, pack_codebook(codebook, backend=engine))]
        for estimator in ("straight_through", "rotation"):
            q = quantize(x, codebook, mask=mask, estimator=estimator, backend=engine)
            r = residual_quantize(x, levels, estimator=estimator, statistics=True, backend=engine)
            step = vq_step(x, codebook, backend=engine)
            convs = [masked_conv2d(image, weight, mask=m, backend=engine) for m in ("A", taps)]
            convs += [masked_conv2d(image[:, :2], weight[:4, :2], mask="B", colours=2, backend=engine)]
            gated = gated_masked_conv2d(image, weight, backend=engine)
            found = [*q, *r, *step, *convs, gated]
            sum((t.float().sin().sum() for t in found if t.requires_grad), start=x.new_zeros(())).backward()
            results += [*found, *(leaf.grad for leaf in leaves)]
            for leaf in leaves:
                leaf.grad = None
        sums, counts = code_statistics(x, q.indices, 20, backend=engine)
        buffers = codebook.detach().clone(), sums.clone(), counts.float()
        ema_update_(*buffers, sums, counts, decay=0.9, backend=engine)
        uniforms_from.manual_seed(2)
        replaced = replace_dead_codes_(*buffers, x, threshold=3.0, generator=uniforms_from, backend=engine)
        return [t.detach() for t in (*results, sums, counts, *buffers, replaced)]

    return run


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16, "meta"], ids=str)
def test_ops(default, engine):
    run = all_ops(engine)
    expected = run()
    with ambient(default):
        got = run()
    for e, g in zip(expected, got, strict=True):
        assert g.dtype == e.dtype and g.device == e.device and torch.equal(g, e)


@pytest.mark.parametrize("default", [torch.float64, torch.float16, "meta"], ids=str)
def test_sampler(default, engine, monkeypatch):
    monkeypatch.setenv("FASTVQ_BACKEND", engine)
    torch.manual_seed(0)
    model, source = PixelCNN(7, 8, 3), torch.Generator()

    def run():
        ids = model.sample((2, 4, 5), generator=source.manual_seed(3), top_p=0.9)
        state = model.sampler_state((2, 4, 5), None, None)
        return [ids, *(pixelcnn_step(state, ids, i, j).detach() for i in range(4) for j in range(5))]

    expected = run()
    with ambient(default):
        got = run()
    assert all(g.dtype == e.dtype and torch.equal(g, e) for g, e in zip(got, expected, strict=True))


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16, "meta"], ids=str)
def test_pictures(default):
    torch.manual_seed(0)
    model, prior = VQVAE(1, 8, 7, 4).eval(), PixelCNN(7, 8, 2).eval()
    image, source = torch.randn(2, 1, 16, 16), torch.Generator()

    def run():
        made = model.generate(2, priors=prior, size=(16, 16), generator=source.manual_seed(3))
        edited = edit(model, image, (0, 0, 8, 8), prior=prior, generator=source.manual_seed(4), n_candidates=2)
        return [made, edited.image, *edited.maps]

    expected = run()
    with ambient(default):
        got = run()
    assert all(g.dtype == e.dtype and torch.equal(g, e) for g, e in zip(got, expected, strict=True))


def test_positions_out_of_order_are_defined(engine):
    """A cache that no call has written yet is zeros: the same logits every time, whatever memory held before."""
    torch.manual_seed(0)
    model = PixelCNN(7, 8, 3)
    ids = torch.zeros(2, 4, 5, dtype=torch.int64)
    weights = model.sampler_state((2, 4, 5), None, None)
    assert weights.cache.count_nonzero() == 0

    def out_of_order():
        torch.full((1 << 16,), torch.nan)  # leaves its memory to whoever asks next
        modules = [m for layer in model.layers for m in (layer.vertical, layer.link, layer.horizontal, layer.out)]
        given = [model.embedding.weight, *(p for m in (*modules, *model.head) for p in (m.weight, m.bias))]
        return pixelcnn_step(pixelcnn_start(given, model.kernel_sizes, (2, 4, 5), backend=engine), ids, 2, 1)

    first = out_of_order()
    assert first.isfinite().all() and all(torch.equal(out_of_order(), first) for _ in range(3))
