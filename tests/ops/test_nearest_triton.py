"""The Triton lookup in Triton's interpreter: exact on every hard case, its bound neither wrong nor empty."""

import pytest
import torch

pytest.importorskip("triton", reason="needs the package triton")
if torch.cuda.is_available():
    pytest.skip("the interpreter is used where there is no GPU", allow_module_level=True)
from fastvq.backends.tiles import Tile, pick
from fastvq.ops import nearest
from fastvq.ops.nearest import triton_ops as kernels
from fastvq.ops.nearest import triton_tiles
from fastvq.ops.nearest.triton_pack import FIRST_DATA
from tests.support import oracle
from tests.support.cases import DTYPES, HARD, METRICS, gaussian, generator

# NumPy warns of what the kernels are made for: NaN, infinity, squares that overflow.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

# Rows kept of the cases that are long; what makes a case hard is in every row of these.
FEWER = {
    "duplicate_codes": 32,
    "last_bit_apart": 32,
    "collapsed_codebook": 64,
    "mean_offset": 32,
    "mean_offset_of_codes_only": 32,
    "one_huge_code": 64,
    "overflow_in_float32": 16,
    "denormal_products": 16,
    "wide_vectors": 2,
    "many_codes_of_width_eight": 64,
    "clusters": 128,
}


@pytest.fixture(autouse=True)
def _filter_even_small_codebooks(monkeypatch):
    monkeypatch.setattr(kernels, "MIN_FILTERED_SCORES", 0)


@pytest.fixture
def large_tiles(monkeypatch):
    """The interpreter's time is the number of steps: few and large ones."""
    meta = {"BM": 256, "BN": 1024, "BD": 1024, "GROUP": 8, "num_warps": 4, "num_stages": 1}
    tiles = [Tile(80, triton_tiles.WIDEST, dtype, meta) for dtype in (torch.float16, torch.bfloat16)]
    monkeypatch.setattr(kernels, "TILES", tiles)


@pytest.fixture
def listed(monkeypatch):
    """[rows that the filter did not prove, rows scanned] of each slab that was looked up."""
    found = []
    lookup_slab = kernels.lookup_slab

    def spy(*args):
        counters = lookup_slab(*args)
        found.append(counters.sum(0).tolist())
        return counters

    monkeypatch.setattr(kernels, "lookup_slab", spy)
    return found


def check(x, codebook, metric="euclidean"):
    got = nearest(x, codebook, metric=metric, backend="triton")
    expected = oracle.nearest(x, codebook, metric)
    assert got.dtype == torch.int64 and got.shape == x.shape[:-1]
    wrong = (got != expected).nonzero()
    assert not len(wrong), f"{len(wrong)} of {got.numel()} rows differ, the first at {wrong[0].tolist()}"


# float32 with every metric; the other dtypes, which differ in how operands are packed, with one metric a case in turn:
# every pair of case and metric, of case and dtype, and of dtype and metric.
COMBINED = [
    (case, metric, dtype)
    for i, case in enumerate(HARD)
    for j, dtype in enumerate(DTYPES)
    for metric in (METRICS if dtype == torch.float32 else [METRICS[(i + j) % len(METRICS)]])
]


@pytest.mark.parametrize("case,metric,dtype", COMBINED)
@pytest.mark.usefixtures("large_tiles")
def test_hard_cases(case, metric, dtype):
    x, codebook = (t.to(dtype) for t in HARD[case](generator(0)))
    check(x[: FEWER.get(case)], codebook, metric)


@pytest.mark.parametrize("dim", [1, 7, 11, 12, 31, 65, 127, 257])
def test_shipped_tiles_at_ugly_sizes(dim):
    x, codebook = gaussian(131, 137, dim, generator(dim))
    check(x, codebook)
    check(x[:1].bfloat16(), codebook[:3].bfloat16())


@pytest.mark.usefixtures("large_tiles")
def test_any_mix_of_dtypes():
    x, codebook = gaussian(65, 65, 31, generator(3))
    for x_dtype in DTYPES:
        for codebook_dtype in DTYPES:
            if x_dtype != codebook_dtype:
                check(x.to(x_dtype), codebook.to(codebook_dtype))


@pytest.mark.usefixtures("large_tiles")
def test_strides_heads_and_empty_input():
    g = generator(4)
    images, codebook = torch.randn(3, 17, 5, 7, generator=g), torch.randn(65, 17, generator=g)
    for x in (
        images.movedim(1, -1)[:, ::2, 1::3],
        torch.randn(17, 9, generator=g).t(),
        torch.randn(9, 34, generator=g)[:, ::2],
        images[0, :, 0, 0].expand(2, 9, 17),
        torch.randn(17, generator=g),
        torch.randn(3, 0, 17, generator=g),
    ):
        check(x, codebook.t().contiguous().t())
    x, heads = torch.randn(3, 2, 31, 17, generator=g), torch.randn(3, 65, 17, generator=g)
    heads[1, 5] = torch.nan
    got = nearest(x, heads, metric="cosine", backend="triton")
    assert all(torch.equal(got[h], oracle.nearest(x[h], heads[h], "cosine")) for h in range(3))
    split = torch.randn(31, 51, generator=g).view(31, 3, 17).movedim(1, 0)
    got = nearest(split, heads, backend="triton")
    assert torch.equal(got[2], oracle.nearest(split[2], heads[2]))


