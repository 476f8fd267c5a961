"""What quantizers are called with: vectors, a codebook, a mask, an ambient state."""

from dataclasses import dataclass

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

from tests.fuzz import layouts, values
from tests.fuzz.ambient import Ambient, ambients
from tests.support import oracle

SIZES = (0, 1, 2, 3, 5, 7, 13, 17, 24, 25, 31, 48, 49, 64, 97, 127, 241)
CODES = (1, 1, 2, 3, 7, 16, 17, 31, 33, 47, 48, 49, 64, 97, 127, 257, 300)
DIMS = (1, 1, 2, 3, 4, 7, 8, 9, 15, 16, 17, 31, 32, 33, 47, 63, 64, 65, 127, 129)
# N, K, D about and beyond every size at which kernels change their way.
LARGE = (
    (3, 2, 4097), (2, 5, 16385), (1, 3, 16384), (3, 70_000, 2), (2, 70_000, 5), (7, 4099, 8), (1, 8192, 31),
    (997, 512, 17), (2048, 300, 8), (5003, 33, 3), (300, 1021, 32), (257, 2049, 64),
)  # fmt: skip
METRICS = ("euclidean", "cosine", "dot")


@dataclass(frozen=True)
class LookupCase:
    seed: int
    shape: tuple[int, int, int]  # N, K, D
    heads: int  # 0: none
    lead: int  # dimensions of x before the last, where N has so many factors
    kind: str
    relation: str
    spoil: str
    x_dtype: torch.dtype
    codes_dtype: torch.dtype
    x_layout: str
    codes_layout: str
    masked: float | None  # the share of vectors that are real
    metric: str
    ambient: Ambient

    def tensors(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """x [..., D] or [H, ..., D], codebook [K, D] or [H, K, D], mask."""
        rng = np.random.default_rng(self.seed)
        made = (self.kind, self.relation, self.spoil, self.shape, self.x_dtype, self.codes_dtype)
        pairs = [values.rows_and_codes(rng, *made) for _ in range(max(1, self.heads))]
        x, codes = (torch.stack(both) if self.heads else both[0] for both in zip(*pairs, strict=True))
        x = x.reshape(*x.shape[:-2], *_factors(self.shape[0], self.lead), x.shape[-1])
        x, codes = layouts.LAYOUTS[self.x_layout](x), layouts.LAYOUTS[self.codes_layout](codes)
        mask = None
        if self.masked is not None:
            mask = torch.from_numpy(np.asarray(rng.random(tuple(x.shape[:-1])) < self.masked))
        return x, codes, mask

    def indices(self, x: Tensor, codes: Tensor, mask: Tensor | None = None) -> Tensor:
        """The oracle's."""
        if codes.dim() == 3:
            found = torch.stack([oracle.nearest(a, c, self.metric) for a, c in zip(x, codes, strict=True)])
        else:
            found = oracle.nearest(x, codes, self.metric)
        return found if mask is None else torch.where(mask, found, -1)


def _factors(n: int, lead: int) -> tuple[int, ...]:
    if lead == 0 and n == 1:
        return ()
    factors = [f for f in (2, 3, 5, 7) if n and n % f == 0][: lead - 1] if lead > 1 else []
    for i, f in enumerate(factors):
        if n % f:
            return (*factors[:i], n)
        n //= f
    return (*factors, n)


def lookup_cases(
    kinds: tuple[str, ...] = tuple(values.KINDS),
    sizes: tuple[int, ...] = SIZES,
    modes: tuple[str, ...] = ("grad", "no_grad", "inference", "autocast"),
    large: bool = True,
    masks: bool = True,
    heads: tuple[int, ...] = (0, 0, 0, 0, 1, 2, 3),
    spoils: tuple[str, ...] = values.SPOILS,
    rounding: bool = True,
) -> st.SearchStrategy[LookupCase]:
    """One in eighty is large."""
    small = st.tuples(st.sampled_from(sizes), st.sampled_from(CODES), st.sampled_from(DIMS))
    if large:
        rare = st.sampled_from(LARGE)
        shape = st.integers(0, 79).flatmap(lambda n: rare if n == 79 else small)
    else:
        shape = small
    dtypes = st.sampled_from(values.DTYPES)
    return st.builds(
        LookupCase,
        seed=st.integers(0, 2**32 - 1),
        shape=shape,
        heads=st.sampled_from(heads),
        lead=st.sampled_from((1, 1, 0, 2, 3)),
        kind=st.sampled_from(kinds),
        relation=st.sampled_from(values.RELATIONS),
        spoil=st.sampled_from(spoils),
        x_dtype=dtypes,
        codes_dtype=dtypes,
        x_layout=st.sampled_from((*["contiguous"] * 3, *layouts.LAYOUTS)),
        codes_layout=st.sampled_from((*["contiguous"] * 3, *layouts.KEEPING, "expanded rows")),
        masked=st.sampled_from((None, None, 0.0, 0.3, 0.9, 1.0)) if masks else st.none(),
        metric=st.sampled_from(METRICS),
        ambient=ambients(modes, rounding),
    )
