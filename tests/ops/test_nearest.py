"""fastvq.ops.nearest against the NumPy oracle, on every backend and instruction set of this machine."""

import functools

import pytest
import torch

import fastvq
from fastvq.ops import nearest
from tests.conftest import CPU_ENGINES, ENGINES
from tests.support import oracle
from tests.support.cases import DTYPES, HARD, METRICS, SIZES, gaussian, generator

pytestmark = pytest.mark.every_isa


def check(x, codebook, metric, backend, expected=None):
    got = nearest(x, codebook, metric=metric, backend=backend)
    expected = oracle.nearest(x, codebook, metric) if expected is None else expected
    assert got.dtype == torch.int64 and got.shape == x.shape[:-1]
    wrong = (got != expected).nonzero()
    assert not len(wrong), f"{len(wrong)} of {got.numel()} rows differ, the first at {wrong[0].tolist()}"


@functools.cache
def hard_case(case, metric, dtype):
    """(x, codebook, indices): the oracle is asked once, not once for each engine."""
    x, codebook = (t.to(dtype) for t in HARD[case](generator(0)))
    return x, codebook, oracle.nearest(x, codebook, metric)


# Narrow types round many codes to the same value, overflow to infinity and make ties by the dozen.
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("case", HARD)
def test_hard_cases(case, metric, dtype, engine):
    x, codebook, expected = hard_case(case, metric, dtype)
    check(x, codebook, metric, engine, expected)


@pytest.mark.parametrize("metric", METRICS)
def test_float64_beyond_float32(metric, engine):
    x, codebook = (t.double() for t in gaussian(65, 127, 17, generator(2)))
    for scale in (1e-300, 1e-160, 1e-60, 1e60, 1e150, 1e300):
        check(x * scale, codebook * scale, metric, engine)
    # Codes that float32 cannot tell apart.
    close = codebook[:1] + 1e-12 * codebook
    check(x, close, metric, engine)
    check(close + 1e-13, close, metric, engine)


@pytest.mark.parametrize("x_dtype", DTYPES)
@pytest.mark.parametrize("codebook_dtype", DTYPES)
def test_any_mix_of_dtypes(x_dtype, codebook_dtype, engine):
    x, codebook = gaussian(127, 65, 31, generator(3))
    for metric in METRICS:
        check(x.to(x_dtype), codebook.to(codebook_dtype), metric, engine)


@pytest.mark.parametrize("d", SIZES)
@pytest.mark.parametrize("k", SIZES)
def test_sizes(k, d, engine):
    for n in (1, 7, 65):
        x, codebook = gaussian(n, k, d, generator(n * k + d))
        check(x, codebook, "euclidean", engine)


@pytest.mark.parametrize("n", [*SIZES, 4099])
def test_number_of_rows(n, engine):
    x, codebook = gaussian(n, 65, 31, generator(n))
    for metric in METRICS:
        check(x, codebook, metric, engine)


SWEEP = 2000


