"""The cases of bench_quantize.py under pytest-benchmark: ``pytest benchmarks --benchmark-only``.

Indices are compared before anything is timed; no time is asserted. ``bench_quantize.py`` takes its competitors side by
side and is the one to quote; this is for following one of them from commit to commit.
"""

from __future__ import annotations

import functools

import pytest
import torch

from harness import photographs, thread_count
from harness.timing import environment
from lookup.cases import Case, gaussian_cases, photograph_cases
from lookup.measure import Sample, set_up
from lookup.providers import all_providers

CALL_SECONDS = 0.05
N_CHECKED = 1024
ROUNDS = 5
PROVIDERS = all_providers()
CASES = gaussian_cases() + ([] if photographs.unavailable() else photograph_cases())


@functools.lru_cache(maxsize=1)  # a case's providers follow one another
def inputs(case: Case) -> tuple[torch.Tensor, torch.Tensor, Sample]:
    x, codebook = case.make()
    return x, codebook, Sample.draw(x, codebook, N_CHECKED)


@pytest.mark.parametrize("name", PROVIDERS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.data} {case.shape}".replace(" ", "-"))
def test_nearest(benchmark, case, name):
    provider = PROVIDERS[name]
    reason = provider.unavailable()
    if reason:
        pytest.skip(reason)
    with thread_count(case.n_threads), environment(provider.environment), torch.no_grad():
        contender = set_up(provider, case, *inputs(case), CALL_SECONDS)
        if provider.ours:
            assert contender.row.differing == 0
        benchmark.extra_info.update(
            differing=contender.row.differing, compared=contender.row.compared, subset=contender.row.subset
        )
        benchmark.pedantic(contender.lookup, args=(contender.x,), rounds=ROUNDS)
