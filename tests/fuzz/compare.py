"""How results of fuzzed calls are compared: to the bit, or within a derived bound away from overflow."""

import torch
from torch import Tensor

from tests.fuzz.values import BITS
from tests.support.tolerance import assert_within


def assert_same_bits(actual: Tensor | None, expected: Tensor | None, what: str) -> None:
    if actual is None or expected is None:
        assert actual is expected, what
        return
    assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape), what
    assert torch.equal(_bits(actual), _bits(expected)), what


def assert_same(actual: Tensor, expected: Tensor, what: str) -> None:
    """The same numbers; any NaN is as good as another, and so is the sign of a zero."""
    assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape), what
    a, e = actual.detach(), expected.detach()
    assert bool(((a == e) | (a.isnan() & e.isnan())).all()), what


def assert_close(actual: Tensor, expected: Tensor, bound: Tensor | float, what: str) -> None:
    """As ``assert_within``, where the float64 result and its terms fit the dtype of ``actual`` with room to spare.

    Beyond its range, and where the expected number is none, anything may have overflowed. ``bound`` is widened by the
    dtype's smallest number, which a result below its range may be off by.
    """
    info = torch.finfo(actual.dtype)
    bound = torch.as_tensor(bound, dtype=torch.float64).expand_as(expected)
    fits = expected.isfinite() & (expected.abs() < info.max / 4) & bound.isfinite()
    assert actual.shape == expected.shape, what
    try:
        assert_within(actual.detach()[fits], expected[fits], bound[fits] + info.tiny * info.eps)
    except AssertionError as error:
        raise AssertionError(f"{what}: {error}") from None


def _bits(t: Tensor) -> Tensor:
    t = t.detach().clone(memory_format=torch.contiguous_format)
    return t.reshape(-1).view(BITS[t.itemsize]) if t.is_floating_point() else t
