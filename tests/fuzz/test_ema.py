"""ema_update_ against its formulas in NumPy, to the bit; replace_dead_codes_ against what its text promises."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from fastvq import ops
from tests.fuzz import layouts
from tests.fuzz.ambient import Ambient, ambients
from tests.fuzz.compare import assert_same, assert_same_bits
from tests.fuzz.lookup_cases import lookup_cases
from tests.fuzz.sums import saturate

NAMES = ("codebook", "embed_sum", "cluster_size")


@dataclass(frozen=True)
class UpdateCase:
    seed: int
    shape: tuple[int, ...]  # [K, D] or [H, K, D]
    dtype: torch.dtype
    sums_dtype: torch.dtype
    buffer_layouts: tuple[str, str, str]
    scale: float
    counts: str
    decay: float
    eps: float
    smoothing: str
    debias: bool
    ambient: Ambient

    def tensors(self) -> tuple[list[Tensor], Tensor, Tensor]:
        """The buffers, sums and counts."""
        rng = np.random.default_rng(self.seed)
        codebook, embed_sum, sums = (torch.from_numpy(rng.standard_normal(self.shape) * self.scale) for _ in range(3))
        size = torch.from_numpy(rng.choice([0.0, 0.5, 3.0, 1e-30, 1e6], self.shape[:-1]))
        counts = torch.from_numpy(rng.integers(0, 4, self.shape[:-1]))
        counts = counts * {"some": 1, "none": 0, "many": 2**40}[self.counts]
        buffers = [t.to(self.dtype) for t in (codebook, embed_sum, size)]
        buffers = [layouts.KEEPING[how](t) for how, t in zip(self.buffer_layouts, buffers, strict=True)]
        return buffers, sums.to(self.sums_dtype), counts


def update(case: UpdateCase, buffers: list[Tensor], sums: Tensor, counts: Tensor) -> list[Tensor]:
    """The formulas, head by head; a stored value is rounded once."""
    heads = [[t[None] if len(case.shape) == 2 else t for t in (*buffers, sums, counts)]]
    done = [_one_head(case, *(t[h] for t in heads[0])) for h in range(len(heads[0][0]))]
    return [torch.stack(both).reshape(b.shape) for both, b in zip(zip(*done, strict=True), buffers, strict=True)]


def _one_head(case: UpdateCase, *tensors: Tensor) -> tuple[Tensor, ...]:
    codebook, embed_sum, size, sums, counts = (t.double().numpy() for t in tensors)
    if not counts.any():
        return tensors[:3]

    def stored(v: np.ndarray) -> np.ndarray:
        return saturate(torch.from_numpy(v), case.dtype).double().numpy()

    with np.errstate(all="ignore"):
        keep = np.where(case.debias & (size == 0), 0.0, case.decay)[:, None]
        average = stored(np.where(keep == 0, 0, keep * embed_sum) + (1 - case.decay) * sums)
        size = torch.from_numpy(case.decay * size + (1 - case.decay) * counts).to(case.dtype).double().numpy()
        total = 0.0
        for n in size:
            total += n
        laplace = (size + case.eps) / (total + len(size) * case.eps) * total
        divisor = laplace if case.smoothing == "laplace" else np.maximum(size, case.eps)
        stays = (total == 0) | ((case.debias | (case.eps == 0)) & (size == 0))
        new = np.where(stays[:, None], codebook, stored(average / divisor[:, None]))
    return tuple(torch.from_numpy(v).to(case.dtype) for v in (new, average, size))


@pytest.mark.fuzz(weight=2)
def test_updates_to_the_bit(fuzz):
    def run(case: UpdateCase, ambient: Ambient) -> list[Tensor]:
        buffers, sums, counts = case.tensors()
        options = {"decay": case.decay, "eps": case.eps, "smoothing": case.smoothing, "debias": case.debias}
        with ambient.applied():
            ops.ema_update_(*buffers, sums, counts, **options)
        return buffers

    def check(case):
        buffers, sums, counts = case.tensors()
        expected = update(case, buffers, sums, counts)
        for ambient in (case.ambient, case.ambient.plain()):
            for name, a, e in zip(NAMES, run(case, ambient), expected, strict=True):
                assert_same(a, e, f"{name} in {ambient}")

    sizes = st.sampled_from((1, 2, 3, 7, 17, 33, 97, 257))
    real = st.sampled_from((torch.float32, torch.float64))
    layout = st.sampled_from(list(layouts.KEEPING))
    case = st.builds(
        UpdateCase,
        seed=st.integers(0, 2**32 - 1),
        shape=st.one_of(st.tuples(sizes, sizes), st.tuples(st.sampled_from((1, 2, 3)), sizes, sizes)),
        dtype=real,
        sums_dtype=real,
        buffer_layouts=st.tuples(layout, layout, layout),
        scale=st.sampled_from((1.0, 1.0, 1e-30, 1e30)),
        counts=st.sampled_from(("some", "some", "none", "many")),
        decay=st.sampled_from((0.0, 0.5, 0.99, 1.0)),
        eps=st.sampled_from((0.0, 1e-5, 1.0)),
        smoothing=st.sampled_from(("laplace", "none")),
        debias=st.booleans(),
        ambient=ambients(),
    )
    fuzz(check, case=case)


@pytest.mark.fuzz(weight=1)
def test_dead_codes_become_rows_and_others_stay(fuzz):
    def run(case, threshold, ambient):
        x, codes, _ = case.tensors()
        rng = np.random.default_rng(case.seed + 1)
        codebook = torch.from_numpy(rng.standard_normal(tuple(codes.shape))).float()
        size = torch.from_numpy(rng.choice([0.0, 0.5, 3.0], tuple(codes.shape[:-1]))).float()
        before = [codebook.clone(), codebook.clone(), size.clone()]
        after = [t.clone() for t in before]
        with ambient.applied():
            drawing = torch.Generator("cpu").manual_seed(case.seed)
            n = ops.replace_dead_codes_(*after, x, threshold=threshold, generator=drawing)
        return x, before, after, n

    def check(case, threshold):
        x, before, after, n = run(case, threshold, case.ambient)
        heads = before[0].dim() == 3
        rows_of = x.reshape(len(before[0]) if heads else 1, -1, x.shape[-1]).float()
        usable = [rows[rows.isfinite().all(-1)] for rows in rows_of]  # finite as codes
        replaced = 0
        for h, rows in enumerate(usable):
            (old, _, old_size), (new, new_sum, new_size) = ([t[h] if heads else t for t in b] for b in (before, after))
            dead = (old_size < threshold) & (len(rows) > 0)
            replaced += int(dead.sum())
            assert_same(new[~dead], old[~dead], "a code that is not dead")
            assert_same(new_size, torch.where(dead, threshold, old_size), "cluster_size")
            assert_same(new_sum[dead], saturate(new[dead] * threshold, torch.float32), "embed_sum")
            if dead.any():
                taken = (new[dead][:, None] == rows[None]).all(-1)
                assert bool(taken.any(1).all()), "a code that is no row of x"
                alike = (rows[:, None] == rows[None]).all(-1).any(0).sum()  # each row is like itself
                if int(dead.sum()) <= len(rows) == len(rows.unique(dim=0)) == int(alike):
                    assert int(taken.any(0).sum()) == int(dead.sum()), "a row taken twice"
        assert int(n) == replaced
        again = run(case, threshold, case.ambient.plain())[2]
        for name, a, b in zip(NAMES, after, again, strict=True):
            assert_same_bits(a, b, f"{name} depends on the state around the call")

    # Rows become codes by torch's own conversion, which rounds as torch is told to.
    cases = lookup_cases(masks=False, large=False, rounding=False)
    fuzz(check, case=cases, threshold=st.sampled_from((0.0, 0.6, 1.0, 5.0)))
