"""How results are compared: bounds that are derived, never chosen.

u is a unit roundoff (half the machine epsilon). n roundings of relative size u in sequence leave a relative error of at
most gamma(n) = n u / (1 - n u) (Higham, Accuracy and Stability of Numerical Algorithms, chapter 3).
"""

import torch
from torch import Tensor


def roundoff(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps / 2


def gamma(n: int, dtype: torch.dtype) -> float:
    nu = n * roundoff(dtype)
    assert nu < 1, f"{n} roundings in {dtype} leave nothing to compare"
    return nu / (1 - nu)


def assert_within(actual: Tensor, expected: Tensor, bound: Tensor | float) -> None:
    """|actual - expected| <= bound, elementwise and in float64; NaN must meet NaN and infinity itself."""
    a, e = actual.double(), expected.double()
    assert a.shape == e.shape
    limit = torch.as_tensor(bound, dtype=torch.float64).expand_as(e)
    same = (a == e) | (a.isnan() & e.isnan())
    off = ~(same | ((a - e).abs() <= limit))
    if off.any():
        worst = torch.where(off, (a - e).abs() / limit.clamp(min=torch.finfo(torch.float64).tiny), 0).argmax()
        index = torch.unravel_index(worst, e.shape)
        raise AssertionError(
            f"{int(off.sum())} of {off.numel()} differ by more than the bound; at {tuple(map(int, index))}: "
            f"got {a[index].item()!r}, expected {e[index].item()!r} within {limit[index].item():.3g}"
        )
