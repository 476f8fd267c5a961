"""Sums and counts per code: against exact sums, over threads, instruction sets, strides and dtypes."""

import numpy as np
import pytest
import torch
from torch.library import opcheck

from fastvq.ops import code_statistics
from tests.conftest import CPU_ENGINES
from tests.support.cases import DTYPES, SIZES, generator
from tests.support.tolerance import assert_within, gamma, roundoff


def draw(n, k, d, seed, dtype=torch.float32):
    g = generator(seed)
    return torch.randn(n, d, generator=g).to(dtype), torch.randint(-1, k, (n,), generator=g)


def check(x, indices, n_codes, backend, **options):
    """Counts exactly; sums within one rounding to their type plus (n-1) float64 roundings of the sum of magnitudes."""
    sums, counts = code_statistics(x, indices, n_codes, backend=backend, **options)
    rows, flat = x.reshape(-1, x.shape[-1]).double(), indices.reshape(-1)
    used = (flat >= 0) & rows.isfinite().all(-1)
    if (mask := options.get("mask")) is not None:
        used &= mask.reshape(-1)
    rows, flat = rows[used], flat[used]
    assert torch.equal(counts, torch.bincount(flat, minlength=n_codes)) and counts.dtype == torch.int64
    expected, mass = (torch.zeros(n_codes, x.shape[-1], dtype=torch.float64) for _ in range(2))
    order = flat.argsort(stable=True)
    if len(order):
        codes, starts = np.unique(flat[order].numpy(), return_index=True)
        wide = rows[order].numpy().astype(np.longdouble)
        for out, values in ((expected, wide), (mass, abs(wide))):
            out[codes] = torch.from_numpy(np.add.reduceat(values, starts, axis=0).astype(np.float64))
    final = 0.0 if x.dtype == torch.float64 else roundoff(torch.float32)
    assert sums.dtype == (torch.float64 if x.dtype == torch.float64 else torch.float32)
    # The expected value has its own rounding, and on some machines no more than float64 while it is added.
    inner = 2 * gamma(max(1, int(counts.max())), torch.float64) * mass
    assert_within(sums, expected, final * (expected.abs() + inner) + inner)


@pytest.mark.parametrize("d", SIZES)
@pytest.mark.parametrize("k", [1, 7, 64, 1000])
def test_sizes(k, d, engine):
    for n in (0, 1, 7, 513):
        check(*draw(n, k, d, n + k + d), k, engine)


@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes_and_strides(dtype, engine):
    g = generator(1)
    images = torch.randn(3, 35, 5, 7, generator=g).to(dtype)
    for x in (
        images.movedim(1, -1),
        images.to(memory_format=torch.channels_last).movedim(1, -1),
        images.permute(3, 0, 2, 1),
        images.movedim(1, -1)[:, ::2, 1::3],
        images.movedim(1, -1)[..., ::2],
        images[:1, :, :1].movedim(1, -1).expand(2, 4, 7, 35),
    ):
        indices = torch.randint(-1, 17, x.shape[:-1], generator=g)
        check(x, indices, 17, engine)
        check(x, indices.transpose(0, 1).contiguous().transpose(0, 1), 17, engine)


@pytest.mark.interpreted
def test_mask_and_heads(engine):
    g = generator(2)
    x, indices = torch.randn(3, 2, 50, 33, generator=g), torch.randint(-1, 17, (3, 2, 50), generator=g)
    mask = torch.rand(3, 2, 50, generator=g) < 0.5
    check(x, indices, 17, engine, mask=mask)
    sums, counts = code_statistics(x, indices, 17, mask=mask, n_heads=3, backend=engine)
    assert sums.shape == (3, 17, 33) and counts.shape == (3, 17)
    for h in range(3):
        alone = code_statistics(x[h], indices[h], 17, mask=mask[h], backend=engine)
        assert torch.equal(sums[h], alone[0]) and torch.equal(counts[h], alone[1])
    # Heads may lie last in memory, as they do after a split of the width.
    packed = torch.randn(40, 3 * 11, generator=g).view(40, 3, 11).transpose(0, 1)
    sums, _ = code_statistics(packed, indices[:, 0, :40], 17, n_heads=3, backend=engine)
    assert torch.equal(sums[1], code_statistics(packed[1].contiguous(), indices[1, 0, :40], 17, backend=engine)[0])


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_that_are_not_finite_are_left_out(dtype, engine, threads):
    x, indices = draw(5000, 31, 65, 3, dtype)
    x[0, 64], x[17, 0], x[4999, 3] = torch.nan, torch.inf, -torch.inf
    x[18, 0] = -torch.inf
    for n in (1, 2, 7):
        threads(n)
        check(x, indices, 31, engine)
    mask = x.isfinite().all(-1)
    left_out = code_statistics(torch.where(mask[:, None], x, 0), indices, 31, mask=mask, backend=engine)
    assert all(map(torch.equal, left_out, code_statistics(x, indices, 31, backend=engine)))
    x[:] = torch.nan
    sums, counts = code_statistics(x, indices, 31, backend=engine)
    assert not sums.any() and not counts.any()


