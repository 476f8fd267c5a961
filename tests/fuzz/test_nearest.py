"""fastvq.ops.nearest against the contract in NumPy: every index, whatever the call and the state around it."""

import pytest
import torch
from hypothesis import strategies as st

from fastvq import ops
from tests.fuzz.compare import assert_same_bits
from tests.fuzz.lookup_cases import LookupCase, lookup_cases


def run(case: LookupCase, way: str, x: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """Indices by one of the ways to ask for them."""
    if way == "packed":
        packed = ops.pack_codebook(codes, metric=case.metric)
        return ops.nearest(x, packed, metric=case.metric)
    if way == "reference":
        return ops.nearest(x, codes, metric=case.metric, backend="reference")
    if way == "one by one" and x.dim() > 1 and codes.dim() == 2 and 0 < len(x) < 20:
        return torch.cat([ops.nearest(row, codes, metric=case.metric) for row in x.split(1)])
    return ops.nearest(x, codes, metric=case.metric)


@pytest.mark.fuzz(weight=8)
def test_every_index_is_the_contracts(fuzz):
    def check(case, way):
        x, codes, _ = case.tensors()
        expected = case.indices(x, codes)
        kept = x.clone(), codes.clone()
        # The reference is torch's own arithmetic, which rounds as torch is told to.
        ambient = case.ambient.plain() if way == "reference" else case.ambient
        with ambient.applied():
            got = run(case, way, x, codes)
        assert got.dtype == torch.int64 and got.shape == expected.shape and got.device.type == "cpu"
        assert torch.equal(got, expected)
        for now, before in zip((x, codes), kept, strict=True):  # arguments are left as they were
            assert_same_bits(now, before, "an argument")

    ways = st.sampled_from(("plain", "plain", "plain", "packed", "one by one", "reference"))
    fuzz(check, case=lookup_cases(masks=False), way=ways)


@pytest.mark.fuzz(weight=1)
def test_fast_lookups_depend_on_nothing_around_them(fuzz):
    """precision="fast" promises no certificate, but a code that exists, and the same one again."""

    def check(case):
        x, codes, _ = case.tensors()
        with case.ambient.applied():
            got = ops.nearest(x, codes, metric=case.metric, precision="fast")
        with case.ambient.plain().applied():
            again = ops.nearest(x, codes, metric=case.metric, precision="fast")
        assert ((got >= 0) & (got < codes.shape[-2])).all()
        assert torch.equal(got, again)

    fuzz(check, case=lookup_cases(masks=False))
