"""The golden set: it passes where indices are right, and switches a backend off where one is not."""

import warnings

import pytest
import torch

from fastvq import _golden
from fastvq.ops import residual
from fastvq.ops.nearest import reference


@pytest.fixture
def unknown_card(monkeypatch):
    """A CUDA device of a card that nothing is known of, on which tensors stay where they are."""
    monkeypatch.setattr(_golden, "_found", {})
    monkeypatch.setattr(_golden._triton, "capability", lambda device: 123)
    monkeypatch.setattr(_golden, "_at", lambda t, device: t)
    return torch.device("cuda", 0)


def test_right_indices_switch_nothing_off(unknown_card):
    calls = []

    def lookup(*arguments):
        calls.append(arguments)
        return reference.nearest(*arguments)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert _golden.mismatch("triton", unknown_card, lookup, lookup) is None
    ran = len(calls)
    assert ran == 2 * 3 * len(list(_golden.cases()))
    assert _golden.mismatch("triton", unknown_card, lookup, lookup) is None and len(calls) == ran  # once a kind of card


def test_one_wrong_index_switches_the_backend_off_and_warns_once(unknown_card):
    def off_by_one(x, codebook, metric, precision):
        found = reference.nearest(x, codebook, metric, precision)
        found[0] ^= metric == "dot"
        return found

    with pytest.warns(RuntimeWarning, match=r"lookup is switched off .* \(compute capability 12.3\).*1 of 64 rows"):
        reason = _golden.mismatch("triton", unknown_card, off_by_one, reference.nearest)
    assert "differs from the reference on cuda:0: 1 of 64 rows, gaussian, D = 8, dot" in reason
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert _golden.mismatch("triton", unknown_card, off_by_one, reference.nearest) == reason


def test_residual_levels_have_a_case_of_their_own(unknown_card):
    right = residual._two_levels(residual.reference.residual_quantize)
    calls = []

    def second_level_wrong(*arguments):
        calls.append(arguments)
        found = right(*arguments)
        found[3, 1] ^= 1
        return found

    arguments = "triton", unknown_card, second_level_wrong, right, "residual_quantize", "codes one bit apart"
    with pytest.warns(RuntimeWarning, match="its residual_quantize differs from the reference on cuda:0: 1 of 64 rows"):
        assert _golden.mismatch(*arguments)
    assert len(calls) == 1
    assert _golden.mismatch("triton", unknown_card, reference.nearest, reference.nearest) is None


def test_a_kernel_that_does_not_run_switches_the_backend_off(unknown_card):
    def broken(*arguments):
        raise RuntimeError("no kernel image")

    with pytest.warns(RuntimeWarning, match="does not run on cuda:0: RuntimeError: no kernel image"):
        assert _golden.mismatch("triton", unknown_card, broken, reference.nearest)


def test_recorded_cards_and_cpu_tensors_run_nothing(unknown_card, monkeypatch):
    monkeypatch.setattr(_golden, "RECORDED", frozenset({("triton", 123)}))
    assert _golden.mismatch("triton", unknown_card, None, None) is None
    assert _golden.mismatch("triton", torch.device("cpu"), None, None) is None
