"""The golden set: of the call's own kind, passed where indices are right, and a backend switched off where not."""

import warnings
from dataclasses import replace

import pytest
import torch

from fastvq.backends import registry
from fastvq.backends import triton as triton_backend
from fastvq.backends.golden import gate
from fastvq.backends.golden.cases import USED, WORK, Configuration, cases, configuration, widened
from fastvq.ops import residual
from fastvq.ops.nearest import METRICS, NEAREST, reference
from fastvq.ops.nearest.call import NearestCall
from fastvq.ops.quantize import QUANTIZE
from fastvq.ops.quantize.call import QuantizeCall
from fastvq.ops.residual import RESIDUAL_QUANTIZE
from fastvq.ops.residual.call import ResidualCall
from fastvq.ops.step import VQ_STEP
from fastvq.ops.step.call import VQStepCall

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
F32 = Configuration("dot", "exact", torch.float32, torch.float32, 40, 300, ())


def refusal(x, codebook, metric, precision):
    return NEAREST.why_unsupported("triton", NearestCall(x, codebook, metric, precision, False, None))


@pytest.fixture
def unknown_card(monkeypatch):
    """A CUDA device of a card that nothing is known of, on which tensors stay where they are."""
    monkeypatch.setattr(gate, "_passed", set())
    monkeypatch.setattr(gate, "_disabled", {})
    monkeypatch.setattr(gate.triton_backend, "capability", lambda device: 123)
    monkeypatch.setattr(gate, "_at", lambda t, device: t)
    return torch.device("cuda", 0)


@pytest.fixture
def on_unknown_card(unknown_card, monkeypatch):
    """The Triton predicates on CPU tensors, as if those were on that card; what its lookups are called with."""
    calls = []

    def lookup(call):
        calls.append(call[:4])
        return reference.nearest(*call[:4])

    def forward(call):
        calls.append(call)
        return RESIDUAL_QUANTIZE.kernels["reference"].run(call)

    once = gate._once
    monkeypatch.setattr(gate, "_once", lambda b, op, _, *a, **k: once(b, op, unknown_card, *a, **k))
    monkeypatch.setattr(registry, "_serves", set())
    monkeypatch.setitem(registry.BACKENDS, "triton", registry.BACKENDS["triton"]._replace(unavailable=lambda: None))
    monkeypatch.setattr(triton_backend, "interpreting", lambda: True)
    for op, run in ((NEAREST, lookup), (RESIDUAL_QUANTIZE, forward)):
        monkeypatch.setitem(op.kernels, "triton", replace(op.kernels["triton"], run=run))
    return calls


def test_every_kind_of_case_is_made_at_any_width_and_dtype():
    for dtype, codes_dtype in (*zip(DTYPES, DTYPES, strict=True), (torch.float16, torch.float32)):
        for dim, n_codes in ((1, 1), (1, 5000), (2, 2), (3, 300), (64, 1024), (270, 300), (2000, 40)):
            made = list(cases(Configuration("dot", "exact", dtype, codes_dtype, dim, n_codes, ())))
            names = "gaussian", "a shared offset", "a collapsed codebook", "pairs of codes", "equal codes"
            assert [name for name, *_ in made] == [*names, "codes one bit apart", *2 * ["every rounding one way"]]
            for name, x, codebook in made:
                assert (x.dtype, codebook.dtype) == (dtype, codes_dtype)
                assert x.shape[1] == codebook.shape[1] == min(dim, USED) and len(codebook) == n_codes
                assert x.isfinite().all() and codebook.isfinite().all(), name
                assert len(x) == 3 or 8 <= len(x) <= 64


def test_cases_are_as_hard_as_their_names_say():
    made = [(name, x, codebook) for name, x, codebook in cases(F32)]
    by_name = {name: (x, codebook) for name, x, codebook in made}
    _, pairs = by_name["pairs of codes"]
    assert torch.equal(pairs[:150], pairs[150:])
    assert by_name["equal codes"][1].unique(dim=0).shape[0] == 1
    near = by_name["codes one bit apart"][1].view(torch.int32)
    apart = (near[:38] - near[38:76]).abs()
    assert apart.max() == 1 and 0.4 < apart.float().mean() < 0.6
    for _, x, codebook in (m for m in made if m[0] == "every rounding one way"):
        first, second = reference.scores(x[:1].double(), codebook[:2].double(), "euclidean")[0]
        assert first < second < first * 1.01


