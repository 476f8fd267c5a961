"""The golden sets of the CUDA backend's ops, on a card that nothing is known of: the processor."""

import warnings
from dataclasses import replace

import pytest
import torch

from fastvq.backends.golden import gate
from fastvq.backends.golden.cases import configuration
from fastvq.ops.masked_conv import MASKED_CONV
from fastvq.ops.masked_conv.call import ConvCall
from fastvq.ops.nearest import METRICS, NEAREST, PRECISIONS
from fastvq.ops.nearest.call import NearestCall
from fastvq.ops.quantize import QUANTIZE_BACKWARD
from fastvq.ops.quantize.call import QuantizeBackwardCall
from fastvq.ops.residual import RESIDUAL_QUANTIZE
from fastvq.ops.residual.call import ResidualCall
from fastvq.ops.statistics import CODE_STATISTICS, EMA_UPDATE
from fastvq.ops.statistics.call import StatisticsCall, UpdateCall
from fastvq.ops.step import VQ_STEP
from fastvq.ops.step.call import VQStepCall

X, CODES, INDICES = torch.zeros(1, 2), torch.zeros(3, 2), torch.zeros(1, dtype=torch.int64)
CALLS = {
    "masked_conv2d": (MASKED_CONV, ConvCall(X[None, None], X[None, None], None, "B", None, 1, "cuda")),
    "code_statistics": (CODE_STATISTICS, StatisticsCall(X, INDICES, 3, None, True, "cuda")),
    "ema_update_": (EMA_UPDATE, UpdateCall(CODES, CODES, CODES[:, 0], CODES, INDICES, 0.9, 0.0, "none", False, "cuda")),
    "quantize_backward": (
        QUANTIZE_BACKWARD,
        QuantizeBackwardCall(X, CODES, INDICES, None, None, None, "none", 1.0, True, True, "cuda"),
    ),
    "vq_step": (VQ_STEP, VQStepCall(X, CODES, None, "dot", "none", 1.0, "exact", "cuda", True)),
}


def off_by_a_bit(run):
    """``run``, which changes the last bit of its first output, or of the first tensor that it writes to."""

    def wrong(call):
        result = run(call)
        out = call[0] if result is None else result if isinstance(result, torch.Tensor) else result[0]
        out.view(torch.uint8).view(-1)[-1] ^= 1
        return result

    return wrong


@pytest.fixture
def unknown_card(cuda_on_host, monkeypatch):
    """What every op asks of, as a card; the tensors stay where they are. The lookup has passed."""
    lookup = configuration(X, CODES, "dot", "exact").key()
    monkeypatch.setattr(gate, "_passed", {("cuda", 123, "lookup", lookup), ("cuda", 123, "code_statistics", ())})
    monkeypatch.setattr(gate, "_disabled", {})
    monkeypatch.setattr(gate.triton_backend, "capability", lambda device: 123)
    monkeypatch.setattr(gate, "_at", lambda t, device: t)
    once = gate._once
    monkeypatch.setattr(gate, "_once", lambda b, op, _, *a, **k: once(b, op, torch.device("cuda", 0), *a, **k))


@pytest.mark.parametrize("name", CALLS)
def test_a_declared_kernel_passes_and_a_wrong_bit_switches_it_off(name, unknown_card, monkeypatch):
    op, call = CALLS[name]
    gate._passed.discard(("cuda", 123, name, ()))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert op.why_unsupported("cuda", call) is None
    gate._passed.remove(("cuda", 123, name, ()))
    kernel = op.kernels["cuda"]
    monkeypatch.setitem(op.kernels, "cuda", replace(kernel, run=off_by_a_bit(kernel.run)))
    with pytest.warns(RuntimeWarning, match=f"cuda backend's {name} is switched off"):
        assert f"its {name} differs from the reference" in op.why_unsupported("cuda", call)


@pytest.mark.parametrize("metric", METRICS)
def test_lookups_and_residual_levels_pass_at_the_width_of_the_call(metric, unknown_card):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for precision in PRECISIONS:
            x, codebook = torch.zeros(1, 20), torch.zeros(90, 20, dtype=torch.bfloat16)
            call = NearestCall(x, codebook, metric, precision, False, "cuda")
            assert NEAREST.why_unsupported("cuda", call) is None
            levels = codebook.expand(2, -1, -1)
            call = ResidualCall(x, levels, None, metric, "none", 1.0, False, precision, "cuda")
            assert RESIDUAL_QUANTIZE.why_unsupported("cuda", call) is None
    assert {key[3].metric for key in gate._passed if key[2] == "residual_quantize"} == {metric}
