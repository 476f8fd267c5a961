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


def tensor_core_gamma(n: int, dtype: torch.dtype) -> float:
    """gamma for a sum of n products on a GPU's tensor cores, of float32 in float32 or of narrower operands.

    A step adds 16 products to the sum, all 17 aligned to the largest and cut off below 2^-23 of it (modelled in arXiv
    2511.10909): (1.25 n + 16) 2^-23 with n rounded up to 16. A float32 operand is split into two TF32 numbers, 2^-22
    off at most, and the product of the two small halves, 2^-22 of the whole, is left out: 3 * 2^-22 a product.
    """
    if dtype == torch.float64:
        return gamma(n, dtype)
    return (1.25 * 16 * -(-n // 16) + 16) * 2.0**-23 + 3 * 2.0**-22


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
