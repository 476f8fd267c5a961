"""Statistics per code and their moving average: the CUDA kernels against the definitions, in this process and under
sanitizers."""

import numpy as np
import pytest
import torch

from fastvq.backends import views
from fastvq.ops import code_statistics, ema_update_, replace_dead_codes_
from fastvq.ops.statistics import reference
from tests.cuda_on_host import host
from tests.support.cases import DTYPES, generator
from tests.support.tolerance import assert_within, gamma, roundoff

# Ways to add, and the shared memory of a card that takes them: that of the sort is too small for any owner.
LIMITS = {"owners": host.SHARED_LIMIT, "sorted": 9 << 10, "atomics": host.SHARED_LIMIT}
# N, K, D: owners fit up to 1650 codes, a key of the sort is one byte or two, columns 32, 64, 128 or several tiles.
SIZES = ((1, 1, 1), (7, 3, 2), (131, 17, 33), (257, 300, 5), (300, 7, 65), (130, 2, 129))


@pytest.fixture(params=LIMITS)
def way(request, cuda_on_host):
    """Options of a call that takes this way to add."""
    with host.shared_limit(LIMITS[request.param]):
        yield {"deterministic": request.param != "atomics"}


def exact(x, indices, n_codes):
    """Sums in float64, sums of magnitudes, counts."""
    rows, index = x.reshape(-1, x.shape[-1]).double(), indices.reshape(-1)
    used = (index >= 0) & rows.isfinite().all(-1)
    rows, index = rows[used], index[used]
    sums, sizes = (torch.zeros(n_codes, x.shape[-1], dtype=torch.float64) for _ in range(2))
    return sums.index_add_(0, index, rows), sizes.index_add_(0, index, rows.abs()), index.bincount(minlength=n_codes)


def check(sums, counts, x, indices, n_codes, deterministic=True):
    """Doubles that are added in any order and rounded once to the type of sums; with atomics, in that type. The
    expected sum has an error of its own."""
    expected, sizes, n = exact(x, indices, n_codes)
    assert torch.equal(counts.reshape(-1), n)
    most = max(1, int(n.max()))
    bound = 2 * gamma(most, torch.float64) * sizes
    if not deterministic:
        bound += gamma(most, sums.dtype) * sizes
    if sums.dtype == torch.float32:
        bound += roundoff(torch.float32) * expected.abs() * (1 + 2.0**-20)
    assert_within(sums.reshape(expected.shape), expected, bound)


