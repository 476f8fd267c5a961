"""The golden sets of the CUDA backend's ops, on a card that nothing is known of: the processor."""

import dataclasses
import warnings

import pytest
import torch

from fastvq.backends.golden import gate
from fastvq.backends.golden.cases import configuration
from fastvq.ops import residual
from fastvq.ops._op import Op
from fastvq.ops.masked_conv import MASKED_CONV
from fastvq.ops.masked_conv.call import ConvCall
from fastvq.ops.nearest import METRICS, NEAREST, PRECISIONS
from fastvq.ops.nearest.call import NearestCall
from fastvq.ops.quantize import cuda as quantize
from fastvq.ops.statistics import cuda as ema
from fastvq.ops.step import cuda as step

X, CODES, INDICES = torch.zeros(1, 2), torch.zeros(3, 2), torch.zeros(1, dtype=torch.int64)
CONV = ConvCall(torch.zeros(1, 1, 1, 1), torch.zeros(1, 1, 1, 1), None, "B", None, 1, "cuda")
REFUSALS = {
    "code_statistics": (ema, "code_statistics", lambda: ema.why_statistics_unsupported(X, INDICES, 3, None)),
    "ema_update_": (ema, "ema_update_", lambda: ema.why_update_unsupported(CODES)),
    "quantize_backward": (quantize, "quantize_backward", lambda: quantize.why_backward_unsupported(X, CODES, INDICES)),
    "vq_step": (step, "vq_step", lambda: step.why_unsupported(X, CODES, None, "dot", 1.0, "exact")),
    "masked_conv2d": (MASKED_CONV, "cuda", lambda: MASKED_CONV.why_unsupported("cuda", CONV)),
}


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


@pytest.mark.parametrize("op", REFUSALS)
def test_right_kernels_pass_and_a_wrong_bit_switches_off(op, unknown_card, monkeypatch):
    module, name, refuse = REFUSALS[op]
    gate._passed.discard(("cuda", 123, op, ()))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert refuse() is None
    assert ("cuda", 123, op, ()) in gate._passed
    gate._passed.remove(("cuda", 123, op, ()))
    right = module.kernels[name].run if isinstance(module, Op) else getattr(module, name)

    def off_by_a_bit(*arguments):
        result = right(*arguments)
        out = arguments[0] if result is None else result if isinstance(result, torch.Tensor) else result[0]
        out.view(torch.uint8).view(-1)[-1] ^= 1
        return result

    if isinstance(module, Op):
        monkeypatch.setitem(module.kernels, name, dataclasses.replace(module.kernels[name], run=off_by_a_bit))
    else:
        monkeypatch.setattr(module, name, off_by_a_bit)
    with pytest.warns(RuntimeWarning, match=f"cuda backend's {op} is switched off"):
        assert f"its {op} differs from the reference" in refuse()


@pytest.mark.parametrize("metric", METRICS)
def test_lookups_and_residual_levels_pass_at_the_width_of_the_call(metric, unknown_card):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for precision in PRECISIONS:
            x, codebook = torch.zeros(1, 20), torch.zeros(90, 20, dtype=torch.bfloat16)
            call = NearestCall(x, codebook, metric, precision, False, "cuda")
            assert NEAREST.why_unsupported("cuda", call) is None
            levels = x, codebook.expand(2, -1, -1), None, metric, 1.0, False, precision
            assert residual.FORWARD["cuda"].why_unsupported(*levels) is None
    assert {key[3].metric for key in gate._passed if key[2] == "residual_quantize"} == {metric}
