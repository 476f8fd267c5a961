"""The types of string options list what a module or an op takes, so that an editor can offer it."""

import inspect
from typing import Literal, get_args, get_origin, get_type_hints

import pytest
import torch

from fastvq import _options, ops
from fastvq.backends.registry import BACKENDS
from fastvq.distributed import nearest_sharded
from fastvq.models import VQVAE, VQVAE2
from fastvq.nn import GatedMaskedConv2d, MaskedConv2d, ResidualVQ, VectorQuantizer
from fastvq.ops.masked_conv.masks import MASKS

SMALL = {
    VectorQuantizer: (8, 4),
    ResidualVQ: (8, 4, 2),
    VQVAE: (1, 8, 4, 4),
    VQVAE2: (1, 8, 4, 4),
}


def literals(call):
    """{argument: the strings of its type}; of a union, the strings of its first member."""
    found = {}
    for name, hint in get_type_hints(call).items():
        for kind in (hint, *get_args(hint)[:1]):
            if get_origin(kind) is Literal:
                found[name] = get_args(kind)
    return found


@pytest.mark.parametrize(("cls", "sizes"), SMALL.items())
def test_every_listed_string_is_taken_and_no_other(cls, sizes):
    options = literals(cls.__init__)
    assert options
    for name, strings in options.items():
        for value in strings:
            cls(*sizes, **{name: value})
        with pytest.raises(ValueError) as refused:
            cls(*sizes, **{name: "nothing of the kind"})
        assert all(repr(value) in str(refused.value) or value in str(refused.value) for value in strings)


@pytest.mark.parametrize("cls", [MaskedConv2d, GatedMaskedConv2d])
def test_masks_are_those_of_the_op(cls):
    named, _ = get_args(get_type_hints(cls.__init__)["mask"])
    assert get_args(named) == MASKS


def codes(*lead):
    return torch.randn(*lead, 4, 3)


CALLS = {  # op: a small call, and its options other than the backend
    ops.nearest: (lambda **o: ops.nearest(codes(), codes(), **o), {"metric", "precision"}),
    ops.pack_codebook: (lambda **o: ops.pack_codebook(codes(), **o), {"metric"}),
    ops.quantize: (lambda **o: ops.quantize(codes(), codes(), **o), {"metric", "estimator", "precision"}),
    ops.vq_step: (lambda **o: ops.vq_step(codes(), codes(), **o), {"metric", "estimator", "precision"}),
    ops.residual_quantize: (
        lambda **o: ops.residual_quantize(codes(), codes(2), **o),
        {"metric", "estimator", "precision"},
    ),
    ops.ema_update_: (
        lambda **o: ops.ema_update_(
            codes(), codes(), torch.ones(4), codes(), torch.ones(4, dtype=torch.int64), decay=0.9, **o
        ),
        {"smoothing"},
    ),
    ops.masked_conv2d: (lambda **o: ops.masked_conv2d(codes(1, 2), torch.randn(2, 2, 3, 3), **o), {"mask"}),
    ops.gated_masked_conv2d: (lambda **o: ops.gated_masked_conv2d(codes(1, 2), torch.randn(2, 2, 3, 3), **o), {"mask"}),
}


@pytest.mark.parametrize("op", CALLS, ids=lambda op: op.__name__)
def test_every_string_of_an_op_is_taken_and_no_other(op):
    call, names = CALLS[op]
    options = literals(op)
    assert set(options) == {*names, "backend"}
    for name in names:
        for value in options[name]:
            call(**{name: value})
        with pytest.raises(ValueError) as refused:
            call(**{name: "nothing of the kind"})
        assert all(value in str(refused.value) for value in options[name])


@pytest.mark.parametrize(
    "op",
    [f for n in ops.__all__ if inspect.isfunction(f := getattr(ops, n))] + [nearest_sharded],
    ids=lambda op: op.__name__,
)
def test_no_option_of_an_op_is_any_string(op):
    hints = get_type_hints(op)
    assert not [name for name, hint in hints.items() if hint is str or str in get_args(hint)]
    if op is not ops.pixelcnn_step:  # it goes on with the backend of its state
        assert literals(op)["backend"] == tuple(BACKENDS)


def test_the_shared_types_are_those_of_the_signatures():
    public = literals(ops.quantize)
    for name, shared in (("metric", "Metric"), ("estimator", "Estimator"), ("precision", "Precision")):
        assert get_args(getattr(_options, shared)) == public[name]
    assert get_args(_options.BackendName) == public["backend"]


@pytest.mark.parametrize(
    "result", [ops.Quantized, ops.VQStep, ops.ResidualQuantized, ops.PixelCNNState], ids=lambda r: r.__name__
)
def test_help_says_what_every_field_of_a_result_is(result):
    shown = inspect.getdoc(result)
    assert all(f"\n    {field}: " in shown for field in result._fields)