@pytest.mark.interpreted
def test_float64_sums_that_overflow_are_no_reason_to_drop_rows(engine):
    x = torch.full((4, 2), 1.7e308, dtype=torch.float64)
    sums, counts = code_statistics(x, torch.tensor([0, 0, 1, -1]), 2, backend=engine)
    largest = torch.finfo(torch.float64).max
    assert (sums[0] == largest).all() and torch.equal(sums[1], x[0]) and counts.tolist() == [2, 1]


def test_ten_million_rows_in_one_code():
    """Plain float32 accumulation stalls at 2^24 = 16.8 million halves of a unit; here it is off in the 8th digit."""
    n = 10_000_019
    x = torch.full((n, 1), 0.1)
    sums, counts = code_statistics(x, torch.zeros(n, dtype=torch.int64), 2, backend="cpu")
    exact = float(x[0, 0]) * n  # 24 bits times 24 bits: exact in float64
    bound = roundoff(torch.float32) * exact + gamma(n, torch.float64) * exact
    assert abs(sums[0, 0].item() - exact) <= bound and counts.tolist() == [n, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("skew", [False, True])
def test_threads_and_instruction_sets_do_not_change_a_bit(dtype, skew, use_engine, threads):
    g = generator(4)
    for n, k, d in ((20011, 257, 33), (9973, 1000, 7), (5003, 3, 130)):
        x, indices = draw(n, k, d, n, dtype)
        if skew:
            indices = torch.where(torch.rand(n, generator=g) < 0.95, 2, indices)
        results = []
        for engine in ["reference", *CPU_ENGINES]:
            backend = use_engine(engine)
            for count in (1, 2, 7):
                threads(count)
                results.append(code_statistics(x, indices, k, backend=backend))
        for other in results[1:]:
            assert all(map(torch.equal, results[0], other))


@pytest.mark.interpreted
def test_denormals_count_whatever_the_flush_mode(engine):
    x = torch.full((4097, 3), 1e-41)
    expected = code_statistics(x, torch.zeros(4097, dtype=torch.int64), 1, backend=engine)[0]
    assert expected.min() > 4e-38
    if engine in ("reference", "triton") or not torch.set_flush_denormal(True):
        return
    try:
        got = code_statistics(x, torch.zeros(4097, dtype=torch.int64), 1, backend=engine)[0]
    finally:
        torch.set_flush_denormal(False)
    assert torch.equal(got, expected)


@pytest.mark.interpreted
@pytest.mark.parametrize("value,row", [(17, (1, 2)), (-2, (0, 4)), (2**40, (2, 0))])
def test_an_index_out_of_range_names_row_and_value(value, row, engine, threads):
    threads(2)
    x, indices = torch.randn(3, 5, 7), torch.zeros(3, 5, dtype=torch.int64)
    indices[row] = value
    with pytest.raises(
        ValueError, match=rf"code_statistics: indices must be in \[-1, 17\) \(-1: no code\), got {value} at row"
    ) as e:
        code_statistics(x, indices, 17, backend=engine)
    assert f"at row {row}" in str(e.value)
    big = torch.zeros(100_000, dtype=torch.int64)
    big[[70_000, 99_999]] = torch.tensor([17, 18])
    with pytest.raises(ValueError, match=r"got 17 at row \(70000,\)"):
        code_statistics(torch.zeros(100_000, 4), big, 17, backend=engine)


@pytest.mark.parametrize(
    "arguments,options,error,message",
    [
        ((torch.zeros(5, 3), torch.zeros(5), 7), {}, TypeError, r"indices must be an int64 tensor, got torch.float32"),
        ((torch.zeros(5, 3), [0] * 5, 7), {}, TypeError, r"indices must be an int64 tensor, got list"),
        ((torch.zeros(5, 3).int(), torch.zeros(5).long(), 7), {}, TypeError, r"x must be float32"),
        ((torch.zeros(5, 3), torch.zeros(4).long(), 7), {}, ValueError, r"indices must be \[5\], one a vector of x"),
        ((torch.zeros(5, 0), torch.zeros(5).long(), 7), {}, ValueError, r"D >= 1, got \[5, 0\]"),
        ((torch.zeros(5, 3), torch.zeros(5).long(), 0), {}, ValueError, r"n_codes must be at least 1, got 0"),
        ((torch.zeros(5, 3), torch.zeros(5).long(), 7), {"n_heads": 2}, ValueError, r"with n_heads = 2, x must be"),
        ((torch.zeros(5, 3), torch.zeros(5).long(), 7), {"mask": torch.ones(5)}, TypeError, r"mask must be a bool"),
    ],
)  # fmt: skip
def test_bad_arguments(arguments, options, error, message):
    with pytest.raises(error, match="fastvq.ops.code_statistics: .*" + message):
        code_statistics(*arguments, **options)


@pytest.mark.interpreted
def test_as_an_operator(engine):
    x, indices = draw(65, 7, 5, 5)
    opcheck(torch.ops.fastvq.code_statistics.default, (x, indices, 7, None, True, engine))
    opcheck(torch.ops.fastvq.code_statistics.default, (x.view(5, 13, 5), indices.view(5, 13), 7, 5, False, engine))
    x.requires_grad_()
    assert not code_statistics(x, indices, 7, backend=engine)[0].requires_grad
    compiled = torch.compile(lambda a, i: code_statistics(a, i, 7, backend=engine), fullgraph=True)
    assert all(map(torch.equal, compiled(x, indices), code_statistics(x, indices, 7, backend=engine)))
