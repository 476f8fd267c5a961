"""Numbers that lookups, sums and error bounds find hard, by kind, from a seed."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
Kind = Callable[[np.random.Generator, int, int, torch.dtype], np.ndarray]
KINDS: dict[str, Kind] = {}
# How the vectors of x are made from the codes; "independent" draws them by the same kind.
RELATIONS = ("independent", "codes", "one bit from codes", "midpoints")
SPOILS = ("none", "none", "none", "none", "duplicates", "code", "row", "all codes", "many elements", "signed zeros")


def kind(make: Kind) -> Kind:
    KINDS[make.__name__] = make
    return make


@kind
def gaussian(rng, n, d, dtype):
    return rng.standard_normal((n, d))


@kind
def integers(rng, n, d, dtype):
    return rng.integers(-2, 3, (n, d)).astype(np.float64)


@kind
def dyadic(rng, n, d, dtype):
    return rng.integers(-8, 9, (n, d)) / 8


@kind
def largest(rng, n, d, dtype):
    return np.sign(rng.standard_normal((n, d))) * torch.finfo(dtype).max * rng.choice([1.0, 0.5, 1e-3, 1e-10], (n, 1))


@kind
def denormal(rng, n, d, dtype):
    info = torch.finfo(dtype)
    return rng.integers(-5, 6, (n, d)) * (info.tiny * info.eps) * rng.choice([1, 100, 1e4, 2**20])


@kind
def norms(rng, n, d, dtype):
    return rng.standard_normal((n, d)) * 10 ** rng.uniform(-30, 30, (n, 1))


@kind
def permutations(rng, n, d, dtype):
    return rng.permuted(np.broadcast_to(rng.standard_normal(d), (n, d)), axis=1)


@kind
def offset(rng, n, d, dtype):
    return rng.standard_normal((n, d)) + rng.choice([1e2, 1e3, 1e4, -3e4])


@kind
def equal(rng, n, d, dtype):
    return np.broadcast_to(rng.standard_normal(d), (n, d)).copy()


@kind
def some_zero(rng, n, d, dtype):
    return rng.standard_normal((n, d)) * (rng.random((n, 1)) < 0.5)


@kind
def products_overflow(rng, n, d, dtype):
    return rng.standard_normal((n, d)) * rng.choice([1e18, 1e19, 1e20, 1e25, 1e30, 1e35, 1e37])


@kind
def beyond_float32(rng, n, d, dtype):
    return rng.standard_normal((n, d)) * rng.choice([1e200, 1e-200, 1e300, 1e-300, 1e154, 1e-154, 1e160, 1e-162])


@kind
def cluster(rng, n, d, dtype):
    return rng.standard_normal((1, d)) + rng.standard_normal((n, d)) * rng.choice([1e-2, 1e-4, 1e-6, 1e-8])


@kind
def collapsed(rng, n, d, dtype):
    return rng.uniform(-1, 1, (n, d)) / max(1, n)


@kind
def signs(rng, n, d, dtype):
    return rng.choice([0.0, -0.0, 1.0, -1.0], (n, d))


@kind
def one_large(rng, n, d, dtype):
    v = rng.standard_normal((n, d))
    v[: n > 0] *= rng.choice([1e10, 1e17, 1e18, 1e19, 1e30])
    return rng.permutation(v)


@kind
def one_bit_apart(rng, n, d, dtype):
    base = torch.from_numpy(np.broadcast_to(rng.standard_normal(d), (n, d)).copy()).to(dtype)
    return neighbours(rng, base).double().numpy()


@kind
def constant_vectors(rng, n, d, dtype):
    return np.broadcast_to(rng.standard_normal((n, 1)), (n, d)).copy()


# Those whose sums, products and norms stay far from the ends of float32: gradients of these are compared by value.
TAME = (
    "gaussian", "integers", "dyadic", "permutations", "equal", "some_zero", "cluster", "collapsed", "signs",
    "one_bit_apart", "constant_vectors",
)  # fmt: skip


def neighbours(rng: np.random.Generator, t: Tensor) -> Tensor:
    """Every element, or the number next to it on either side."""
    step = torch.from_numpy(rng.integers(-1, 2, tuple(t.shape)))
    moved = (t.contiguous().view(BITS[t.itemsize]) + step.to(BITS[t.itemsize])).view(t.dtype)
    return torch.where(moved.isfinite(), moved, t)


def vectors(rng: np.random.Generator, name: str, n: int, d: int, dtype: torch.dtype) -> Tensor:
    """[n, d] of ``dtype``, all finite."""
    largest = torch.finfo(dtype).max
    return (
        torch.from_numpy(np.clip(KINDS[name](rng, n, d, dtype), -largest, largest)).to(dtype).clamp(-largest, largest)
    )


def rows_and_codes(
    rng: np.random.Generator, name: str, relation: str, spoil: str, shape: tuple[int, int, int],
    x_dtype: torch.dtype, codes_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """x [N, D] and codebook [K, D] for ``shape`` = (N, K, D)."""
    n, k, d = shape
    codes = vectors(rng, name, k, d, codes_dtype)
    if spoil == "duplicates":
        codes = codes[torch.from_numpy(rng.integers(0, k, k))]
    if spoil == "signed zeros":
        codes = torch.where(torch.from_numpy(rng.random((k, d)) < 0.4), torch.zeros((), dtype=codes_dtype), codes)
        codes = torch.where(torch.from_numpy(rng.random((k, d)) < 0.5), -codes.abs(), codes)
    if relation == "independent":
        x = vectors(rng, name, n, d, x_dtype)
    else:
        one, other = (codes[torch.from_numpy(rng.integers(0, k, n))].double() for _ in range(2))
        x = (one / 2 + other / 2 if relation == "midpoints" else one).to(x_dtype)
        if relation == "one bit from codes":
            x = neighbours(rng, x)
    _spoil(rng, spoil, x, codes)
    return x, codes


def _spoil(rng: np.random.Generator, spoil: str, x: Tensor, codes: Tensor) -> None:
    """NaN and infinity where ``spoil`` says."""
    bad = rng.choice([np.nan, np.inf, -np.inf])
    if spoil in ("code", "all codes"):
        codes[... if spoil == "all codes" else rng.integers(len(codes)), rng.integers(codes.shape[1])] = bad
    if spoil == "row" and len(x):
        x[rng.integers(len(x)), rng.integers(x.shape[1])] = bad
    if spoil == "many elements":
        for t in (x, codes):
            t[torch.from_numpy(rng.random(tuple(t.shape)) < 0.02)] = bad
