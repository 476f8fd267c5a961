"""Under autocast every dtype stays what it is: torch casts, or refuses, what its stack and cat are given."""

import pytest
import torch

from fastvq.ops import code_statistics, nearest, quantize, residual_quantize
from fastvq.ops.nearest import METRICS
from tests.support.cases import generator

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def under_autocast(run):
    plain = run()
    with torch.autocast("cpu", torch.bfloat16):
        return zip(run(), plain, strict=True)


@pytest.mark.parametrize("dtype", DTYPES)
def test_levels_may_be_a_list(dtype):
    g = generator(1)
    x, codebooks = torch.randn(9, 5, generator=g), [torch.randn(7, 5, generator=g).to(dtype) for _ in range(3)]
    for a, b in under_autocast(lambda: residual_quantize(x, codebooks, statistics=True)):
        assert a.dtype == b.dtype and torch.equal(a, b)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_reference_takes_heads_of_every_dtype(dtype):
    g = generator(2)
    x, codebook = torch.randn(2, 9, 5, generator=g).to(dtype), torch.randn(2, 7, 5, generator=g).to(dtype)
    for metric in METRICS:
        options = {"metric": metric, "backend": "reference"}
        indices = nearest(x, codebook, **options)

        def run(options=options, indices=indices):
            levels = residual_quantize(x[0], codebook, statistics=True, **options)
            statistics = code_statistics(x, indices, 7, n_heads=2, backend="reference")
            return [nearest(x, codebook, **options), *quantize(x, codebook, **options), *levels, *statistics]

        for a, b in under_autocast(run):
            assert a.dtype == b.dtype and torch.equal(a, b)
