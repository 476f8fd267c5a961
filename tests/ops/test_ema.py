"""The moving average of a codebook and the replacement of its dead codes."""

import pytest
import torch
from torch.library import opcheck

from fastvq.ops import code_statistics, ema_update_, nearest, replace_dead_codes_
from tests.support.cases import generator
from tests.support.tolerance import assert_within, roundoff


def buffers(k, d, g, heads=(), dtype=torch.float32):
    codebook = torch.randn(*heads, k, d, generator=g, dtype=dtype)
    return codebook, codebook.clone(), torch.ones(*heads, k, dtype=dtype)


def literal(codebook, embed_sum, cluster_size, x, decay, eps, smoothing):
    """Float64, one-hot, as the papers' code writes it."""
    wide = codebook.double()
    one_hot = torch.nn.functional.one_hot(torch.cdist(x.double(), wide).argmin(1), len(wide)).double()
    size = decay * cluster_size + (1 - decay) * one_hot.sum(0)
    total = decay * embed_sum + (1 - decay) * (one_hot.T @ x.double())
    n = size.sum()
    smoothed = (size + eps) / (n + len(size) * eps) * n if smoothing == "laplace" else size.clamp(min=eps)
    return total / smoothed[:, None], total, size


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("smoothing", ["laplace", "none"])
def test_a_hundred_steps_against_a_literal_one_hot_update(smoothing, dtype, engine):
    g = generator(0)
    ours = buffers(31, 17, g, dtype=dtype)
    theirs = tuple(t.clone().double() for t in ours)
    decay, eps, u = 0.9, 1e-5, roundoff(dtype)
    centres = torch.randn(31, 17, generator=g) * 3
    for _ in range(100):
        x = centres[torch.randint(31, (200,), generator=g)] + 0.1 * torch.randn(200, 17, generator=g)
        sums, counts = code_statistics(x, nearest(x, ours[0], backend=engine), 31, backend=engine)
        ema_update_(*ours, sums, counts, decay=decay, eps=eps, smoothing=smoothing, backend=engine)
        theirs = literal(*theirs, x, decay, eps, smoothing)
    # Sizes and sums: each step adds at most a rounding of the stored value and one of the batch's sum, and forgets all
    # but `decay` of what it held: below 2 u / (1 - decay) of the largest magnitude that went in.
    grown = 2 * u / (1 - decay)
    if dtype == torch.float64:  # the batch's sums are float32, x being so
        grown = grown + roundoff(torch.float32)
    assert_within(ours[2], theirs[2], grown * 200)
    scale = theirs[1].abs().max() + 200 * 12
    assert_within(ours[1], theirs[1], grown * scale)
    divisor = (theirs[2] + eps if smoothing == "laplace" else theirs[2].clamp(min=eps))[:, None]
    assert_within(ours[0], theirs[0], 2 * grown * scale / divisor + 2 * u * theirs[0].abs())