def test_far_codes_are_distinguished_in_half_the_digits():
    for metric in METRICS:
        for dim, n_codes in ((1, 1), (1, 9), (40, 300)):
            call = F32._replace(metric=metric, precision="fast", dim=dim, n_codes=n_codes)
            [(_, x, codebook)] = cases(call)
            found = reference.nearest(x, codebook, metric, "exact")
            noisy = codebook + 0.05 * torch.randn(codebook.shape, generator=torch.Generator().manual_seed(1))
            held = codebook.any(1)  # the others are zero, and noise would be a direction
            assert torch.equal(found, reference.nearest(x, torch.where(held[:, None], noisy, 0), metric, "exact"))


@pytest.mark.parametrize("metric", METRICS)
def test_zeros_between_change_no_index(metric):
    for name, x, codebook in cases(F32._replace(metric=metric, dim=700, n_codes=30)):
        wide = widened(x, 700), widened(codebook, 700)
        assert wide[0].shape[1] == wide[1].shape[1] == 700 and torch.equal(wide[0][:, wide[0].any(0)], x[:, x.any(0)])
        assert wide[0][:, -1].any() or name == "every rounding one way"
        assert torch.equal(reference.nearest(*wide, metric, "exact"), reference.nearest(x, codebook, metric, "exact"))


def test_work_is_bounded_for_wide_rows_and_many_codes():
    for dim, n_codes in ((1 << 16, 3008), (64, 1 << 20), (256, 8192), (4096, 1 << 17)):
        for extra in (0, 1):
            call = configuration(torch.zeros(1, dim), torch.zeros(1).expand(n_codes + extra, dim), "dot", "exact")
            assert call.dim == dim and call.n_codes * dim <= max(WORK, 16 * dim)
            assert call.n_codes % 16 == 0 if extra == 0 else call.n_codes % 16 != 0
            _, rows, codes = next(cases(call))
            assert rows.numel() * len(codes) <= 8 * WORK


