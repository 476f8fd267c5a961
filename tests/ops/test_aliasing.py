"""In-place ops refuse buffers that share memory with themselves or each other, as torch's own do."""

import pytest
import torch

from fastvq.ops import ema_update_, replace_dead_codes_


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