def draw(n, k, d, dtype=torch.float32, seed=0, skew=False):
    g = generator(seed)
    x, indices = torch.randn(n, d, generator=g).to(dtype), torch.randint(-1, k, (n,), generator=g)
    if skew:
        indices = torch.where(torch.rand(n, generator=g) < 0.95, k // 2, indices)
    if n > 100:
        x[3, 0], x[50, d - 1], x[99] = torch.nan, -torch.inf, torch.inf
    return x, indices


@pytest.mark.parametrize(("n", "k", "d"), SIZES)
def test_statistics(n, k, d, way):
    for skew, dtype in ((False, torch.float32), (True, torch.float32), (True, DTYPES[n % 4])):
        x, indices = draw(n, k, d, dtype, n + k, skew)
        sums, counts = code_statistics(x, indices, k, backend="cuda", **way)
        check(sums, counts, x, indices, k, **way)
        if way["deterministic"]:
            again = code_statistics(x, indices, k, backend="cuda", **way)
            assert torch.equal(sums, again[0])


def test_a_code_over_many_pieces(way):
    x, indices = draw(3000, 5, 3, skew=True)
    x[64:2000] = 1  # whole pieces of one code
    indices[64:2000] = 2
    sums, counts = code_statistics(x, indices, 5, backend="cuda", **way)
    check(sums, counts, x, indices, 5, **way)


def test_layouts_and_heads(way):
    g = generator(1)
    images = torch.randn(3, 35, 5, 7, generator=g)
    for x in (
        images.movedim(1, -1),
        images.movedim(1, -1)[:, ::2, 1::3],
        images[:1, :, :1].movedim(1, -1).expand(2, 4, 7, 35),
    ):
        indices = torch.randint(-1, 17, x.shape[:-1], generator=g)
        check(*code_statistics(x, indices, 17, backend="cuda", **way), x, indices, 17, **way)
    x = torch.randn(40, 3 * 11, generator=g).view(40, 3, 11).transpose(0, 1)
    x[2, 7, 3] = torch.nan
    indices = torch.randint(-1, 17, (3, 40), generator=g)
    sums, counts = code_statistics(x, indices, 17, n_heads=3, backend="cuda", **way)
    for h in range(3):
        check(sums[h], counts[h], x[h], indices[h], 17, **way)


def test_nothing_to_add(way):
    for n in (0, 40):
        x, indices = torch.full((n, 5), torch.nan), torch.zeros(n, dtype=torch.int64)
        sums, counts = code_statistics(x, indices, 7, backend="cuda", **way)
        assert not sums.any() and not counts.any()


def buffers(k, d, g, heads=(), dtype=torch.float32):
    codebook = torch.randn(*heads, k, d, generator=g, dtype=dtype)
    size = torch.rand(*heads, k, generator=g, dtype=dtype)
    size[..., : k // 2] = 0
    return codebook, torch.randn(codebook.shape, generator=g, dtype=dtype), size


def check_update(ours, expected):
    """Sizes and sums to the bit; the total of the sizes may be added in another order, which moves a divisor, and a
    quotient of it is rounded once."""
    codebook, embed_sum, cluster_size = expected
    assert torch.equal(ours[1], embed_sum) and torch.equal(ours[2], cluster_size)
    u = roundoff(codebook.dtype)
    assert_within(
        ours[0], codebook, (2 * u + 4 * gamma(codebook.shape[-2] + 4, torch.float64)) * codebook.double().abs()
    )


@pytest.mark.parametrize("smoothing", ["laplace", "none"])
@pytest.mark.parametrize("debias", [False, True])
def test_update(smoothing, debias, cuda_on_host):
    g = generator(2)
    for (k, d), dtype in (
        ((1, 1), torch.float32),
        ((7, 3), torch.float64),
        ((65, 31), torch.float32),
        ((700, 9), torch.float64),
    ):
        for sums_dtype in (torch.float32, torch.float64):
            ours = buffers(k, d, g, dtype=dtype)
            if debias:
                ours[1][: k // 2] = torch.nan  # what no size stands for is not read
            theirs = tuple(t.clone() for t in ours)
            sums, counts = torch.randn(k, d, generator=g, dtype=sums_dtype), torch.randint(0, 3, (k,), generator=g)
            counts[0] = 1
            options = {"decay": 0.97, "smoothing": smoothing, "debias": debias}
            ema_update_(*ours, sums, counts, backend="cuda", **options)
            ema_update_(*theirs, sums, counts, backend="reference", **options)
            if debias:
                untouched = torch.isnan(theirs[1])
                assert torch.equal(untouched, torch.isnan(ours[1])) and not untouched.any()
            check_update(ours, theirs)


def test_update_of_heads_and_strides(cuda_on_host):
    g = generator(3)
    ours = buffers(17, 5, g, (3,))
    sums, counts = torch.randn(3, 17, 5, generator=g), torch.randint(0, 9, (3, 17), generator=g)
    counts[1] = 0
    expected = tuple(t.clone() for t in ours)
    strided = (
        torch.empty(3, 5, 17).transpose(1, 2).copy_(ours[0]),
        torch.empty(3, 17, 10)[..., ::2].copy_(ours[1]),
        torch.empty(17, 3).t().copy_(ours[2]),
    )
    ema_update_(*strided, sums, counts, decay=0.8, backend="cuda")
    ema_update_(*expected, sums, counts, decay=0.8, backend="reference")
    check_update(strided, expected)
    assert torch.equal(strided[0][1], ours[0][1]), "a head that counted nothing changed"


def starved(n, k, d, heads, dtype):
    """Buffers with dead codes, and x [H, N, D] some of whose rows, or all of the first head's, are no vectors."""
    g = generator(n + k + d)
    start = buffers(k, d, g, heads)
    start[2].uniform_(generator=g)
    x = torch.randn(*heads, d, n, generator=g).to(dtype).transpose(-1, -2)
    x[..., ::3, 0] = torch.nan
    x[..., 1::7, d - 1] = torch.inf
    if heads:
        x[0] = torch.nan
    return start, x


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads,n,k,d", [((), 1, 3, 2), ((), 40, 65, 17), ((2,), 70, 33, 5), ((3,), 9, 7, 130)])
def test_replacement_equals_the_reference_to_the_bit(heads, n, k, d, dtype, cuda_on_host):
    start, x = starved(n, k, d, heads, dtype)
    for rows in (x, x.contiguous(), x[..., :0, :]):
        results = []
        for backend in ("reference", "cuda"):
            ours = tuple(t.clone() for t in start)
            replaced = replace_dead_codes_(*ours, rows, threshold=0.6, generator=generator(1), backend=backend)
            results.append((*ours, replaced))
        assert all(map(torch.equal, *results))


@pytest.mark.parametrize("kind", host.SANITIZERS)
def test_replacement_under_sanitizers(kind, tmp_path):
    calls, expected = host.Calls(), []
    for n, k, d in ((1, 3, 2), (70, 17, 33)):
        start, x = starved(n, k, d, (1,), torch.float32)
        uniforms = torch.rand(1, k, generator=generator(1))
        usable = x.isfinite().all(-1)
        rank, dead = usable.cumsum(-1), start[2] < 0.6
        _, rows = views.rows_view(x, 1)
        view = views.ema_view(*start)
        calls.add(
            "replace_dead_codes",
            [x.transpose(1, 2).contiguous().numpy(), np.full(n, 9, np.uint8),
             *map(host.as_bytes, (*start, rank, dead, dead.cumsum(-1), uniforms.double()))],
            [host.Buffer(0), *rows[1:], host.Buffer(1), *view[:4], *map(host.Buffer, (2, 3, 4)), *view[7:],
             *map(host.Buffer, (5, 6, 7, 8)), 0.6],
        )  # fmt: skip
        reference.replace_dead_codes_(*start, x, uniforms, 0.6)
        expected.append((usable, *start))
    for results, right in zip(calls.run(kind, tmp_path), expected, strict=True):
        for data, t in zip(results[1:5], right, strict=True):
            assert torch.equal(torch.frombuffer(bytearray(data), dtype=t.dtype).view(t.shape), t)


@pytest.mark.parametrize("kind", host.SANITIZERS)
def test_under_sanitizers(kind, tmp_path):
    calls, checks = host.Calls(), []
    # ThreadSanitizer is ten times slower, and a race shows at any size that fills a block: every other one for it.
    for i, (n, k, d) in enumerate(SIZES if kind == "address" else SIZES[::2]):
        x, indices = draw(n, k, d, DTYPES[i % 4], i, skew=i % 2 == 0)
        _, rows = views.rows_view(x, None)
        double = x.dtype == torch.float64
        for way, limit in LIMITS.items():
            deterministic = way != "atomics"
            with host.shared_limit(limit):
                workspace = host.module().code_statistics_workspace(rows, k, deterministic)
            wide = torch.float64 if double else torch.float32
            sums, counts = torch.full((k, d), torch.nan, dtype=wide), torch.full((k,), -9)
            calls.add("shared_limit", [], [limit])
            calls.add(
                "code_statistics",
                [*map(host.as_bytes, (x, indices, sums, counts)), np.full(workspace, 0xFF, np.uint8)],
                [host.Buffer(0), *rows[1:], host.Buffer(1), k, deterministic, host.Buffer(2), double, host.Buffer(3),
                 host.Buffer(4)],
            )  # fmt: skip
            checks.append(None)
            checks.append((x, indices, k, deterministic, wide))
    for results, case in zip(calls.run(kind, tmp_path), checks, strict=True):
        if case is not None:
            x, indices, k, deterministic, wide = case
            sums = torch.frombuffer(bytearray(results[2]), dtype=wide).view(k, -1)
            check(sums, torch.frombuffer(bytearray(results[3]), dtype=torch.int64), x, indices, k, deterministic)


@pytest.mark.parametrize("kind", host.SANITIZERS)
def test_update_under_sanitizers(kind, tmp_path):
    calls, expected = host.Calls(), []
    g = generator(4)
    for heads, k, d in ((1, 1, 1), (3, 17, 5), (1, 300, 33)):
        theirs = buffers(k, d, g, (heads,))
        sums, counts = torch.randn(heads, k, d, generator=g), torch.randint(0, 9, (heads, k), generator=g)
        counts[0, 0] = 1
        view = views.ema_view(*theirs)
        workspace = np.full(host.module().ema_update_workspace(view), 0xFF, np.uint8)
        calls.add(
            "ema_update",
            [*map(host.as_bytes, (*theirs, sums, counts)), workspace],
            [*view[:4], *map(host.Buffer, (0, 1, 2)), *view[7:], host.Buffer(3), False, host.Buffer(4), 0.9, 1e-5, True,
             False, host.Buffer(5)],
        )  # fmt: skip
        ema_update_(*theirs, sums, counts, decay=0.9, backend="reference")
        expected.append(theirs)
    for results, theirs in zip(calls.run(kind, tmp_path), expected, strict=True):
        ours = [
            torch.frombuffer(bytearray(r), dtype=t.dtype).view(t.shape) for r, t in zip(results, theirs, strict=False)
        ]
        check_update(ours, theirs)