@pytest.mark.parametrize("engine_name", ENGINES)
def test_random_sweep(engine_name, use_engine):
    """Sizes, dtypes, metrics, scales, offsets, duplicates and strides drawn at random."""
    backend = use_engine(engine_name)
    # The reference loops over d in Python: it gets a tenth of the cases.
    for seed in range(SWEEP // 10 if backend == "reference" else SWEEP):
        g = generator(seed)

        def draw(options, g=g):
            return options[int(torch.randint(len(options), (), generator=g))]

        n, k, d = (int(2 ** (torch.rand((), generator=g) * bits)) for bits in (8, 9, 7))
        x, codebook = gaussian(n, k, d, g)
        scale = 10.0 ** draw((-38, -20, -3, 0, 0, 0, 3, 18, 30))
        offset = draw((0, 0, 0, 1, 100, 1e4, 1e6))
        x, codebook = (x + offset) * scale, (codebook + offset) * scale
        kind = draw(("plain", "plain", "ties", "near", "integers"))
        if kind == "ties":
            codebook = codebook[torch.randint(k, (k,), generator=g)]
        elif kind == "near":
            x = codebook[torch.randint(k, (n,), generator=g)] * (1 + 1e-6 * torch.randn(n, 1, generator=g))
        elif kind == "integers":
            x, codebook = x.sign() * 2, codebook.sign()
        x, codebook = x.to(draw(DTYPES)), codebook.to(draw(DTYPES))
        layout = draw(("rows", "columns", "step"))
        if layout == "columns":
            x, codebook = x.t().contiguous().t(), codebook.t().contiguous().t()
        elif layout == "step":
            x, codebook = x.repeat_interleave(2, 0)[::2], codebook.repeat_interleave(3, 1)[:, ::3]
        try:
            check(x, codebook, draw(METRICS), backend)
        except AssertionError as error:
            raise AssertionError(f"seed {seed}: {error}") from error


def test_channel_first_and_strided_views(engine):
    g = generator(4)
    images = torch.randn(3, 17, 5, 7, generator=g)
    codebook = torch.randn(65, 17, generator=g)
    for x in (
        images.movedim(1, -1),  # [B, H, W, D], D not last in memory
        images.to(memory_format=torch.channels_last).movedim(1, -1),
        images.movedim(1, -1)[:, ::2, 1::3],  # three strides: no two walk it
        images[:, :, 0].movedim(1, -1).expand(3, 7, 17),
        images[0, :, 0, 0].expand(2, 9, 17),  # zero strides
        torch.randn(17, 9, generator=g).t(),
        torch.randn(9, 34, generator=g)[:, ::2],
        torch.randn(9, 17, generator=g).flip(1),
        torch.randn(17, generator=g),  # one vector: a scalar index
        torch.randn(0, 17, generator=g),
        torch.randn(3, 0, 17, generator=g),
    ):
        check(x, codebook, "euclidean", engine)
        check(x, codebook.t().contiguous().t(), "cosine", engine)
    row = torch.randn(17, generator=g)
    check(images.movedim(1, -1), row.expand(9, 17), "euclidean", engine)


@pytest.mark.parametrize("metric", METRICS)
def test_heads(metric, engine):
    g = generator(5)
    x, codebook = torch.randn(3, 2, 31, 17, generator=g), torch.randn(3, 65, 17, generator=g)
    codebook[1, 5] = torch.nan
    got = nearest(x, codebook, metric=metric, backend=engine)
    assert got.shape == (3, 2, 31)
    for h in range(3):
        assert torch.equal(got[h], oracle.nearest(x[h], codebook[h], metric))
    # Heads that lie inside the vectors, as after a split of the channels.
    split = torch.randn(31, 51, generator=g).view(31, 3, 17).movedim(1, 0)
    got = nearest(split, codebook, metric=metric, backend=engine)
    assert torch.equal(got[2], oracle.nearest(split[2], codebook[2], metric))
    one_vector_a_head = nearest(x[:, 0, 0], codebook, metric=metric, backend=engine)
    assert one_vector_a_head.shape == (3,)


def test_a_row_alone_and_in_a_batch(engine):
    x, codebook = gaussian(300, 127, 65, generator(6))
    x, codebook = x.bfloat16().float(), codebook.bfloat16().float()
    together = nearest(x, codebook, backend=engine)
    for n in (0, 1, 7, 8, 150, 299):
        assert nearest(x[n], codebook, backend=engine) == together[n]
        assert torch.equal(nearest(x[n:], codebook, backend=engine), together[n:])


@pytest.mark.parametrize("engine_name", CPU_ENGINES)
def test_scores_beyond_two_to_the_31(engine_name, use_engine):
    # N * K = 2.2e9 scores. Every row is one of few, so the oracle has little to do.
    backend = use_engine(engine_name)
    few, codebook = gaussian(17, 1100, 1, generator(7))
    which = torch.randint(17, (2_000_003,), generator=generator(8))
    expected = oracle.nearest(few, codebook)[which]
    assert torch.equal(nearest(few[which], codebook, backend=backend), expected)


@pytest.mark.parametrize("metric", METRICS)
def test_threads_do_not_change_the_result(metric, engine, threads):
    x, codebook = gaussian(5000, 257, 33, generator(9))
    x[17] = torch.nan
    threads(1)
    one = nearest(x, codebook, metric=metric, backend=engine)
    for n in (2, 7):
        threads(n)
        assert torch.equal(nearest(x, codebook, metric=metric, backend=engine), one)


@pytest.mark.parametrize("engine_name", CPU_ENGINES)
def test_flushing_denormals_does_not_change_the_result(engine_name, use_engine):
    backend = use_engine(engine_name)
    x, codebook = HARD["denormals"](generator(10))
    expected = oracle.nearest(x, codebook)
    if not torch.set_flush_denormal(True):
        pytest.skip("this machine cannot flush denormals")
    try:
        got = nearest(x, codebook, backend=backend)
    finally:
        torch.set_flush_denormal(False)
    assert torch.equal(got, expected)


@pytest.mark.parametrize("metric", METRICS)
def test_fast_returns_a_code_as_near_as_the_filter_tells(metric, engine):
    x, codebook = gaussian(500, 300, 64, generator(11))
    got = nearest(x, codebook, metric=metric, precision="fast", backend=engine)
    exact = oracle.nearest(x, codebook, metric)
    d = torch.from_numpy(oracle.distances(x.double().numpy(), codebook.double().numpy(), metric))
    gap = d.gather(1, got[:, None]) - d.gather(1, exact[:, None])
    # Twice the error of a float32 sum of D products of these sizes, and of the D + 2 roundings around it. On matrix
    # tiles both operands are rounded to bfloat16, 2^-8 each; as 16-bit integers each element is off by half a unit, and
    # a vector is 2^14 units long or more. A score is half a distance, 4 |x| |c| <= (|x| + |c|)^2.
    scale = ((x.double().norm(dim=1) + codebook.double().norm(dim=1).max()) ** 2)[:, None]
    isa = fastvq.build_info()["cpu"]["isa"] if engine == "cpu" else None
    operands = {"amx": 2**-8, "emulated": 2**-8, "avx512_vnni": 64**0.5 / 2**14}.get(isa, 0)
    assert (gap <= 2 * (operands + (64 + 3) * 2**-24) * scale).all()
    x[3] = torch.nan
    codebook[5] = torch.inf
    assert nearest(x, codebook, metric=metric, precision="fast", backend=engine)[3] == 0


def test_gradients_do_not_flow_through_indices(engine):
    x, codebook = (t.requires_grad_() for t in gaussian(7, 5, 3, generator(12)))
    assert not nearest(x, codebook, backend=engine).requires_grad


def test_check_finite(engine):
    x, codebook = gaussian(6, 5, 3, generator(13))
    nearest(x, codebook, check_finite=True, backend=engine)
    x = x.view(2, 3, 3)
    x[1, 2, 0] = torch.inf
    with pytest.raises(ValueError, match=r"x must be finite .* 1 of 6 vectors, the first at \(1, 2\)"):
        nearest(x, codebook, check_finite=True, backend=engine)
