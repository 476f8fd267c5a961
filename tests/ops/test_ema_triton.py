"""The Triton update and replacement in the interpreter, against the reference to the bit."""

import pytest
import torch

from fastvq.backends import triton as triton_backend
from fastvq.ops import ema_update_, replace_dead_codes_

if triton_backend.unavailable() is not None or not triton_backend.interpreting():
    pytest.skip("the interpreter is used where there is no GPU", allow_module_level=True)

import triton
import triton.language as tl

from fastvq.ops.statistics import triton_replace
from tests.ops.test_ema import buffers
from tests.support.cases import DTYPES, generator


@pytest.mark.parametrize("smoothing", ["laplace", "none"])
@pytest.mark.parametrize("debias", [False, True])
@pytest.mark.parametrize("k,d,dtype", [(1, 1, torch.float64), (7, 3, torch.float32), (65, 31, torch.float32),
                                       (9, 300, torch.float64), (1025, 2, torch.float32)])  # fmt: skip
def test_update_equals_the_reference_to_the_bit(k, d, dtype, smoothing, debias):
    g = generator(k + d)
    start = buffers(k, d, g, dtype=dtype)
    start[2][: k // 2] = 0
    sums, counts = torch.randn(k, d, generator=g), torch.randint(0, 3, (k,), generator=g)
    counts[0] = 1
    results = []
    for backend in ("reference", "triton"):
        ours = tuple(t.clone() for t in start)
        ema_update_(*ours, sums, counts, decay=0.97, eps=1e-3, smoothing=smoothing, debias=debias, backend=backend)
        results.append(ours)
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads,n,k,d", [((), 1, 3, 2), ((), 40, 65, 17), ((2,), 70, 33, 5), ((3,), 9, 7, 130)])
def test_replacement_equals_the_reference_to_the_bit(heads, n, k, d, dtype):
    g = generator(n + k + d)
    start = buffers(k, d, g, heads)
    start[2].uniform_(generator=g)
    x = torch.randn(*heads, d, n, generator=g).to(dtype).transpose(-1, -2)
    x[..., ::3, 0] = torch.nan
    x[..., 1::7, d - 1] = torch.inf
    if heads:
        x[0] = torch.nan
    results = []
    for backend in ("reference", "triton"):
        ours = tuple(t.clone() for t in start)
        replaced = replace_dead_codes_(*ours, x, threshold=0.6, generator=generator(1), backend=backend)
        results.append((*ours, replaced))
    assert all(map(torch.equal, *results))


@triton.jit
def _divide(values, out, divisor, n, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    value = tl.load(values + at, mask=at < n, other=0)
    tl.store(out + at, triton_replace._quotient(value, tl.zeros([BLOCK], tl.int64) + divisor), mask=at < n)


@pytest.mark.parametrize("n,slots", [(2**31 - 1, 3), (2**30 + 7, 2**17 - 1), (12345, 12345), (2**31 - 1, 2**31 - 2)])
def test_the_quotient_by_way_of_float64_is_exact(n, slots):
    slot = torch.tensor([0, 1, slots // 2, slots - 2, slots - 1])
    for values in (slot * n, slot * n + slots - 1, (slot + 1) * n - 1):
        out = torch.empty_like(values)
        _divide[(1,)](values, out, slots, len(values), BLOCK=8)
        assert torch.equal(out, values // slots)