@pytest.mark.parametrize("precision", ["exact", "fast"])
@pytest.mark.parametrize("metric", METRICS)
def test_a_lookup_runs_nothing_beyond_its_own_kind(metric, precision, on_unknown_card):
    x, codebook = torch.zeros(2, 5, 24, dtype=torch.bfloat16), torch.zeros(400, 24)
    arguments = x, codebook, None, metric, "none", 0.25, precision, None
    predicates = (
        lambda: refusal(x, codebook, metric, precision),
        lambda: QUANTIZE.why_unsupported("triton", QuantizeCall(*arguments)),
        lambda: VQ_STEP.why_unsupported("triton", VQStepCall(*arguments, True)),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert predicates[0]() is None
        ran = len(on_unknown_card)
        assert ran == (8 if precision == "exact" else 1)
        for rows, codes, *options in on_unknown_card:
            assert (rows.dtype, codes.dtype, options) == (torch.bfloat16, torch.float32, [metric, precision])
            assert rows.shape[1:] == (24,) and codes.shape == (400, 24)
            assert rows.is_contiguous() and codes.is_contiguous()
        # Of the same kind: as many codes within a power of two, heads, other ops that rest on the lookup.
        assert all(refuse() is None for refuse in predicates[1:])
        heads = codebook[:390].expand(2, -1, -1)
        assert refusal(x, heads, metric, precision) is None
    assert len(on_unknown_card) == ran


def test_another_kind_runs_again_and_few_codes_stand_for_no_more(on_unknown_card):
    def ran(x, codebook, metric="dot", precision="exact"):
        before = len(on_unknown_card)
        assert refusal(x, codebook, metric, precision) is None
        return len(on_unknown_card) - before

    x, codebook = torch.zeros(9, 8), torch.zeros(513, 8)
    assert ran(x, codebook) == 8 and ran(x, codebook) == 0
    assert ran(x, codebook, "cosine") == 8 and ran(x, codebook, precision="fast") == 1
    assert ran(x.half(), codebook) == 8 and ran(x.half(), codebook.half()) == 8
    assert ran(x[:, :7], codebook[:, :7]) == 8
    assert ran(x, codebook[:512]) == 8  # 4096 elements: these go to the definition, with no filter
    assert ran(x, codebook[:500]) == 0


@pytest.mark.parametrize(("n_levels", "masked"), [(1, False), (5, True)])
def test_residual_levels_run_their_own_kernels_alone(n_levels, masked, on_unknown_card):
    x, codebooks = torch.zeros(6, 20), torch.zeros(n_levels, 300, 20, dtype=torch.float16)
    mask = torch.ones(6, dtype=torch.bool) if masked else None
    call = ResidualCall(x, codebooks, mask, "euclidean", "none", 0.25, True, "exact", None)
    for _ in range(2):
        assert RESIDUAL_QUANTIZE.why_unsupported("triton", call) is None
        assert len(on_unknown_card) == 8
    for rows, levels, given_mask, metric, *_, precision, _ in on_unknown_card:
        assert (rows.dtype, levels.dtype, metric, precision) == (torch.float32, torch.float16, "euclidean", "exact")
        assert rows.shape[1:] == (20,) and levels.shape == (min(2, n_levels), 300, 20)
        assert (given_mask is not None) == masked


def test_one_wrong_index_switches_the_backend_off_for_every_kind_and_warns_once(unknown_card):
    def off_by_one(x, codebook, metric, precision):
        found = reference.nearest(x, codebook, metric, precision)
        found[0] ^= metric == "dot"
        return found

    euclidean = F32._replace(metric="euclidean")
    assert gate.check_lookup("triton", unknown_card, off_by_one, reference.nearest, euclidean) is None
    with pytest.warns(RuntimeWarning, match=r"lookup is switched off .* \(compute capability 12.3\).*1 of 64 rows"):
        reason = gate.check_lookup("triton", unknown_card, off_by_one, reference.nearest, F32)
    assert "differs from the reference on cuda:0: 1 of 64 rows, gaussian, dot, torch.float32 and" in reason
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # What passed before, what was never run, and the levels that rest on it.
        for call in (F32, euclidean, F32._replace(dim=3)):
            assert gate.check_lookup("triton", unknown_card, None, None, call) == reason
            assert gate.check_lookup("triton", unknown_card, None, None, call, "residual_quantize") == reason
        assert gate.check_lookup("cuda", unknown_card, reference.nearest, reference.nearest, F32) is None


def test_wrong_residual_levels_leave_the_lookup(unknown_card):
    right = residual._golden_levels(RESIDUAL_QUANTIZE.kernels["reference"].run, 2, False)
    calls = []

    def second_level_wrong(*arguments):
        calls.append(arguments)
        found = right(*arguments)
        found[3, 1] ^= 1
        return found

    arguments = "triton", unknown_card, second_level_wrong, right, F32, "residual_quantize"
    with pytest.warns(RuntimeWarning, match="its residual_quantize differs from the reference on cuda:0: 1 of 64 rows"):
        assert gate.check_lookup(*arguments)
    assert len(calls) == 1
    assert gate.check_lookup("triton", unknown_card, reference.nearest, reference.nearest, F32) is None


def test_a_kernel_that_does_not_run_switches_the_backend_off(unknown_card):
    def broken(*arguments):
        raise RuntimeError("no kernel image")

    with pytest.warns(RuntimeWarning, match="does not run on cuda:0: RuntimeError: no kernel image"):
        assert gate.check_lookup("triton", unknown_card, broken, reference.nearest, F32)


def test_nothing_is_compared_while_a_graph_is_captured(unknown_card, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert gate.check_lookup("triton", unknown_card, None, None, F32) is None
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    with pytest.warns(RuntimeWarning, match="does not run"):
        assert gate.check_lookup("triton", unknown_card, None, None, F32)


def test_the_cases_are_made_on_the_cpu_whatever_the_default_device(unknown_card):
    with torch.device("meta"):
        assert gate.check_lookup("triton", unknown_card, reference.nearest, reference.nearest, F32) is None


@pytest.mark.parametrize("n, levels", [(32768, 2), (32769, 1)])
def test_residuals_are_checked_by_the_kernels_that_will_run(n, levels, monkeypatch):
    """Too many rows for all levels in one launch: by one level, which is never one launch."""
    asked = []
    monkeypatch.setattr(gate, "check_lookup", lambda *given: asked.append(given[4]))
    x, codebooks = torch.empty(1, 64).expand(n, -1), torch.empty(3, 100, 64)
    call = ResidualCall(x, codebooks, None, "euclidean", "none", 1.0, False, "exact", None)
    assert residual._golden(RESIDUAL_QUANTIZE, "triton", call) is None
    assert [call.others[:1] for call in asked] == [(levels,)]


def test_recorded_cards_and_cpu_tensors_run_nothing(unknown_card, monkeypatch):
    monkeypatch.setattr(gate, "RECORDED", frozenset({("triton", 90)}))
    assert gate.check_lookup("triton", torch.device("cpu"), None, None, F32) is None
    monkeypatch.setattr(gate.triton_backend, "capability", lambda device: 90)
    assert gate.check_lookup("triton", unknown_card, None, None, F32) is None