@pytest.mark.parametrize("smoothing", ["laplace", "none"])
@pytest.mark.parametrize("debias", [False, True])
def test_kernel_equals_reference_to_the_bit(smoothing, debias, engine, threads):
    g = generator(1)
    for k, d in ((1, 1), (7, 3), (65, 31), (1000, 129)):
        start = buffers(k, d, g)
        start[2][: k // 2] = 0
        sums, counts = torch.randn(k, d, generator=g), torch.randint(0, 3, (k,), generator=g)
        counts[0] = 1
        expected = tuple(t.clone() for t in start)
        options = {"decay": 0.97, "smoothing": smoothing, "debias": debias}
        ema_update_(*expected, sums, counts, backend="reference", **options)
        for n in (1, 2, 7):
            threads(n)
            ours = tuple(t.clone() for t in start)
            ema_update_(*ours, sums, counts, backend=engine, **options)
            assert all(map(torch.equal, ours, expected))


@pytest.mark.interpreted
def test_heads_and_strides(engine):
    g = generator(2)
    ours = buffers(17, 5, g, (3,))
    sums, counts = torch.randn(3, 17, 5, generator=g), torch.randint(0, 9, (3, 17), generator=g)
    counts[1] = 0
    alone = [tuple(t[h].clone() for t in ours) for h in range(3)]
    # A codebook kept as [D, K], and buffers that lie apart.
    strided = (
        torch.empty(3, 5, 17).transpose(1, 2).copy_(ours[0]),
        torch.empty(3, 17, 10)[..., ::2].copy_(ours[1]),
        torch.empty(17, 3).t().copy_(ours[2]),
    )
    ema_update_(*ours, sums, counts, decay=0.8, backend=engine)
    ema_update_(*strided, sums, counts, decay=0.8, backend=engine)
    for h in range(3):
        ema_update_(*alone[h], sums[h], counts[h], decay=0.8, backend=engine)
        assert all(
            torch.equal(a[h], b) and torch.equal(a[h], c[h]) for a, b, c in zip(ours, alone[h], strided, strict=True)
        )


@pytest.mark.interpreted
def test_a_batch_that_counted_nothing_changes_nothing(engine):
    ours = buffers(17, 5, generator(3))
    before = tuple(t.clone() for t in ours)
    x = torch.full((40, 5), torch.nan)
    statistics = code_statistics(x, nearest(x, ours[0]), 17, backend=engine)
    ema_update_(*ours, *statistics, decay=0.5, backend=engine)
    assert all(map(torch.equal, ours, before))


@pytest.mark.interpreted
def test_debias_from_sizes_of_zero(engine):
    g = generator(4)
    codebook, embed_sum, cluster_size = buffers(8, 3, g)
    cluster_size.zero_()
    start = codebook.clone()
    x = torch.randn(50, 3, generator=g)
    indices = torch.randint(0, 4, (50,), generator=g)
    for step in range(3):
        ema_update_(
            codebook, embed_sum, cluster_size, *code_statistics(x, indices, 8),
            decay=0.99, smoothing="none", debias=True, backend=engine,
        )  # fmt: skip
        assert torch.equal(codebook[4:], start[4:]), "a code without vectors moved"
        mean = torch.stack([x[indices == k].double().mean(0) for k in range(4)])
        # A few roundings a step of numbers below the largest |x|.
        assert_within(codebook[:4], mean, (6 * step + 6) * roundoff(torch.float32) * x.abs().max())
    # Without it the unused codes leave for far away, which others' checkpoints have been trained with.
    other = start.clone(), start.clone(), torch.zeros(8)
    ema_update_(*other, *code_statistics(x, indices, 8), decay=0.99, backend=engine)
    assert other[0][4:].abs().max() > 1e4


@pytest.mark.interpreted
def test_decay_zero_and_one(engine):
    ours = buffers(4, 3, generator(5))
    before = tuple(t.clone() for t in ours)
    sums, counts = torch.randn(4, 3), torch.tensor([1, 2, 3, 4])
    ema_update_(*ours, sums, counts, decay=1.0, smoothing="none", backend=engine)
    assert torch.equal(ours[1], before[1]) and torch.equal(ours[2], before[2])
    ours[1][0] = torch.nan
    ema_update_(*ours, sums, counts, decay=0.0, smoothing="none", backend=engine)
    assert torch.equal(ours[1], sums) and torch.equal(ours[2], counts.float())
    assert_within(ours[0], sums.double() / counts[:, None], roundoff(torch.float32) * sums.abs().double())


@pytest.mark.interpreted
@pytest.mark.parametrize("n", [1, 5, 300])
def test_dead_codes_take_distinct_finite_rows(n, engine):
    g = generator(6)
    ours = buffers(17, 5, g)
    ours[2][::3] = 0.1
    dead = ours[2] < 0.5
    x = torch.randn(n, 5, generator=g)
    x[::2] = torch.nan
    if n > 1:
        x[1, 3] = torch.inf
    usable = x[x.isfinite().all(-1)]
    before = tuple(t.clone() for t in ours)
    replaced = replace_dead_codes_(*ours, x.view(1, n, 5), threshold=0.5, generator=generator(7), backend=engine)
    assert replaced == (int(dead.sum()) if len(usable) else 0)
    for now, then in zip(ours, before, strict=True):
        assert torch.equal(now[~dead], then[~dead])
    if not len(usable):
        assert all(map(torch.equal, ours, before))
        return
    taken = (ours[0][dead][:, None] == usable).all(-1)
    assert taken.any(1).all(), "a code that is no vector of x"
    if len(usable) >= dead.sum():
        assert len(ours[0][dead].unique(dim=0)) == dead.sum()
    assert torch.equal(ours[1][dead], ours[0][dead] * 0.5) and (ours[2][dead] == 0.5).all()
    again = tuple(t.clone() for t in before)
    replace_dead_codes_(*again, x, threshold=0.5, generator=generator(7), backend=engine)
    assert all(map(torch.equal, again, ours))


def test_dead_codes_are_drawn_evenly(engine):
    """Each of 12 rows is taken by one of 3 codes with probability 1/4: within 5 standard deviations of it."""
    g, x, taken = generator(8), torch.arange(12.0)[:, None], torch.zeros(12)
    rounds = 600
    for _ in range(rounds):
        codebook = torch.full((3, 1), -1.0)
        replace_dead_codes_(codebook, codebook.clone(), torch.zeros(3), x, threshold=1, generator=g, backend=engine)
        taken[codebook[:, 0].long()] += 1
    assert_within(taken, torch.full((12,), rounds / 4), 5 * (rounds * 3 / 16) ** 0.5)


@pytest.mark.interpreted
def test_the_generator_advances_alike_whatever_is_dead(engine):
    x = torch.randn(20, 5)
    states = []
    for size in (0.0, 1.0):
        g, ours = generator(9), buffers(7, 5, generator(0))
        ours[2].fill_(size)
        replace_dead_codes_(*ours, x, threshold=0.5, generator=g, backend=engine)
        states.append(g.get_state())
    assert torch.equal(*states)
    assert replace_dead_codes_(*ours, x[:0], threshold=2, backend=engine) == 0


@pytest.mark.interpreted
def test_dead_codes_with_heads_and_half_precision_input(engine):
    g = generator(10)
    ours = buffers(9, 5, g, (2,))
    ours[2][1] = 0
    x = torch.randn(2, 4, 30, 5, generator=g).bfloat16()
    assert replace_dead_codes_(*ours, x, threshold=1.0, generator=g, backend=engine) == 9
    flat = x[1].reshape(-1, 5).float()
    assert (ours[0][1][:, None] == flat).all(-1).any(1).all() and ours[0].dtype == torch.float32


C, S, N1 = torch.zeros(7, 3), torch.zeros(7, 3), torch.zeros(7)
UPDATE_MISUSE = [
    ((C, S, N1, C, N1.long()), {"decay": 1.5}, ValueError, r"decay must be in \[0, 1\], got 1.5"),
    ((C, S, N1, C, N1.long()), {"eps": -1}, ValueError, r"eps must be 0 or more"),
    ((C, S, N1, C, N1.long()), {"smoothing": "l"}, ValueError, r"smoothing must be one of 'laplace', 'none', got 'l'"),
    ((C.half(), S, N1, C, N1.long()), {}, TypeError, r"must be all float32 or all float64, got codebook in"),
    ((C, S.double(), N1, C, N1.long()), {}, TypeError, r"got embed_sum in torch.float64"),
    ((C, S[:6], N1, C, N1.long()), {}, ValueError, r"embed_sum must be \[7, 3\] to match codebook \[7, 3\], got \[6"),
    ((C, S, N1[:6], C, N1.long()), {}, ValueError, r"cluster_size must be \[7\]"),
    ((C, S, N1, C[:6], N1.long()), {}, ValueError, r"sums must be \[7, 3\] to match the buffers, got \[6, 3\]"),
    ((C, S, N1, C, N1), {}, TypeError, r"sums must be float32 or float64 and counts int64"),
    ((C[0], S[0], N1[0], C, N1.long()), {}, ValueError, r"codebook must be \[K, D\] or \[H, K, D\]"),
]


@pytest.mark.parametrize("arguments,options,error,message", UPDATE_MISUSE)
def test_misuse_of_the_update(arguments, options, error, message):
    with pytest.raises(error, match="fastvq.ops.ema_update_: .*" + message):
        ema_update_(*arguments, **{"decay": 0.9, **options})


@pytest.mark.parametrize(
    "arguments,threshold,error,message",
    [
        ((C, S, N1, torch.zeros(5, 4)), 1, ValueError, r"x must be \[..., 3\] to match the codebook \[7, 3\], got"),
        ((C, S, N1, C), -1, ValueError, r"threshold must be 0 or more"),
        ((C.half(), S, N1, C), 1, TypeError, r"all float32 or all float64"),
        ((C, S, N1, C.int()), 1, TypeError, r"x must be float32"),
    ],
)
def test_misuse_of_the_replacement(arguments, threshold, error, message):
    with pytest.raises(error, match="fastvq.ops.replace_dead_codes_: .*" + message):
        replace_dead_codes_(*arguments, threshold=threshold)


@pytest.mark.interpreted
def test_as_operators(engine):
    g = generator(11)
    ours = buffers(7, 3, g)
    sums, counts, x = torch.randn(7, 3), torch.arange(7), torch.randn(9, 3)
    opcheck(torch.ops.fastvq.ema_update_.default, (*ours, sums, counts, 0.9, 1e-5, "laplace", True, engine))
    opcheck(torch.ops.fastvq.replace_dead_codes_.default, (*ours, x, torch.rand(7), 1.0, engine))

    def step(codebook, embed_sum, cluster_size, x):
        statistics = code_statistics(x, nearest(x, codebook), 7, backend=engine)
        ema_update_(codebook, embed_sum, cluster_size, *statistics, decay=0.9, backend=engine)
        return codebook + 1

    eager, compiled = (tuple(t.clone() for t in ours) for _ in range(2))
    out = step(*eager, x), torch.compile(step, fullgraph=True)(*compiled, x)
    assert torch.equal(*out) and all(map(torch.equal, eager, compiled))
