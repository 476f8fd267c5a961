"""In-place ops refuse buffers that share memory with themselves or each other, as torch's own do."""

import pytest
import torch

from fastvq.ops import ema_update_, replace_dead_codes_
from tests.support.cases import generator


def buffers():
    return torch.randn(10, 8), torch.randn(10, 8), torch.ones(10)


def update(codebook, embed_sum, cluster_size, sums=None, counts=None, backend=None):
    sums = torch.ones(10, 8) if sums is None else sums
    counts = torch.ones(10, dtype=torch.int64) if counts is None else counts
    ema_update_(codebook, embed_sum, cluster_size, sums, counts, decay=0.9, backend=backend)


@pytest.mark.parametrize("place", range(3))
def test_a_buffer_with_two_elements_in_one_place(place, engine):
    given = list(buffers())
    given[place] = given[place][:1].expand(given[place].shape)
    with pytest.raises(RuntimeError, match="more than one element of the written-to tensor"):
        update(*given, backend=engine)
    with pytest.raises(RuntimeError, match="more than one element of the written-to tensor"):
        replace_dead_codes_(*given, torch.randn(20, 8), threshold=2.0, backend=engine)


def test_strides_that_meet():
    given = list(buffers())
    given[0] = torch.randn(200).as_strided((10, 8), (1, 3))
    with pytest.raises(RuntimeError, match="more than one element of the written-to tensor codebook"):
        update(*given)
    given[0] = torch.randn(200).as_strided((10, 8), (1, 10))  # columns one after another do not
    update(*given)


def test_buffers_that_share_memory(engine):
    codebook, embed_sum, cluster_size = buffers()
    both = torch.randn(10, 17)
    for given in (
        (codebook, codebook, cluster_size),
        (codebook, embed_sum, embed_sum.view(-1)[:10]),
        (codebook, embed_sum, cluster_size, embed_sum),
        (both[:, :8], both[:, 7:15], both[:, 16]),
    ):
        with pytest.raises(RuntimeError, match=r"of the written-to tensor .* refer to a single memory location"):
            update(*given, backend=engine)
    with pytest.raises(RuntimeError, match="of the written-to tensor codebook refer to a single memory location"):
        replace_dead_codes_(codebook, embed_sum, cluster_size, codebook[2:], threshold=2.0, backend=engine)


def test_views_that_lie_between_each_other(engine):
    """One tensor holds all three buffers: no place is shared, and the result is that of separate ones."""
    separate = buffers()
    together = torch.cat([separate[0], separate[1], separate[2][:, None]], dim=1)
    update(*separate, backend=engine)
    update(together[:, :8], together[:, 8:16], together[:, 16], backend=engine)
    assert torch.equal(together, torch.cat([separate[0], separate[1], separate[2][:, None]], dim=1))


@pytest.mark.parametrize("place", range(3))
@pytest.mark.parametrize("negative", [torch._neg_view, lambda t: torch.complex(t, t).conj().imag], ids=["view", "imag"])
def test_a_written_buffer_that_is_a_negative_view(place, negative, engine):
    """Refused before anything is written."""
    given = list(buffers())
    given[place] = negative(given[place])
    before = [t.clone() for t in given]
    name = ("codebook", "embed_sum", "cluster_size")[place]
    for call in (
        lambda: update(*given, backend=engine),
        lambda: replace_dead_codes_(*given, torch.randn(20, 8), threshold=2.0, backend=engine),
    ):
        with pytest.raises(ValueError, match=f"{name} is written in place and must not be a negative view"):
            call()
    assert all(torch.equal(t, b) for t, b in zip(given, before, strict=True))


def test_a_negative_view_that_is_only_read(engine):
    sums, x = torch.randn(10, 8), torch.randn(20, 8)
    first, second = buffers(), buffers()
    for a, b in zip(first, second, strict=True):
        b.copy_(a)
    update(*first, sums=-sums, backend=engine)
    update(*second, sums=torch._neg_view(sums), backend=engine)
    replace_dead_codes_(*first, -x, threshold=0.95, generator=generator(0), backend=engine)
    replace_dead_codes_(*second, torch._neg_view(x), threshold=0.95, generator=generator(0), backend=engine)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
