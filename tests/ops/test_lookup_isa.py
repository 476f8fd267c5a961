"""Which instruction set a lookup takes where the best one has matrix tiles: tried on a few rows, never by the result.

Tiles are played by the weakest kernels of this machine, so that the tests run everywhere; by emulated tiles where the
build has them.
"""

import pytest
import torch

from fastvq.backends import cpu as cpu_backend
from fastvq.ops import nearest, pack_codebook, quantize, residual_quantize
from fastvq.ops.nearest import cpu_isa
from tests.support import oracle
from tests.support.cases import gaussian, generator

HERE = [isa for isa in cpu_backend.available_isas() if isa != "amx"]
OTHER = cpu_backend.ISAS[HERE[-1]]


@pytest.fixture
def tiles(monkeypatch):
    """tiles(name): lookups take ``name`` for AMX. Returns what the kernels ran with."""
    ran = []

    def take(name):
        monkeypatch.setattr(cpu_backend, "ISAS_HERE", [*HERE, "amx"])
        monkeypatch.setitem(cpu_backend.ISAS, "amx", cpu_backend.ISAS[name])
        real = cpu_backend._cpu.nearest

        def spy(rows, codes, metric, fast, indices, isa, *rest):
            ran.append((isa, rows[2], rows[3] * rows[4], codes[3]))
            return real(rows, codes, metric, fast, indices, isa, *rest)

        monkeypatch.setattr(cpu_backend._cpu, "nearest", spy)
        return ran

    return take


def shapes():
    """x and codebooks whose views have one head or two, one stride of rows or two."""
    g = generator(3)
    image = torch.randn(31, 33, 16, 17, generator=g)
    yield torch.randn(8209, 33, generator=g), torch.randn(3000, 33, generator=g)
    yield image.movedim(1, -1), torch.randn(70, 33, generator=g)
    yield torch.randn(8209, 66, generator=g)[:, ::2], torch.randn(140, 33, generator=g)[::2]
    yield torch.randn(2, 8209, 40, generator=g), torch.randn(2, 2100, 40, generator=g)
    yield torch.randn(4500, 1, 40, generator=g).expand(-1, 2, -1), torch.randn(70, 40, generator=g)


@pytest.mark.parametrize("most_open", [-1.0, 1.0])
def test_a_few_rows_of_any_view_are_tried(most_open, tiles, monkeypatch):
    monkeypatch.setattr(cpu_isa, "MOST_OPEN", most_open)
    ran = tiles("generic")
    for x, codebook in shapes():
        ran.clear()
        got = nearest(x, codebook, backend="cpu")
        (isa, heads, n_rows, n_codes), (chosen, *_) = ran
        assert isa == cpu_backend.ISAS["generic"] and heads == 1
        assert cpu_isa.TRIED_ROWS / 2 <= n_rows <= cpu_isa.TRIED_ROWS
        assert n_codes <= 2 * cpu_isa.TRIED_CODES
        assert chosen == (cpu_backend.ISAS["generic"] if most_open == 1 else OTHER)
        expected = nearest(x, codebook, backend="reference")
        assert torch.equal(got, expected)


def test_a_small_call_and_a_packed_codebook_try_nothing(tiles):
    ran = tiles("generic")
    x, codebook = gaussian(8200, 40, 33, generator(0))
    few = nearest(x[:1000], codebook, backend="cpu")
    packed = pack_codebook(codebook)
    assert torch.equal(nearest(x, packed)[:1000], few) and torch.equal(
        few, oracle.nearest(x[:1000], codebook, "euclidean")
    )
    assert [isa for isa, *_ in ran] == [OTHER, OTHER]


def test_fast_and_narrow_try_nothing(tiles):
    ran = tiles("generic")
    x, codebook = gaussian(8200, 40, 33, generator(0))
    nearest(x, codebook, precision="fast", backend="cpu")
    nearest(x[:, :31], codebook[:, :31], backend="cpu")
    assert [isa for isa, *_ in ran] == [OTHER, OTHER]


def test_a_named_instruction_set_is_taken(tiles, monkeypatch):
    ran = tiles("generic")
    monkeypatch.setenv("FASTVQ_CPU_ISA", "amx")
    nearest(*gaussian(8200, 40, 33, generator(0)), backend="cpu")
    assert [isa for isa, *_ in ran] == [cpu_backend.ISAS["generic"]]


def test_ops_that_look_up_try_too(tiles):
    x, codebook = gaussian(8200, 40, 33, generator(0))
    plain = quantize(x, codebook), residual_quantize(x, codebook.view(2, 20, 33))
    ran = tiles("generic")
    again = quantize(x, codebook), residual_quantize(x, codebook.view(2, 20, 33))
    assert [(rows, codes) for _, _, rows, codes in ran] == [(256, 40), (256, 20)]
    for before, after in zip(plain, again, strict=True):
        assert torch.equal(before.indices, after.indices) and torch.equal(before.quantized, after.quantized)


@pytest.mark.skipif("emulated" not in HERE, reason="this build has no emulated tiles (FASTVQ_EMULATED_TILES=1)")
def test_tiles_are_taken_where_bfloat16_decides(tiles):
    ran = tiles("emulated")
    x, codebook = gaussian(8200, 300, 48, generator(0))
    nearest(x, codebook, backend="cpu")
    assert ran[-1][0] == cpu_backend.ISAS["emulated"]
    # As patches of photographs: most of the length is how bright they are.
    g = generator(4)
    smooth, codes = (30 * torch.randn(n, 1, generator=g) + torch.randn(n, 48, generator=g) for n in (8200, 300))
    got = nearest(smooth, codes, backend="cpu")
    assert ran[-1][0] == OTHER and torch.equal(got, oracle.nearest(smooth, codes, "euclidean"))
