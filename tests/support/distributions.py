"""Data that the lookup's error bound is measured on: name -> (generator, N, K, D) -> x [N, D], codebook [K, D]."""

from collections.abc import Callable

import torch
from torch import Tensor

from fastvq import kmeans

Distribution = Callable[[torch.Generator, int, int, int], tuple[Tensor, Tensor]]
DISTRIBUTIONS: dict[str, Distribution] = {}


def distribution(make: Distribution) -> Distribution:
    DISTRIBUTIONS[make.__name__] = make
    return make


def normal(g, *shape):
    return torch.randn(*shape, generator=g)


@distribution
def gaussian(g, n, k, d):
    return normal(g, n, d), normal(g, k, d)


@distribution
def uniform(g, n, k, d):
    return torch.rand(n, d, generator=g), torch.rand(k, d, generator=g)


@distribution
def heavy_tailed(g, n, k, d):
    x, c = (normal(g, m, d) / normal(g, m, 1).abs().clamp(min=1e-6) for m in (n, k))
    return x, c


@distribution
def trained_codebook(g, n, k, d):
    x = normal(g, n, max(1, d // 4)) @ normal(g, max(1, d // 4), d) + 0.1 * normal(g, n, d)
    return x, kmeans(x[:20000], min(k, n), init="random", n_iter=5, generator=g).codebook


@distribution
def mean_offset(g, n, k, d):
    offset = 10.0 ** torch.randint(7, (d,), generator=g)
    return normal(g, n, d) + offset, normal(g, k, d) + offset


@distribution
def mean_offset_of_codes_only(g, n, k, d):
    return normal(g, n, d), normal(g, k, d) + 1e3


@distribution
def norms_from_tiny_to_huge(g, n, k, d):
    x, c = (normal(g, m, d) * 10.0 ** (60 * torch.rand(m, 1, generator=g) - 30) for m in (n, k))
    return x, c


@distribution
def denormals(g, n, k, d):
    return normal(g, n, d) * 1e-39, normal(g, k, d) * 1e-39


@distribution
def denormal_products(g, n, k, d):
    return normal(g, n, d) * 1e-20, normal(g, k, d) * 1e-20


@distribution
def collapsed(g, n, k, d):
    return normal(g, n, d), (2 * torch.rand(k, d, generator=g) - 1) / k


@distribution
def near_codes(g, n, k, d):
    c = normal(g, k, d)
    return c[torch.randint(k, (n,), generator=g)] + 1e-3 * normal(g, n, d), c


@distribution
def rounding_one_way(g, n, k, d):
    # Every element a quarter step of bfloat16, and of float32, off its grid, all to the same side.
    x, c = (1 + torch.randint(64, (m, d), generator=g) / 64 + 2**-9 + 2**-24 for m in (n, k))
    return x, c
