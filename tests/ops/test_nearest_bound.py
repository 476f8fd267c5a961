"""The certificate's bound, on every instruction set: no score is further from the truth, and it is not empty."""

import pytest
import torch

from fastvq.backends import cpu as cpu_backend
from fastvq.backends import views
from tests.support.cases import DTYPES, HARD, METRICS, generator
from tests.support.distributions import DISTRIBUTIONS

pytestmark = pytest.mark.every_isa

_cpu_testing = pytest.importorskip(
    "fastvq._cpu_testing",
    reason="fastvq._cpu_testing, which reads the filter's scores and bounds, is not part of this install; "
    "pip install -e . builds it, and so does FASTVQ_TESTING=1",
    exc_type=ImportError,
)
N, K = 500, 65


def use_of_bound(x, codebook, metric, isa):
    """The largest |score - truth| / bound over rows and codes, and how many of these were compared."""
    x, rows = views.rows_view(x, None)
    codes = views.codes_view(codebook)
    return _cpu_testing.bound_use(rows, codes, views.metric_code(metric), cpu_backend.ISAS[isa])


@pytest.mark.parametrize("isa", cpu_backend.available_isas())
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("case", HARD)
def test_hard_cases(case, metric, isa):
    x, codebook = HARD[case](generator(0))
    for dtype in DTYPES:
        used, _ = use_of_bound(x.to(dtype), codebook.to(dtype), metric, isa)
        assert used <= 1, dtype


@pytest.mark.parametrize("isa", cpu_backend.available_isas())
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_distributions(name, metric, isa):
    for d in (1, 3, 8, 10, 11, 33, 64):
        x, codebook = DISTRIBUTIONS[name](generator(d), N, K, d)
        used, n_pairs = use_of_bound(x, codebook, metric, isa)
        assert used <= 1, d
        assert n_pairs > 0, d


@pytest.mark.parametrize("isa", cpu_backend.available_isas())
@pytest.mark.parametrize("metric", METRICS)
def test_it_is_not_empty(metric, isa):
    used = max(
        use_of_bound(*make(generator(d), N, K, d), metric, isa)[0]
        for make in DISTRIBUTIONS.values()
        for d in (2, 8, 64)
    )
    assert used >= 0.05


@pytest.mark.parametrize("isa", cpu_backend.available_isas())
def test_wide_and_many_dtypes(isa):
    x, codebook = torch.randn(40, 2000, generator=generator(1)), torch.randn(33, 2000, generator=generator(2))
    for dtype in DTYPES:
        for metric in METRICS:
            assert use_of_bound(x.to(dtype), codebook, metric, isa)[0] <= 1
            assert use_of_bound(x, codebook.to(dtype), metric, isa)[0] <= 1
