"""quantize and vq_step against float64: indices, codes, losses, statistics, gradients, and one result in any state."""

from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from fastvq import ops
from tests.fuzz import sums, values
from tests.fuzz.ambient import Ambient
from tests.fuzz.compare import assert_close, assert_same, assert_same_bits
from tests.fuzz.lookup_cases import LookupCase, lookup_cases
from tests.support.tolerance import gamma, roundoff

OPS = ("quantize", "vq_step")
ESTIMATORS = ("straight_through", "rotation", "none")


class Call(NamedTuple):
    """The arguments of a call and the gradients that come back to it."""

    op: str
    x: Tensor
    codes: Tensor
    mask: Tensor | None
    metric: str
    estimator: str
    beta: float
    grads: tuple[Tensor, Tensor, Tensor]  # of quantized and the two losses

    def run(self, ambient: Ambient) -> tuple[NamedTuple, Tensor | None, Tensor | None]:
        """The result, the gradient of x, and that of the codebook."""
        with ambient.applied():
            x, codes = (t.detach().requires_grad_(ambient.takes_gradients) for t in (self.x, self.codes))
            options = {"metric": self.metric, "estimator": self.estimator, "mask": self.mask, "beta": self.beta}
            q = getattr(ops, self.op)(x, codes, **options)
            if not ambient.takes_gradients:
                return q, None, None
            outs = [(q.quantized, self.grads[0]), (q.commitment_loss, self.grads[1]), (q.codebook_loss, self.grads[2])]
            outs = [pair for pair in outs if pair[0].requires_grad]
            outputs, grads = zip(*outs, strict=True)
            return q, *torch.autograd.grad(outputs, (x, codes), grads, allow_unused=True)


def arguments(case: LookupCase, op: str, estimator: str, beta: float) -> Call:
    x, codes, mask = case.tensors()
    rng = np.random.default_rng(case.seed + 1)
    loss = torch.float64 if x.dtype == torch.float64 else torch.float32
    grad = torch.from_numpy(np.asarray(rng.standard_normal(tuple(x.shape)))).to(x.dtype)
    of_losses = (torch.tensor(v, dtype=loss) for v in rng.standard_normal(2).tolist())
    return Call(op, x, codes, mask, case.metric, estimator, beta, (grad, *of_losses))


def by_head(t: Tensor, codes: Tensor) -> Tensor:
    """[H, N, ...] float64: rows of each head."""
    t = t.double() if t.is_floating_point() else t
    heads = len(codes) if codes.dim() == 3 else 1
    return t.reshape(heads, -1, t.shape[-1]) if t.is_floating_point() else t.reshape(heads, -1)


def check_forward(call: Call, q: NamedTuple, expected: Tensor) -> None:
    """Codes to the bit, losses within the rounding of a float64 sum."""
    x, codes, real = by_head(call.x, call.codes), call.codes.double(), by_head(expected, call.codes) >= 0
    codes = codes if codes.dim() == 3 else codes[None]
    chosen = torch.stack([c[i] for c, i in zip(codes, by_head(expected, call.codes).clamp(min=0), strict=True)])
    chosen = torch.where(real[..., None], chosen, 0)
    # A float64 code becomes a 16-bit one through float32, as torch converts.
    cast = chosen.float() if call.x.itemsize == 2 else chosen
    assert_same(q.quantized, cast.to(call.x.dtype).reshape(call.x.shape), "quantized")
    elements = max(1, int(real.sum()) * x.shape[-1])
    mean = torch.where(real[..., None], x - chosen, 0).square().sum() / elements
    if not x[real].isfinite().all():
        mean = torch.full((), torch.nan, dtype=torch.float64)
    for name, loss, factor in (("commitment", q.commitment_loss, call.beta), ("codebook", q.codebook_loss, 1.0)):
        assert loss.dtype == (torch.float64 if call.x.dtype == torch.float64 else torch.float32)
        if mean.isnan():
            assert loss.isnan(), f"{name} loss of a vector that is not finite"
            continue
        rounding = 2 * gamma(elements + 6, torch.float64) + roundoff(loss.dtype)
        assert_close(loss, factor * mean, rounding * factor * mean, f"{name} loss")
    assert_same(q.indices, expected, "indices")


def check_statistics(call: Call, q: NamedTuple) -> None:
    if call.op == "vq_step":
        sums.check(call.x, q.indices, call.codes.shape[-2], call.codes.dim() == 3, q.sums, q.counts)


