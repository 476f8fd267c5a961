"""residual_quantize against its recurrence in float64, rounded once a level; gradients of tame numbers by value."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from fastvq import ops
from tests.fuzz import layouts, sums, values
from tests.fuzz.ambient import Ambient
from tests.fuzz.compare import assert_close, assert_same, assert_same_bits
from tests.fuzz.lookup_cases import LookupCase, lookup_cases
from tests.fuzz.test_quantize import ESTIMATORS
from tests.support import oracle
from tests.support.tolerance import gamma, roundoff


@dataclass(frozen=True)
class Levels:
    n: int
    use: int | None  # n_levels
    shrink: float
    shared: bool  # one codebook, expanded
    as_list: bool


class Level(NamedTuple):
    """What the definition gives at one level, rows flattened."""

    residual: Tensor  # [N, D] of the residuals' dtype
    indices: Tensor  # [N], -1 where masked
    chosen: Tensor  # [N, D] of the residuals' dtype, zeros where masked


def codebooks_of(case: LookupCase, levels: Levels, codes: Tensor) -> Tensor:
    """[Q, K, D]: the case's codebook, and smaller ones of its kind."""
    rng = np.random.default_rng(case.seed + 2)
    more = [
        values.vectors(rng, case.kind, *codes.shape, codes.dtype) * levels.shrink ** (q + 1)
        for q in range(0 if levels.shared else levels.n - 1)
    ]
    if levels.shared:
        return codes.expand(levels.n, *codes.shape)
    return layouts.KEEPING[case.codes_layout if case.codes_layout in layouts.KEEPING else "contiguous"](
        torch.stack([codes, *more])
    )


def definition(case: LookupCase, x: Tensor, codebooks: Tensor, mask: Tensor | None) -> tuple[list[Level], Tensor]:
    """Every level and the sum of the codes."""
    dtype = torch.float64 if torch.float64 in (x.dtype, codebooks.dtype) else torch.float32
    residual = x.detach().to(dtype).reshape(-1, x.shape[-1])
    real = torch.ones(len(residual), dtype=torch.bool) if mask is None else mask.reshape(-1)
    total, found = torch.zeros_like(residual), []
    for codes in codebooks.detach().to(dtype):
        indices = torch.where(real, oracle.nearest(residual, codes, case.metric), -1)
        chosen = torch.where(real[:, None], codes[indices.clamp(min=0)], 0)
        found.append(Level(residual, indices, chosen))
        total, residual = total + chosen, residual - chosen
    return found, total


def check_forward(x: Tensor, beta: float, q: NamedTuple, found: list[Level], total: Tensor) -> None:
    real = found[0].indices >= 0
    elements = max(1, int(real.sum()) * x.shape[-1])
    expected = torch.stack([level.indices for level in found], -1)
    assert torch.equal(q.indices, expected.reshape(q.indices.shape)), "indices"
    cast = total.float() if x.itemsize == 2 else total
    assert_same(q.quantized, cast.to(x.dtype).reshape(x.shape), "quantized")
    for i, (r, index, chosen) in enumerate(found):
        mean = torch.where(real[:, None], r.double() - chosen.double(), 0).square().sum() / elements
        mean = mean if r[real].isfinite().all() else torch.full_like(mean, torch.nan)
        for name, loss, factor in (("commitment", q.commitment_losses, beta), ("codebook", q.codebook_losses, 1.0)):
            assert loss.dtype == (torch.float64 if x.dtype == torch.float64 else torch.float32)
            if mean.isnan():
                assert loss[i].isnan(), f"{name} loss of level {i}, of a residual that is not finite"
                continue
            rounding = 2 * gamma(elements + 6, torch.float64) + roundoff(loss.dtype)
            assert_close(loss[i], factor * mean, rounding * factor * mean, f"{name} loss of level {i}")
        if q.sums is not None:
            sums.check(r, index, q.sums.shape[1], False, q.sums[i], q.counts[i])


def run(
    case: LookupCase, x: Tensor, codebooks: Tensor, mask: Tensor | None, levels: Levels, ambient: Ambient,
    options: dict[str, object],
) -> tuple[NamedTuple, list[Tensor | None]]:  # fmt: skip
    """The result and the gradients of x and the codebooks, of fixed gradients at the outputs."""
    rng = np.random.default_rng(case.seed + 3)
    grad = torch.from_numpy(np.asarray(rng.standard_normal(tuple(x.shape)))).to(x.dtype)
    of_losses = [torch.from_numpy(rng.standard_normal(levels.use or levels.n)) for _ in range(2)]
    with ambient.applied():
        x, codebooks = (t.detach().requires_grad_(ambient.takes_gradients) for t in (x, codebooks))
        # Leaves of their own: autograd's way back to one tensor is torch.stack, which autocast refuses float16.
        given = [c.detach().requires_grad_(c.requires_grad) for c in codebooks] if levels.as_list else codebooks
        q = ops.residual_quantize(x, given, n_levels=levels.use, metric=case.metric, mask=mask, **options)
        if not ambient.takes_gradients:
            return q, [None, None]
        outs = [(q.quantized, grad)] if q.quantized.requires_grad else []
        both = zip((q.commitment_losses, q.codebook_losses), of_losses, strict=True)
        outs += [(loss, g.to(loss.dtype)) for loss, g in both]
        outputs, grads = zip(*outs, strict=True)
        leaves = given if levels.as_list else [given]
        of_x, *of_codes = torch.autograd.grad(outputs, (x, *leaves), grads, allow_unused=True)
    if levels.as_list:  # a level beyond n_levels has no gradient
        of_codes = [
            torch.stack([torch.zeros_like(c) if g is None else g for g, c in zip(of_codes, codebooks, strict=True)])
        ]
    return q, [of_x, *of_codes]


