"""The lookup kernel below its operator: how often its certificate fails. Exact indices alone would not show that."""

import pytest
import torch

from fastvq.backends import cpu as cpu_backend
from fastvq.backends import views
from tests.support import oracle

pytestmark = [
    pytest.mark.every_isa,
    pytest.mark.skipif(cpu_backend.unavailable() is not None, reason="the extension is not built"),
]


def lookup(x, codebook, metric="euclidean", fast=False):
    """Indices, the rows whose few survivors were scored by the definition, and those scored against every code."""
    indices = torch.empty(x.shape[0], dtype=torch.int64)
    x, rows = views.rows_view(x, None)
    rescored, scanned = cpu_backend._cpu.nearest(
        rows, views.codes_view(codebook), views.metric_code(metric), fast, indices.data_ptr(), cpu_backend.isa(), 1, 0
    )
    return indices, rescored, scanned


@pytest.fixture(params=cpu_backend.available_isas())
def isa(request, monkeypatch):
    monkeypatch.setenv("FASTVQ_CPU_ISA", request.param)
    return request.param


def few(isa, d):
    """The share of Gaussian rows that may be scored twice. Rounded operands, which are for wide vectors, decide fewer:
    bfloat16, and integers of 16 bits."""
    return {"amx": 0.35, "emulated": 0.35, "avx512_vnni": 0.1}.get(isa, 0.01) if d >= 32 else 0.01


def gaussian(n, k, d):
    generator = torch.Generator().manual_seed(n + k + d)
    return torch.randn(n, d, generator=generator), torch.randn(k, d, generator=generator)


@pytest.mark.parametrize("metric", ["euclidean", "cosine", "dot"])
@pytest.mark.parametrize(("k", "d"), [(1000, 8), (1000, 31), (512, 256)])
def test_gaussian_rows_are_certified(k, d, metric, isa):
    x, codebook = gaussian(3001, k, d)
    _, rescored, scanned = lookup(x, codebook, metric)
    assert rescored < few(isa, d) * len(x)
    assert scanned == 0


def test_an_offset_that_x_and_the_codes_share_costs_nothing(isa):
    # Without centring float32 tells none of these codes from another: every row would be scanned.
    x, codebook = gaussian(2000, 500, 64)
    _, rescored, scanned = lookup(x.double() + 1e4, codebook.double() + 1e4)
    assert rescored < few(isa, 64) * len(x)
    assert scanned == 0


@pytest.mark.parametrize("size", [1e6, 1e25])
def test_one_huge_code_spoils_no_row(size, isa):
    x, codebook = gaussian(2000, 1000, 16)
    codebook[500] *= size
    _, rescored, scanned = lookup(x, codebook)
    assert rescored < few(isa, 16) * len(x)
    assert scanned == 0


def last_bits(codebook, n):
    """n codes for each, as far from it as a last bit here and there."""
    flips = torch.randint(2, (n, *codebook.shape), generator=torch.Generator().manual_seed(n)) == 1
    return torch.where(flips, codebook.nextafter(torch.tensor(torch.inf)), codebook).flatten(0, 1)


def test_pairs_of_nearly_equal_codes_are_rescored_not_scanned(isa):
    x, codebook = gaussian(500, 300, 32)
    _, rescored, scanned = lookup(x, last_bits(codebook, 2))
    assert rescored > 0.9 * len(x)
    assert scanned == 0


def test_crowds_of_nearly_equal_codes_are_listed_larger_ones_scanned(isa):
    x, codebook = gaussian(300, 8, 32)
    for n, counts in ((100, (300, 0)), (400, (0, 300))):
        codes = last_bits(codebook, n)
        indices, rescored, scanned = lookup(x, codes)
        assert (rescored, scanned) == counts
        assert torch.equal(indices, oracle.nearest(x, codes))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_equal_codes_cost_nothing(dtype, isa):
    x, codebook = gaussian(500, 300, 32)
    codebook = codebook.to(dtype)
    for repeated in (
        codebook.repeat(3, 1),
        codebook.repeat_interleave(20, 0),
        codebook.repeat(1, 2)[:, ::2].repeat(3, 1),
    ):
        for metric in ("euclidean", "cosine", "dot"):
            _, rescored, scanned = lookup(x, repeated, metric)
            assert rescored < few(isa, 32) * len(x)
            assert scanned == 0
    indices, rescored, scanned = lookup(x, codebook[:1].expand(1000, 32))
    assert not indices.any()
    assert (rescored, scanned) == (0, 0)


def test_equal_codes_are_one_code_however_their_samples_look(isa):
    # All norms alike, few values: the table of codes seen is short of tells.
    x = gaussian(300, 1, 64)[0]
    signs = torch.randint(2, (500, 64), generator=torch.Generator().manual_seed(1)).float() * 2 - 1
    codebook = signs[torch.randint(500, (2000,), generator=torch.Generator().manual_seed(2))]
    indices, _, scanned = lookup(x, codebook)
    assert torch.equal(indices, oracle.nearest(x, codebook))
    assert scanned == 0


def test_fast_never_scores_by_the_definition(isa):
    x, codebook = gaussian(300, 40, 32)
    assert lookup(x, torch.cat([codebook, codebook]), fast=True)[1:] == (0, 0)


@pytest.mark.parametrize("metric", ["euclidean", "cosine", "dot"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_crowds_are_distinguished(metric, dtype, isa):
    """Rows that every filter leaves with too many codes: by a list, by double alone, or by the definition."""
    x, codebook = (t.to(dtype) for t in gaussian(100, 9, 37))
    crowd = last_bits(codebook, 50)
    crowd[7], crowd[11, 3], crowd[13] = 0, torch.nan, 1e-200 if dtype == torch.float64 else 1e-30
    for rows in (x, x * 1e-5, crowd[:100] * 2, torch.cat([x[:3], x[:1] * torch.nan, crowd[20:21] * 1e30])):
        for codes in (crowd, crowd[:, ::2], torch.cat([crowd, crowd.flip(0)]), crowd + 1e6):
            got = lookup(rows[:, : codes.shape[1]], codes, metric)[0]
            assert torch.equal(got, oracle.nearest(rows[:, : codes.shape[1]], codes, metric))