def check_gradients(call: Call, indices: Tensor, grad_x: Tensor, grad_codes: Tensor) -> None:
    """Within the rounding of their formulas: sums of float64 for codes, a few operations for a vector."""
    x, index = by_head(call.x, call.codes), by_head(indices, call.codes)
    codes = call.codes.double() if call.codes.dim() == 3 else call.codes.double()[None]
    real = (index >= 0)[..., None]
    chosen = torch.stack([c[i] for c, i in zip(codes, index.clamp(min=0), strict=True)])
    scale = 2 / max(1, int(real.sum()) * x.shape[-1])
    g, of_commitment, of_codebook = (t.double() for t in call.grads)
    g = by_head(g, call.codes)
    work = torch.float64 if torch.float64 in (call.x.dtype, call.codes.dtype) else torch.float32
    pull = of_commitment * call.beta * scale * (x - chosen)
    size = (of_commitment * call.beta * scale).abs() * (x.abs() + chosen.abs())
    back, back_size = estimated(call.estimator, g, x, chosen)
    expected = torch.where(real, back + pull, 0)
    bound = gamma(16 + 4 * x.shape[-1] * (call.estimator == "rotation"), work) * (back_size + size)
    bound = torch.where(real, bound + roundoff(call.x.dtype) * expected.abs(), 0)
    assert_close(grad_x, expected.reshape(call.x.shape), bound.reshape(call.x.shape), "gradient of x")

    used = real & x.isfinite().all(-1, keepdim=True)
    total, size = torch.zeros_like(codes), torch.zeros_like(codes)
    for h in range(len(codes)):
        where = index[h].clamp(min=0)
        total[h].index_add_(0, where, torch.where(used[h], chosen[h] - x[h], 0))
        size[h].index_add_(0, where, torch.where(used[h], chosen[h].abs() + x[h].abs(), 0))
    expected = total * (of_codebook * scale)
    bound = 2 * gamma(x.shape[1] + 8, torch.float64) * size * (of_codebook * scale).abs()
    bound = bound + roundoff(call.codes.dtype) * expected.abs()
    shape = call.codes.shape
    assert_close(grad_codes, expected.reshape(shape), bound.reshape(shape), "gradient of the codebook")


def estimated(estimator: str, g: Tensor, x: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
    """What an estimator gives x for the gradient g at its code, and the size of its terms; NaN where it is noise."""
    if estimator == "none":
        return torch.zeros_like(g), torch.zeros_like(g)
    if estimator == "straight_through":
        return g, g.abs()
    norm_x, norm_c = x.norm(dim=-1, keepdim=True), chosen.norm(dim=-1, keepdim=True)
    unit_x, unit_c = x / norm_x, chosen / norm_c
    r = unit_x + unit_c
    norm_r = r.norm(dim=-1, keepdim=True)
    r = r / norm_r
    rotated = g - 2 * r * (r * g).sum(-1, keepdim=True) + 2 * unit_x * (unit_c * g).sum(-1, keepdim=True)
    undefined = ((norm_x == 0) | (norm_c == 0)) & x.isfinite().all(-1, keepdim=True)  # NaN and infinity give NaN
    size = 16 * norm_c / norm_x * g.norm(dim=-1, keepdim=True) / norm_r
    back = torch.where(norm_r < 0.1, torch.nan, norm_c / norm_x * rotated)  # r is noise there, or nearly
    return torch.where(undefined, g, back), torch.where(undefined, g.abs(), size.expand_as(g))


def check(case: LookupCase, op: str, estimator: str, beta: float, by_value: bool) -> None:
    call = arguments(case, op, estimator, beta)
    expected = case.indices(call.x, call.codes, call.mask)
    q, *grads = call.run(case.ambient)
    check_forward(call, q, expected)
    check_statistics(call, q)
    again, *grads_again = call.run(case.ambient.plain())
    for name, a, b in zip(q._fields, q, again, strict=True):
        assert_same_bits(a, b, f"{name} depends on the state around the call")
    if case.ambient.takes_gradients and case.ambient.rounds_as_usual:
        for name, a, b in zip(("x", "codebook"), grads, grads_again, strict=True):
            assert_same_bits(a, b, f"the gradient of {name} depends on the state around the call")
    if by_value:
        check_gradients(call, expected, *grads_again)


OPTIONS = {
    "op": st.sampled_from(OPS),
    "estimator": st.sampled_from(ESTIMATORS),
    "beta": st.sampled_from((1.0, 0.25, 0.0, 2.0)),
}


@pytest.mark.fuzz(weight=3)
def test_results_of_any_numbers(fuzz):
    fuzz(lambda **example: check(**example, by_value=False), case=lookup_cases(), **OPTIONS)


@pytest.mark.fuzz(weight=3)
def test_gradients_of_tame_numbers(fuzz):
    cases = lookup_cases(values.TAME, modes=("grad", "autocast"))
    fuzz(lambda **example: check(**example, by_value=True), case=cases, **OPTIONS)
