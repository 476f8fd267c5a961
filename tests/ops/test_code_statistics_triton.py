"""The Triton statistics in the interpreter: cut codes, wide rows, keys of every width, atomics, wild indices."""

import pytest
import torch

from fastvq.backends import triton as triton_backend
from fastvq.ops import code_statistics

if triton_backend.unavailable() is not None or not triton_backend.interpreting():
    pytest.skip("the interpreter is used where there is no GPU", allow_module_level=True)

from fastvq.ops.statistics import triton_statistics
from tests.ops.test_code_statistics import check, draw
from tests.support.cases import DTYPES, generator

CHUNK = triton_statistics.CHUNK


@pytest.mark.parametrize("n,k,d", [(1, 1, 1), (7, 7, 3), (300, 17, 31), (65, 3, 65), (31, 5, 1000), (127, 300, 2)])
def test_sizes(n, k, d):
    check(*draw(n, k, d, n + k + d), k, "triton")


@pytest.mark.parametrize("sizes", [(CHUNK, CHUNK + 1, 1), (0, 3 * CHUNK - 1, 0, 5), (2 * CHUNK + 1, 2 * CHUNK, CHUNK)])
def test_codes_of_many_rows_are_cut_in_pieces(sizes):
    g = generator(1)
    indices = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    indices = torch.cat([indices, torch.full((9,), -1)])[torch.randperm(sum(sizes) + 9, generator=g)]
    x = torch.randn(len(indices), 17, generator=g)
    x[::50, 3] = torch.nan
    check(x, indices, len(sizes), "triton")


def test_cut_codes_of_several_heads():
    g = generator(2)
    x, indices = torch.randn(3, 600, 5, generator=g), torch.zeros(3, 600, dtype=torch.int64)
    indices[1, ::2] = 1
    sums, counts = code_statistics(x, indices, 2, n_heads=3, backend="triton")
    for h in range(3):
        alone = code_statistics(x[h], indices[h], 2, backend="triton")
        assert torch.equal(sums[h], alone[0]) and torch.equal(counts[h], alone[1])
        check(x[h], indices[h], 2, "triton")


@pytest.mark.parametrize("d", [triton_statistics.WIDEST, triton_statistics.WIDEST + 1])
@pytest.mark.parametrize("deterministic", [True, False])
def test_rows_wider_than_a_tile(d, deterministic):
    x, indices = draw(21, 3, d, 3)
    x[2, 0], x[5, d - 1], x[7, d // 2] = torch.inf, torch.nan, -torch.inf
    x = x.round(decimals=0)  # float32 adds small integers exactly, in any order
    check(x, indices, 3, "triton", deterministic=deterministic)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("deterministic", [True, False])
def test_dtypes_and_strides(dtype, deterministic):
    g = generator(4)
    images = torch.randint(-9, 10, (2, 19, 5, 7), generator=g).to(dtype)
    for x in (images.movedim(1, -1), images.permute(3, 0, 2, 1), images[:1, :, :1].movedim(1, -1).expand(2, 4, 7, 19)):
        check(x, torch.randint(-1, 7, x.shape[:-1], generator=g), 7, "triton", deterministic=deterministic)


@pytest.mark.parametrize("n_keys", [255, 256, 32767, 32768])
def test_keys_are_as_narrow_as_holds_all(n_keys):
    narrow = triton_statistics._key_type(n_keys)
    assert torch.iinfo(narrow).max >= n_keys
    assert torch.tensor([n_keys], dtype=torch.int64).to(narrow).long() == n_keys


def test_the_last_key_of_a_type():
    """Rows left out get the key K, here the largest of uint8."""
    indices = torch.arange(-1, 255)
    check(torch.randn(256, 1, generator=generator(5)), indices, 255, "triton")


@pytest.mark.parametrize("deterministic", [True, False])
def test_an_index_that_is_no_code_writes_nothing(deterministic, monkeypatch):
    """On a GPU indices are not checked: such rows must be left out, not added elsewhere."""
    monkeypatch.setattr(triton_statistics, "check_indices", lambda *_: None)
    x, indices = draw(200, 7, 5, 6)
    x = x.round(decimals=0)
    wild = indices.clone()
    wild[::5] = torch.tensor([7, 2**40, -2, -(2**62), 2**33 + 3]).repeat(8)
    indices[::5] = -1
    for n_heads in (None, 4):
        shape = (200,) if n_heads is None else (4, 50)
        got, expected = (
            code_statistics(x.view(*shape, 5), i.view(shape), 7, n_heads=n_heads, deterministic=d, backend="triton")
            for i, d in ((wild, deterministic), (indices, True))
        )
        assert all(map(torch.equal, got, expected))
