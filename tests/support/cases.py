"""Shapes and data that every backend is held to. Each case is a seeded (x [N, D], codebook [K, D])."""

from collections.abc import Callable

import torch
from torch import Tensor

SIZES = (1, 2, 3, 7, 17, 31, 64, 65, 127, 1000)
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
METRICS = ("euclidean", "cosine", "dot")

Case = Callable[[torch.Generator], tuple[Tensor, Tensor]]
HARD: dict[str, Case] = {}


def hard(case: Case) -> Case:
    HARD[case.__name__] = case
    return case


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def gaussian(n: int, k: int, d: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
    return torch.randn(n, d, generator=g), torch.randn(k, d, generator=g)


@hard
def duplicate_codes(g):
    x, c = gaussian(200, 17, 31, g)
    return x, c[torch.randint(17, (5000,), generator=g)]


@hard
def last_bit_apart(g):
    x, c = gaussian(200, 8, 33, g)
    c = c.repeat(20, 1)
    flips = torch.randint(0, 2, c.shape, generator=g)
    return x, torch.where(flips == 1, torch.nextafter(c, torch.tensor(torch.inf)), c)


@hard
def midpoints_of_two_codes(g):
    c = torch.randint(-8, 9, (65, 16), generator=g).float()
    a, b = torch.randint(65, (2, 300), generator=g)
    return (c[a] + c[b]) / 2, c


@hard
def dyadic_grid(g):
    return (
        torch.randint(-4, 5, (300, 3), generator=g).float() / 4,
        torch.randint(-4, 5, (127, 3), generator=g).float() / 4,
    )


@hard
def permutations_of_one_vector(g):
    # Equal distances in exact arithmetic, unequal ones by the last bits of each order of summation.
    base = torch.randn(31, generator=g)
    codes = torch.stack([base[torch.randperm(31, generator=g)] for _ in range(127)])
    return torch.full((65, 31), 0.3) * torch.randint(1, 4, (65, 1), generator=g), codes


@hard
def all_codes_equal(g):
    return torch.randn(65, 17, generator=g), torch.ones(1000, 17)


@hard
def collapsed_codebook(g):
    return torch.randn(200, 64, generator=g), (torch.rand(1000, 64, generator=g) * 2 - 1) / 1000


@hard
def mean_offset(g):
    x, c = gaussian(200, 300, 65, g)
    return x + 1e4, c + 1e4


@hard
def mean_offset_of_codes_only(g):
    x, c = gaussian(200, 300, 64, g)
    return x, c + 1e4


@hard
def norms_from_tiny_to_huge(g):
    x, c = gaussian(200, 127, 17, g)
    return (
        x * 10.0 ** torch.linspace(-30, 30, 200)[torch.randperm(200, generator=g), None],
        c * 10.0 ** torch.linspace(-30, 30, 127)[torch.randperm(127, generator=g), None],
    )


@hard
def one_huge_code(g):
    x, c = gaussian(300, 100, 64, g)
    c[13] *= 1e30
    return x, c


@hard
def overflow_in_float32(g):
    x, c = gaussian(65, 65, 31, g)
    return x * 1e25, c * 1e25


@hard
def largest_float32(g):
    top = torch.finfo(torch.float32).max
    return torch.tensor([[top, -top], [top, top], [0, top]]), torch.tensor([[-top, top], [top, 0], [top, -top], [0, 0]])


@hard
def float64_tie(g):
    return torch.full((7, 3), 1e17), torch.tensor([[1.0, 1, 1], [-1, -1, -1], [1, -1, 1]])


@hard
def denormals(g):
    x, c = gaussian(65, 65, 7, g)
    return x * 1e-41, c * 1e-41


@hard
def denormal_products(g):
    x, c = gaussian(65, 65, 64, g)
    return x * 1e-20, c * 1e-20


@hard
def some_codes_not_finite(g):
    x, c = gaussian(65, 127, 17, g)
    c[0, 3], c[1, 0], c[64, 16], c[126] = torch.nan, torch.inf, -torch.inf, torch.nan
    return x, c


@hard
def every_code_not_finite(g):
    x, c = gaussian(17, 65, 7, g)
    c[:, 3] = torch.nan
    return x, c


@hard
def some_rows_not_finite(g):
    x, c = gaussian(127, 65, 17, g)
    x[0, 3], x[17, 0], x[64, 16], x[126] = torch.nan, torch.inf, -torch.inf, torch.nan
    return x, c + 1


@hard
def zero_codes(g):
    x, c = gaussian(127, 65, 17, g)
    c[::2] = 0
    return x, c


@hard
def only_zero_codes(g):
    return torch.randn(17, 31, generator=g), torch.zeros(64, 31)


@hard
def zero_rows(g):
    return torch.zeros(17, 31), torch.randn(64, 31, generator=g)


@hard
def every_rounding_one_way(g):
    # Halved, the bfloat16 bound loses c_0 here: operands sit a quarter step off the grid, all on the same side.
    x = torch.cat([torch.full((32,), 1.00390625), torch.full((32,), 1.01171875), torch.zeros(32)])
    c = torch.zeros(2, 96)
    c[0, :32], c[1, 32:64], c[1, 64] = 1.00390625, 1.01171875, 0.75
    return x.repeat(3, 1), c


@hard
def wide_vectors(g):
    return gaussian(7, 17, 4099, g)


@hard
def many_codes_of_width_eight(g):
    return gaussian(300, 16384, 8, g)


@hard
def clusters(g):
    c = torch.randn(512, 64, generator=g)
    return c[torch.randint(512, (500,), generator=g)] + 0.01 * torch.randn(500, 64, generator=g), c
