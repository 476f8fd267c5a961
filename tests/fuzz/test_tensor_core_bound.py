"""The error bound of tensor cores, on models of the matrix instructions of ten GPU generations.

``pytest -s`` prints the largest share of the bound that a product used; ``--fuzz=200000`` tries a million of each.
"""

import pytest
import torch

from fastvq.backends import triton as triton_backend
from tests.fuzz import tensor_cores

triton_pack = pytest.importorskip("fastvq.ops.nearest.triton_pack", reason="the bound's factor is in a Triton module")

pytestmark = pytest.mark.skipif(tensor_cores.missing() is not None, reason=str(tensor_cores.missing()))
LEAST, PER_EXAMPLE = 10_000, 5  # products of each instruction and generation; more with --fuzz
TRIED: dict[tuple[str, int], tensor_cores.Worst] = {}  # generations that compute the same are tried once


@pytest.fixture
def n_products(request):
    return max(LEAST, PER_EXAMPLE * request.config.getoption("--fuzz", default=0))


@pytest.fixture(autouse=True)
def _one_thread(threads):
    threads(1)


@pytest.mark.parametrize("name", tensor_cores.INSTRUCTIONS)
def test_products_stay_within_the_bound(name, n_products):
    largest = 0.0
    for instruction in tensor_cores.load(name):
        key = (instruction.arithmetic, n_products)
        if key not in TRIED:
            TRIED[key] = tensor_cores.worst_ratio(instruction, n_products, triton_pack.gamma)
        worst = TRIED[key]
        print(f"{name}, {instruction.generation}: {worst.ratio:.3f} of the bound in {worst.n_products} products")
        assert worst.ratio <= 1, worst.example
        largest = max(largest, worst.ratio)
    assert largest >= 0.05, "a bound that nothing comes near is not tested"


@pytest.mark.parametrize("name", tensor_cores.INSTRUCTIONS)
def test_a_smaller_bound_is_found_out(name):
    worst = [
        tensor_cores.worst_ratio(i, LEAST // 10, lambda width: triton_pack.gamma(width) / 20)
        for i in tensor_cores.load(name)
    ]
    assert max(w.ratio for w in worst) > 1


def test_cuda_and_triton_have_one_bound():
    gamma = tensor_cores.gamma_of_cuda_sources()
    assert [gamma(width) for width in range(16, 4097, 16)] == [
        triton_pack.gamma(width) for width in range(16, 4097, 16)
    ]


@pytest.mark.skipif(not triton_backend.interpreting(), reason="packs operands on the CPU, in Triton's interpreter")
@pytest.mark.parametrize("name", ["mma.sync fp16", "wgmma fp16", "tcgen05.mma fp16"])
def test_operands_of_the_triton_filter_give_upper_bounds(name):
    """Codes of subnormal numbers, which rounding to float16 leaves as they are: nothing but gamma covers the sum."""
    from fastvq.ops.nearest import triton_ops

    x, codebook = subnormal_codes(1024)
    packed = triton_ops.pack(codebook[None], 2, False, False, {"BN": 64, "BD": 64})
    rows = triton_ops.pack_rows(x[None], packed)
    scale = rows.scales[0].double()[:, None] * packed.factors[0, : len(codebook)].double()
    exact = (x.double() @ codebook.double().T) * scale
    pairs = [(r, k) for r in range(len(x)) for k in range(len(codebook))]
    r, k = (torch.tensor(side) for side in zip(*pairs, strict=True))
    for instruction in tensor_cores.load(name):
        upper = instruction.evaluate(rows.columns[0, r], packed.columns[0, k], torch.zeros(len(pairs)))
        upper = instruction.evaluate(rows.rows[0, r], packed.codes[0, k], upper)
        assert (upper.double() >= exact[r, k]).all(), instruction.generation


def subnormal_codes(width):
    """One row, and codes of which the last four are subnormal in float16 once the others have set the scale, to 4.

    Every eighth product is the largest that a subnormal number takes part in; the others end below the bits that are
    kept beside it, and have one sign.
    """
    x = torch.full((1, width), (2 - 2.0**-10) * 2.0**-12)
    x[:, ::8] = 15.984375
    codebook = torch.full((64, width), -4 / width**0.5)
    codebook[60:] = 2.0**-26
    codebook[62:, ::8] *= torch.where(torch.arange(width // 8) % 2 == 0, 1.0, -1.0)
    return x, codebook
