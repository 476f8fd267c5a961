"""Patched against unpatched, step by step from the same state.

Before every step one model's state_dict is loaded into the other, in turns, so a step's difference is that step's
rounding alone and both directions of the exchange are used. Indices may differ only where the peer's own arithmetic
cannot tell the two codes apart; there the patched one must be the float64 one.
"""

import copy
import random
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

import fastvq
from tests.support import oracle
from tests.support.tolerance import assert_within, gamma

STEPS = 50


@dataclass
class Lookup:
    """One lookup as it happened: rows [N, D], codes [K, D], indices [N]."""

    rows: Tensor
    codes: Tensor
    indices: Tensor
    metric: str = "euclidean"


@dataclass
class Trace:
    """What one model did in one step."""

    outputs: list[Tensor]
    gradients: dict[str, Tensor]
    state: dict[str, Tensor]
    lookups: list[Lookup] = field(default_factory=list)


def watch(model: nn.Module, kind: str, look, lookups: list[Lookup]) -> list:
    """Hooks on every module whose class is named ``kind``: ``look(module, inputs, outputs, codes)`` is a Lookup.

    The codes are copied before the call, since a training forward changes them.
    """
    before: dict[nn.Module, Tensor] = {}

    def enter(module, inputs):
        before[module] = copy.deepcopy(module.state_dict())

    def leave(module, inputs, outputs):
        lookups.append(look(module, inputs[0].detach(), outputs, before[module]))

    found = [m for m in model.modules() if type(m).__name__ == kind]
    assert found
    return [hook for m in found for hook in (m.register_forward_pre_hook(enter), m.register_forward_hook(leave))]


def run(model: nn.Module, x: Tensor, call, kind: str, look, seed: int) -> Trace:
    torch.manual_seed(seed)
    random.seed(seed)
    lookups: list[Lookup] = []
    hooks = watch(model, kind, look, lookups)
    x = x.clone().requires_grad_()
    model.zero_grad()
    outputs = [t for t in call(model, x) if isinstance(t, Tensor)]
    for hook in hooks:
        hook.remove()
    weights = torch.Generator().manual_seed(seed)
    total = sum(
        (t * torch.randn(t.shape, generator=weights)).sum()
        for t in outputs
        if t.is_floating_point() and t.requires_grad
    )
    if isinstance(total, Tensor):
        total.backward()
    gradients = {"x": x.grad, **{name: p.grad for name, p in model.named_parameters()}}
    state = {name: t.clone() for name, t in model.state_dict().items()}
    return Trace([t.detach() for t in outputs], {n: g for n, g in gradients.items() if g is not None}, state, lookups)


def check_lookup(theirs: Lookup, ours: Lookup) -> bool:
    """Whether both chose alike. Raises if ours is not the float64 argmin, or theirs is off by more than rounding."""
    assert torch.equal(oracle.nearest(ours.rows, ours.codes, ours.metric), ours.indices)
    differ = (theirs.indices != ours.indices).nonzero().flatten()
    if len(differ) == 0:
        return True
    rows, codes = oracle.as_float64(theirs.rows[differ]), oracle.as_float64(theirs.codes)
    d = oracle.distances(rows, codes, theirs.metric)
    pick = np.arange(len(differ))
    gap = np.abs(d[pick, theirs.indices[differ].numpy()] - d[pick, ours.indices[differ].numpy()])
    # x^2 + c^2 - 2xc in float32: D + 4 roundings of terms that sum to at most (|x| + |c|)^2, on either code; normalised
    # lookups are distances between unit vectors that carry D + 4 roundings of their own.
    norms = np.linalg.norm(rows, axis=1) + np.linalg.norm(codes, axis=1).max()
    size = norms**2 if theirs.metric == "euclidean" else np.maximum(1, np.linalg.norm(rows, axis=1)) * 4
    assert (gap <= 2 * gamma(2 * rows.shape[1] + 8, torch.float32) * size).all()
    return False


def rounding(trace: Trace, levels: int) -> float:
    """A bound on how far one float32 step may lie from another that adds up in a different order.

    The longest path from an input to a result takes: the sums of a code's N rows, the smoothing's sum over K, the
    estimator's six sums over D with their normalisations, the mean over N D; each summand of a rounding is at most the
    largest operand times the number of rows that one code collects. Levels add theirs, as the residuals pass them on.
    """
    first = trace.lookups[0]
    n_rows, dim = first.rows.shape
    chain = n_rows + 2 * len(first.codes) + 6 * dim + 60
    busiest = max(int(look.indices.bincount().max()) for look in trace.lookups)
    everything = [*trace.outputs, *trace.gradients.values(), *trace.state.values(), first.rows, first.codes]
    largest = max(float(t.abs().max()) for t in everything if t.is_floating_point() and t.numel())
    share = levels * gamma(chain, torch.float32) * busiest
    assert share < 0.02, "the bound says nothing at this size"
    return share * largest


def compare(theirs: Trace, ours: Trace, levels: int = 1) -> bool:
    """Whether the step was comparable: no lookup fell on a tie that float32 cannot see."""
    assert len(theirs.lookups) == len(ours.lookups) > 0
    if not all([check_lookup(a, b) for a, b in zip(theirs.lookups, ours.lookups, strict=True)]):
        return False
    bound = rounding(theirs, levels)
    assert len(theirs.outputs) == len(ours.outputs)
    for a, b in zip(theirs.outputs, ours.outputs, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        assert_within(b, a, bound if a.is_floating_point() else 0)
    for group in ("gradients", "state"):
        a, b = getattr(theirs, group), getattr(ours, group)
        assert a.keys() == b.keys()
        for name in a:
            assert_within(b[name], a[name], bound if a[name].is_floating_point() else 0)
    return True


def lockstep(make, batch, call, kind: str, look, *, levels: int = 1, steps: int = STEPS, train: bool = True):
    """``make()`` a model, ``batch(step)`` its input, ``call(model, x)`` its outputs. Returns both models."""
    torch.manual_seed(0)
    theirs = make().train(train)
    ours = copy.deepcopy(theirs)
    report = fastvq.patch(ours)
    assert report and not report.left, str(report)
    compared = 0
    for step in range(steps):
        source, target = (theirs, ours) if step % 2 == 0 else (ours, theirs)
        target.load_state_dict(source.state_dict())
        x = batch(step)
        compared += compare(*(run(m, x, call, kind, look, step) for m in (theirs, ours)), levels)
    assert compared >= 0.8 * steps
    return theirs, ours
