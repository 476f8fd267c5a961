"""The declaration of an op: the schema made of its call, the choice of a backend, the refusals, the golden set."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from fastvq.backends import registry
from fastvq.backends.golden import gate
from fastvq.ops._op import Kernel, Op, known_results

# Exported graphs call the ops by these.
SCHEMAS = {
    "nearest": "Tensor x, Tensor codebook, str metric, str precision, bool check_finite, str? backend, "
    "Tensor? layout=None) -> Tensor",
    "masked_conv2d": "Tensor x, Tensor weight, Tensor? bias, str mask, Tensor? taps, int colours, str? backend) "
    "-> Tensor",
    "masked_conv2d_backward": "Tensor grad, Tensor x, Tensor weight, str mask, Tensor? taps, int colours, bool need_x, "
    "bool need_weight, bool need_bias, str? backend) -> (Tensor grad_x, Tensor grad_weight, Tensor grad_bias)",
    "gated_masked_conv2d": "Tensor x, Tensor weight, Tensor? bias, Tensor? condition, str mask, Tensor? taps, "
    "bool save, str? backend) -> (Tensor out, Tensor tanh_a, Tensor sigmoid_b)",
    "pixelcnn_step": "Tensor ids, Tensor[] weights, Tensor(a!) cache, Tensor? condition, int[] kernel_sizes, int row, "
    "int column, str backend) -> Tensor",
    "gate_backward": "Tensor grad, Tensor tanh_a, Tensor sigmoid_b, str? backend) -> Tensor",
    "quantize": "Tensor x, Tensor codebook, Tensor? mask, str metric, str estimator, float beta, str precision, "
    "str? backend, Tensor? layout=None) -> (Tensor quantized, Tensor commitment_loss, Tensor codebook_loss, "
    "Tensor indices)",
    "quantize_backward": "Tensor x, Tensor codebook, Tensor indices, Tensor? grad_quantized, Tensor? grad_commitment, "
    "Tensor? grad_codebook_loss, str estimator, float beta, bool need_x, bool need_codebook, str? backend) "
    "-> (Tensor grad_x, Tensor grad_codebook)",
    "residual_quantize": "Tensor x, Tensor codebooks, Tensor? mask, str metric, str estimator, float beta, "
    "bool statistics, str precision, str? backend) -> (Tensor quantized, Tensor commitment_losses, "
    "Tensor codebook_losses, Tensor indices, Tensor sums, Tensor counts)",
    "residual_quantize_backward": "Tensor x, Tensor codebooks, Tensor indices, Tensor? grad_quantized, "
    "Tensor? grad_commitment, Tensor? grad_codebook, str estimator, float beta, bool need_x, bool need_codebooks, "
    "str? backend) -> (Tensor grad_x, Tensor grad_codebooks)",
    "vq_step": "Tensor x, Tensor codebook, Tensor? mask, str metric, str estimator, float beta, str precision, "
    "str? backend, bool deterministic) -> (Tensor quantized, Tensor commitment_loss, Tensor codebook_loss, "
    "Tensor indices, Tensor sums, Tensor counts)",
    "code_statistics": "Tensor x, Tensor indices, int n_codes, int? n_heads, bool deterministic, str? backend) -> "
    "(Tensor sums, Tensor counts)",
    "ema_update_": "Tensor(a!) codebook, Tensor(b!) embed_sum, Tensor(c!) cluster_size, Tensor sums, Tensor counts, "
    "float decay, float eps, str smoothing, bool debias, str? backend) -> ()",
    "replace_dead_codes_": "Tensor(a!) codebook, Tensor(b!) embed_sum, Tensor(c!) cluster_size, Tensor x, "
    "Tensor uniforms, float threshold, str? backend) -> Tensor",
}


class ScaleCall(NamedTuple):
    x: Tensor
    others: list[Tensor]
    out: Tensor | None
    factor: float
    sizes: list[int]
    backend: str | None
    n: int | None = None
    flag: bool = False


def scale(**changes):
    fields = {
        "kernels": {
            "cpu": Kernel(lambda call: "cpu", lambda call: "it takes small factors" if call.factor > 9 else None),
            "reference": Kernel(lambda call: "reference"),
        },
        "check": lambda call: None,
    }
    return Op("scale", ScaleCall, **(fields | changes))


def a_call(x=None, factor=1.0, backend=None):
    return ScaleCall(torch.zeros(2) if x is None else x, [], None, factor, [], backend)


@pytest.mark.parametrize("name", SCHEMAS)
def test_the_schema_of_a_registered_op_stays(name):
    assert str(getattr(torch.ops.fastvq, name).default._schema) == f"fastvq::{name}({SCHEMAS[name]}"


def test_the_schema_is_made_of_annotations_and_defaults():
    assert scale(writes=("x", "out"), returns="()").schema() == (
        "scale(Tensor(a!) x, Tensor[] others, Tensor(b!)? out, float factor, int[] sizes, str? backend, "
        "int? n=None, bool flag=False) -> ()"
    )


def test_the_first_backend_that_supports_the_call_serves():
    op = scale()
    assert op.run(a_call()) == "cpu" and op.run(a_call(factor=10.0)) == "reference"
    assert op.run(a_call(backend="reference")) == "reference"
    assert scale(order=("reference", "cpu")).run(a_call()) == "reference"
    by_call = scale(order=lambda call: ("reference", "cpu") if call.factor < 1 else ("cpu", "reference"))
    assert by_call.run(a_call(factor=0.5)) == "reference" and by_call.run(a_call()) == "cpu"


def test_a_named_backend_serves_or_says_why_not():
    op = scale()
    with pytest.raises(ValueError, match=r"scale: no backend .* \(cpu: it takes small factors\); pass backend=None"):
        op.run(a_call(factor=10.0, backend="cpu"))
    with pytest.raises(ValueError, match=r"\(cpu: it takes CPU tensors, x is on meta\)"):
        op.run(a_call(torch.zeros(2, device="meta"), backend="cpu"))
    with pytest.raises(ValueError, match=r"\(cuda: it does not have this operation\)"):
        op.run(a_call(backend="cuda"))
    with pytest.raises(ValueError, match="scale: backend must be one of cpu, triton, cuda, reference or None"):
        op.run(a_call(backend="metal"))


def test_the_check_comes_first():
    def check(call):
        raise TypeError("no such call")

    with pytest.raises(TypeError, match="no such call"):
        scale(check=check).run(a_call(backend="metal"))


def test_a_backend_that_changes_a_written_tensor_wrongly_fails_its_golden_set(monkeypatch):
    monkeypatch.setattr(gate, "_passed", set())
    monkeypatch.setattr(gate, "_disabled", {})
    monkeypatch.setattr(gate.triton_backend, "capability", lambda device: 123)
    once = gate._once
    monkeypatch.setattr(gate, "_once", lambda b, op, _, *a, **k: once(b, op, torch.device("cuda", 0), *a, **k))
    monkeypatch.setattr(gate, "_at", lambda t, device: t)

    def doubled(call):
        call.x.mul_(2)

    def wrong(call):
        call.x.mul_(2)[0] += 1

    def calls():
        yield torch.ones(3), [], None, 1.0, [], None

    given = torch.ones(3)
    for run, expected in ((doubled, "cpu"), (wrong, "reference")):
        gate._passed.clear()
        kernels = {"cpu": Kernel(run, golden=(known_results(calls),)), "reference": Kernel(doubled)}
        op = scale(kernels=kernels, writes=("x",))
        if expected == "cpu":
            assert op.choose(a_call(given)) == "cpu"
        else:
            with pytest.warns(RuntimeWarning, match="cpu backend's scale is switched off"):
                assert op.choose(a_call(given)) == "reference"
    assert torch.equal(given, torch.ones(3))


def test_a_backend_that_serves_a_device_is_asked_once(monkeypatch):
    asked = []
    backend = registry.BACKENDS["cpu"]._replace(unavailable=lambda: asked.append(1))
    monkeypatch.setattr(registry, "_serves", set())
    monkeypatch.setitem(registry.BACKENDS, "cpu", backend)
    op = scale()
    assert [op.choose(a_call()) for _ in range(3)] == ["cpu"] * 3 and len(asked) == 1
