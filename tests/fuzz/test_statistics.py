"""code_statistics of any indices against float64 sums in the order of the rows."""

import numpy as np
import pytest
import torch
from hypothesis import strategies as st

from fastvq import ops
from tests.fuzz import layouts, sums
from tests.fuzz.compare import assert_same_bits
from tests.fuzz.lookup_cases import LookupCase, lookup_cases

INDEX_LAYOUTS = ("contiguous", "transposed", "sliced", "every other row")


def given_indices(case: LookupCase, x: torch.Tensor, n_codes: int, few: bool, layout: str) -> torch.Tensor:
    rng = np.random.default_rng(case.seed + 1)
    drawn = np.asarray(rng.integers(-1, 1 if few else n_codes, tuple(x.shape[:-1])))
    indices = torch.from_numpy(drawn)
    return layouts.LAYOUTS[layout](indices) if indices.dim() else indices


@pytest.mark.fuzz(weight=3)
def test_sums_and_counts(fuzz):
    def check(case, n_codes, few, layout):
        x, codes, mask = case.tensors()
        indices = given_indices(case, x, n_codes, few, layout)
        heads = len(codes) if codes.dim() == 3 else None
        with case.ambient.applied():
            total, count = ops.code_statistics(x, indices, n_codes, mask=mask, n_heads=heads)
        real = indices if mask is None else torch.where(mask, indices, -1)
        sums.check(x, real, n_codes, heads is not None, total, count)
        with case.ambient.plain().applied():
            again = ops.code_statistics(x, indices, n_codes, mask=mask, n_heads=heads)
        assert_same_bits(total, again[0], "sums depend on the state around the call")

    fuzz(
        check,
        case=lookup_cases(),
        n_codes=st.sampled_from((1, 2, 3, 40, 257, 5000)),
        few=st.booleans(),
        layout=st.sampled_from(INDEX_LAYOUTS),
    )


@pytest.mark.fuzz(weight=0.5)
def test_an_index_that_is_no_code_is_named(fuzz):
    def check(case, n_codes, beyond):
        x, _, _ = case.tensors()
        indices = given_indices(case, x, n_codes, False, "contiguous").contiguous()
        if indices.numel() == 0:
            return
        flat = case.seed % indices.numel()
        bad = -2 - beyond if case.seed % 2 else n_codes + beyond
        indices.view(-1)[flat] = bad
        row = tuple(int(i) for i in np.unravel_index(flat, tuple(indices.shape)))
        with case.ambient.applied(), pytest.raises(ValueError) as caught:
            ops.code_statistics(x, indices, n_codes)
        assert f"got {bad} at row {row}" in str(caught.value)

    fuzz(
        check,
        case=lookup_cases(masks=False, large=False),
        n_codes=st.sampled_from((1, 3, 300)),
        beyond=st.sampled_from((0, 1, 5, 2**31, 2**62)),
    )