def check(case: LookupCase, levels: Levels, estimator: str, beta: float, statistics: bool, by_value: bool) -> None:
    x, codes, mask = case.tensors()
    codebooks = codebooks_of(case, levels, codes)
    found, total = definition(case, x, codebooks[: levels.use], mask)
    options = {"estimator": estimator, "beta": beta, "statistics": statistics}
    q, grads = run(case, x, codebooks, mask, levels, case.ambient, options)
    check_forward(x, beta, q, found, total)
    again, grads_again = run(case, x, codebooks, mask, levels, case.ambient.plain(), options)
    for name, a, b in zip(q._fields, q, again, strict=True):
        assert_same_bits(a, b, f"{name} depends on the state around the call")
    if case.ambient.takes_gradients and case.ambient.rounds_as_usual:
        for name, a, b in zip(("x", "codebooks"), grads, grads_again, strict=True):
            assert_same_bits(a, b, f"the gradient of {name} depends on the state around the call")
    if by_value:
        check_gradients(case, x, codebooks, levels, estimator, beta, found, grads_again)


def check_gradients(
    case: LookupCase, x: Tensor, codebooks: Tensor, levels: Levels, estimator: str, beta: float, found: list[Level],
    grads: list[Tensor],
) -> None:  # fmt: skip
    """Of the straight-through estimator and of none: sums of a few terms a level."""
    rng = np.random.default_rng(case.seed + 3)
    grad = torch.from_numpy(np.asarray(rng.standard_normal(tuple(x.shape)))).to(x.dtype).double()
    used = len(found)
    loss_dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    of_commitment, of_codebook = (torch.from_numpy(rng.standard_normal(used)).to(loss_dtype).double() for _ in range(2))
    work = found[0].residual.dtype
    real = (found[0].indices >= 0)[:, None]
    scale = 2 / max(1, int(real.sum()) * x.shape[-1])
    back = grad.reshape(-1, x.shape[-1]) if estimator == "straight_through" else torch.zeros(found[0].residual.shape)
    expected, size = back.double(), back.double().abs()
    of_codes, codes_size = torch.zeros(codebooks.shape).double(), torch.zeros(codebooks.shape).double()
    for i, (r, index, chosen) in enumerate(found):
        r, chosen = r.double(), chosen.double()
        expected = expected + of_commitment[i] * beta * scale * (r - chosen)
        size = size + (of_commitment[i] * beta * scale).abs() * (r.abs() + chosen.abs())
        where = index.clamp(min=0)
        of_codes[i].index_add_(0, where, torch.where(real, chosen - r, 0) * of_codebook[i] * scale)
        pulled = torch.where(real, chosen.abs() + r.abs(), 0) * (of_codebook[i] * scale).abs()
        codes_size[i].index_add_(0, where, pulled)
    expected, size = torch.where(real, expected, 0), torch.where(real, size, 0)
    bound = gamma(8 * used + 8, work) * size + roundoff(x.dtype) * expected.abs()
    if estimator != "rotation":
        assert_close(grads[0], expected.reshape(x.shape), bound.reshape(x.shape), "gradient of x")
    bound = 2 * gamma(len(real) + 8, torch.float64) * codes_size + roundoff(codebooks.dtype) * of_codes.abs()
    assert_close(grads[1], of_codes, bound, "gradient of the codebooks")


LEVELS = st.builds(
    lambda n, use, **rest: Levels(n, use if use is None or use <= n else None, **rest),
    n=st.sampled_from((1, 2, 3, 5)),
    use=st.sampled_from((None, None, 1, 2)),
    shrink=st.sampled_from((1.0, 0.3)),
    shared=st.sampled_from((False, False, False, True)),
    as_list=st.booleans(),
)
OPTIONS = {
    "levels": LEVELS,
    "estimator": st.sampled_from(ESTIMATORS),
    "beta": st.sampled_from((1.0, 0.25)),
    "statistics": st.booleans(),
}


@pytest.mark.fuzz(weight=2)
def test_results_of_any_numbers(fuzz):
    fuzz(lambda **e: check(**e, by_value=False), case=lookup_cases(heads=(0,), large=False), **OPTIONS)


@pytest.mark.fuzz(weight=1)
def test_gradients_of_tame_numbers(fuzz):
    cases = lookup_cases(
        values.TAME, modes=("grad", "autocast"), heads=(0,), large=False, spoils=("none", "duplicates")
    )
    fuzz(lambda **e: check(**e, by_value=True), case=cases, **OPTIONS)