@pytest.mark.usefixtures("large_tiles")
def test_a_row_alone_and_in_a_batch_and_slabs(monkeypatch):
    x, codebook = gaussian(300, 127, 33, generator(6))
    x, codebook = x.bfloat16().float(), codebook.bfloat16().float()
    together = nearest(x, codebook, backend="triton")
    assert torch.equal(together, oracle.nearest(x, codebook))
    for n in (0, 150, 299):
        assert nearest(x[n], codebook, backend="triton") == together[n]
    monkeypatch.setattr(kernels, "ROWS_A_SLAB", 256)
    assert torch.equal(nearest(x, codebook, backend="triton"), together)


def test_few_scores_go_to_the_definition(monkeypatch, listed):
    monkeypatch.setattr(kernels, "MIN_FILTERED_SCORES", 1 << 12)
    x, codebook = gaussian(70, 7, 31, generator(7))
    x[5], codebook[2] = torch.nan, torch.inf
    check(x, codebook, "dot")
    assert listed == []


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.usefixtures("large_tiles")
def test_gaussian_rows_are_proved(metric, listed):
    for dtype, dim, share in ((torch.float32, 8, 0.1), (torch.float32, 64, 0.1), (torch.bfloat16, 64, 0.1)):
        x, codebook = (t.to(dtype) for t in gaussian(500, 1000, dim, generator(dim)))
        check(x, codebook, metric)
        (open_rows, scanned) = listed.pop()
        assert open_rows <= share * len(x) and scanned == 0


@pytest.mark.usefixtures("large_tiles")
def test_what_leads_to_the_lists(listed):
    x, codebook = gaussian(60, 300, 32, generator(8))
    check(x + 1e4, codebook + 1e4)  # centred: proved all the same
    check(x, torch.cat([codebook, codebook]))  # pairs: two candidates each
    check(x, codebook[:1].expand(1000, 32))  # too many candidates
    huge = codebook.clone()
    huge[150] *= 1e20
    check(x, huge)  # one huge code spoils no row
    x[7] = torch.inf
    check(x, codebook)
    assert listed[0][0] < 6 and listed[0][1] == 0
    assert listed[1] == [60, 0] and listed[2] == [60, 60]
    assert listed[3][0] < 6 and listed[3][1] == 0
    assert listed[4][1] == 1


@pytest.mark.parametrize("metric", METRICS)
def test_fast_returns_a_code_as_near_as_16_bits_tell(metric, listed):
    x, codebook = gaussian(200, 300, 64, generator(11))
    got = nearest(x, codebook, metric=metric, precision="fast", backend="triton")
    d = torch.from_numpy(oracle.distances(x.double().numpy(), codebook.double().numpy(), metric))
    exact = oracle.nearest(x, codebook, metric)
    gap = (d.gather(1, got[:, None]) - d.gather(1, exact[:, None]))[:, 0]
    # Two errors of a product of operands rounded to 2^-11 each, doubled where the bound itself rides in the score.
    size = x.double().norm(dim=1) * (1 if metric == "cosine" else codebook.double().norm(dim=1).max())
    assert (gap <= 2 * 4 * 2 * 2.0**-11 * size).all()
    assert listed == [[0, 0]]
    x[3] = torch.nan
    assert nearest(x, codebook, metric=metric, precision="fast", backend="triton")[3] == 0


BOUNDED = ("gaussian", "mean_offset", "collapsed_codebook", "one_huge_code", "every_rounding_one_way", "clusters")


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("case", BOUNDED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_bound_holds_and_says_something(case, metric, dtype):
    """t <= upper <= t + 2 E for every score: what the product returns is t^ + E with |t^ - t| <= E."""
    x, codebook = gaussian(100, 300, 64, generator(9)) if case == "gaussian" else HARD[case](generator(9))
    x, codebook = x[:100].to(dtype), codebook.to(dtype)
    if case == "one_huge_code" and metric == "dot":
        codebook[13] /= 1e30  # a score that no float32 holds: such a codebook is not the filter's
    code, is_bf16 = kernels.METRICS[metric], dtype == torch.bfloat16
    meta = pick("nearest", triton_tiles.TILES, x.device, x.shape[1], torch.bfloat16 if is_bf16 else torch.float16)
    packed = kernels.pack(codebook[None], code, is_bf16, code != 1 and not is_bf16, meta)
    rows = kernels.pack_rows(x[None], packed)
    held = packed.norms[0, : len(codebook)] >= 0
    good = rows.norms[0] >= 0
    assert held.any() and good.any()
    left = torch.cat([rows.columns[0], rows.rows[0]], 1).double()[good]
    right = torch.cat([packed.columns[0], packed.codes[0]], 1).double()[: len(codebook)][held]
    mean = packed.mean[0].double()
    c = codebook.double()[held]
    norm = c.norm(dim=1, keepdim=True)
    c = (c / norm if metric == "cosine" else c - mean) * packed.info[0, 0].double()
    y = (x.double()[good] - (mean if metric == "euclidean" else 0)) * rows.scales[0].double()[good, None]
    exact = y @ c.T - (0.5 * c.square().sum(1) if metric == "euclidean" else 0)
    upper = left @ right.T
    # The bound's two norms are columns 3 and 4; what it adds to the bias is what the pieces exceed -|c'|^2 / 2 by.
    bias = left[:, :3] @ right[:, :3].T + (0.5 * c.square().sum(1) if metric == "euclidean" else 0)
    bound = left[:, 3 : FIRST_DATA.value] @ right[:, 3 : FIRST_DATA.value].T + bias
    ratio = ((upper - bound) - exact).abs() / bound
    assert ratio.max() <= 1
    # Operands that 16 bits hold exactly leave the tensor cores' own part of the bound, which float64 does not use.
    exact_operands = dtype == torch.bfloat16 or case == "every_rounding_one_way"
    assert exact_operands or ratio.max() >= 0.05
