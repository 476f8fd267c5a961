"""Arguments of a wrong type, on every public function: the op, the argument, what was expected and what came."""

import pytest
import torch

import fastvq
from fastvq import nn, ops

X, CODES, IDS = torch.randn(6, 4), torch.randn(5, 4), torch.zeros(6, dtype=torch.int64)
IMAGE, WEIGHT = torch.randn(1, 2, 4, 4), torch.randn(4, 2, 3, 3)
SUMS, COUNTS, SIZE = torch.zeros(5, 4), torch.zeros(5, dtype=torch.int64), torch.ones(5)
NESTED = torch.nested.nested_tensor([torch.randn(2, 4), torch.randn(3, 4)])


def _update(**changed):
    given = {"sums": SUMS, "counts": COUNTS, "decay": 0.9, **changed}
    return ops.ema_update_(CODES.clone(), CODES.clone(), SIZE.clone(), **given)


def _replace(**changed):
    return ops.replace_dead_codes_(CODES.clone(), CODES.clone(), SIZE.clone(), X, **{"threshold": 1.0, **changed})


WITH_BACKEND = {
    "nearest": lambda b: ops.nearest(X, CODES, backend=b),
    "quantize": lambda b: ops.quantize(X, CODES, backend=b),
    "vq_step": lambda b: ops.vq_step(X, CODES, backend=b),
    "residual_quantize": lambda b: ops.residual_quantize(X, CODES[None], backend=b),
    "code_statistics": lambda b: ops.code_statistics(X, IDS, 5, backend=b),
    "ema_update_": lambda b: _update(backend=b),
    "replace_dead_codes_": lambda b: _replace(backend=b),
    "masked_conv2d": lambda b: ops.masked_conv2d(IMAGE, WEIGHT, backend=b),
    "gated_masked_conv2d": lambda b: ops.gated_masked_conv2d(IMAGE, WEIGHT, backend=b),
}


@pytest.mark.parametrize("op", WITH_BACKEND)
@pytest.mark.parametrize("backend", [3, b"cpu", torch.zeros(1)])
def test_backend(op, backend):
    with pytest.raises(TypeError, match=rf"fastvq.ops.{op}: backend must be the name of a backend or None, got "):
        WITH_BACKEND[op](backend)


INTEGERS = {
    "ops.code_statistics: n_codes": lambda n: ops.code_statistics(X, IDS, n),
    "ops.code_statistics: n_heads": lambda n: ops.code_statistics(X, IDS, 5, n_heads=n),
    "ops.residual_quantize: n_levels": lambda n: ops.residual_quantize(X, CODES[None], n_levels=n),
    "ops.masked_conv2d: colours": lambda n: ops.masked_conv2d(IMAGE, WEIGHT, colours=n),
    "nn.VectorQuantizer: dim": lambda n: nn.VectorQuantizer(n, 8),
    "nn.VectorQuantizer: n_codes": lambda n: nn.VectorQuantizer(4, n),
    "nn.VectorQuantizer: heads": lambda n: nn.VectorQuantizer(4, 8, heads=n),
    "nn.ResidualVQ: n_levels": lambda n: nn.ResidualVQ(4, 8, n),
    "nn.MaskedConv2d: in_channels": lambda n: nn.MaskedConv2d(n, 4, 3),
    "nn.MaskedConv2d: colours": lambda n: nn.MaskedConv2d(3, 3, 3, colours=n),
}


@pytest.mark.parametrize("place", INTEGERS)
def test_integers(place):
    for wrong in (3.0, "2", True, torch.tensor(2)):
        with pytest.raises(TypeError, match=f"fastvq.{place} must be an integer, got {type(wrong).__name__} "):
            INTEGERS[place](wrong)
    with pytest.raises(ValueError, match=f"fastvq.{place} must be below 2\\^63, got 9223372036854775808"):
        INTEGERS[place](2**63)


NUMBERS = {
    "ops.quantize: beta": lambda v: ops.quantize(X, CODES, beta=v),
    "ops.vq_step: beta": lambda v: ops.vq_step(X, CODES, beta=v),
    "ops.residual_quantize: beta": lambda v: ops.residual_quantize(X, CODES[None], beta=v),
    "ops.ema_update_: decay": lambda v: _update(decay=v),
    "ops.ema_update_: eps": lambda v: _update(eps=v),
    "ops.replace_dead_codes_: threshold": lambda v: _replace(threshold=v),
    "nn.VectorQuantizer: decay": lambda v: nn.VectorQuantizer(4, 8, decay=v),
    "nn.VectorQuantizer: eps": lambda v: nn.VectorQuantizer(4, 8, eps=v),
    "nn.ResidualVQ: commitment_weight": lambda v: nn.ResidualVQ(4, 8, 2, commitment_weight=v),
    "nn.VectorQuantizer: dead_code_threshold": lambda v: nn.VectorQuantizer(4, 8, dead_code_threshold=v),
}


@pytest.mark.parametrize("place", NUMBERS)
def test_numbers(place):
    for wrong in ("x", [0.5], 1j):
        with pytest.raises(TypeError, match=f"fastvq.{place} must be a number, got {type(wrong).__name__} "):
            NUMBERS[place](wrong)


def test_counts_and_nested_tensors():
    with pytest.raises(TypeError, match=r"fastvq.ops.ema_update_: counts must be an int64 tensor, got NoneType"):
        _update(counts=None)
    for op, call in (
        ("nearest", lambda: ops.nearest(NESTED, CODES)),
        ("quantize", lambda: ops.quantize(NESTED, CODES)),
        ("code_statistics", lambda: ops.code_statistics(NESTED, IDS, 5)),
        ("masked_conv2d", lambda: ops.masked_conv2d(NESTED, WEIGHT)),
    ):
        with pytest.raises(TypeError, match=f"fastvq.ops.{op}: x must be a dense tensor, got a nested one; pad it"):
            call()


def test_what_was_allowed_still_is():
    import numpy as np

    with fastvq.use_backend("reference"):
        ops.code_statistics(X, IDS, np.int64(5))
        ops.quantize(X, CODES, beta=np.float32(0.5))
        _update(decay=torch.tensor(0.5), eps=0)
