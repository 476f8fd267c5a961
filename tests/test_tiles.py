"""Tile tables: which row serves a card, and what tuning remembers; card and clock are stand-ins."""

import json

import pytest
import torch

from fastvq.backends import tiles
from fastvq.backends import triton as triton_backend
from fastvq.backends.tiles import Tile, pick

CARD = torch.device("cuda", 0)
TABLE = [
    Tile(80, 64, torch.float16, {"BM": 1}),
    Tile(80, 256, torch.float16, {"BM": 2}),
    Tile(90, 128, torch.float16, {"BM": 3}),
    Tile(80, 64, torch.bfloat16, {"BM": 4}),
]


@pytest.fixture
def card(monkeypatch, tmp_path):
    """card(capability): pretends that it is there; the cache lies in a folder of the test's."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a card")
    tiles._remembered.cache_clear()
    yield lambda capability: monkeypatch.setattr(triton_backend, "capability", lambda device: capability)
    tiles._remembered.cache_clear()


@pytest.mark.parametrize(
    ("capability", "dim", "dtype", "row"),
    [
        (80, 8, torch.float16, 1), (80, 64, torch.float16, 1), (80, 65, torch.float16, 2),
        (90, 64, torch.float16, 3), (90, 129, torch.float16, 2), (103, 128, torch.float16, 3),
        (90, 64, torch.bfloat16, 4),
    ],
)  # fmt: skip
def test_the_newest_row_that_fits_is_taken(card, capability, dim, dtype, row):
    card(capability)
    assert pick("kernel", TABLE, CARD, dim, dtype)["BM"] == row


def test_no_row_fits(card):
    card(80)
    with pytest.raises(ValueError, match=r"kernel: no tile for capability 80, width 65 and torch.bfloat16"):
        pick("kernel", TABLE, CARD, 65, torch.bfloat16)


def test_tuning_takes_the_fastest_and_remembers_it(card, monkeypatch, tmp_path):
    testing = pytest.importorskip("triton.testing", reason="needs the package triton")
    card(90)
    milliseconds = {1: 3.0, 2: 1.0, 3: 2.0}
    launched = []

    def clock(call, warmup, rep):
        call()
        return milliseconds[launched[-1]["BM"]]

    monkeypatch.setattr(testing, "do_bench", clock)
    assert pick("kernel", TABLE, CARD, 64, torch.float16, launched.append)["BM"] == 3 and not launched  # not asked for
    monkeypatch.setenv("FASTVQ_AUTOTUNE", "1")
    assert pick("kernel", TABLE, CARD, 64, torch.float16, launched.append)["BM"] == 2
    assert [meta["BM"] for meta in launched] == [1, 2, 3]
    tiles._remembered.cache_clear()  # as a process that starts later
    assert pick("kernel", TABLE, CARD, 64, torch.float16, launched.append)["BM"] == 2 and len(launched) == 3
    (key, row), *_ = json.loads((tmp_path / "fastvq" / "tiles.json").read_text()).items()
    assert key.startswith("a card|kernel|64|") and row == 1
    changed = [*TABLE[:2], TABLE[2]._replace(meta={"BM": 1})]
    assert pick("kernel", changed, CARD, 64, torch.float16, launched.append)["BM"] == 2
    assert len(launched) == 6  # another table is timed anew


@pytest.mark.parametrize("content", ["{", "[1]", '{"a card": "x"}'])
def test_a_damaged_file_is_as_good_as_none(card, monkeypatch, tmp_path, content):
    testing = pytest.importorskip("triton.testing", reason="needs the package triton")
    card(80)
    (tmp_path / "fastvq").mkdir()
    (tmp_path / "fastvq" / "tiles.json").write_text(content)
    monkeypatch.setenv("FASTVQ_AUTOTUNE", "1")
    monkeypatch.setattr(testing, "do_bench", lambda call, warmup, rep: 1.0)
    assert pick("kernel", TABLE, CARD, 64, torch.float16, lambda meta: None)["BM"] == 1
    assert list(json.loads((tmp_path / "fastvq" / "tiles.json").read_text()).values()) == [0]


def test_a_folder_that_cannot_be_written_costs_no_result(card, monkeypatch, tmp_path):
    testing = pytest.importorskip("triton.testing", reason="needs the package triton")
    card(80)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setenv("FASTVQ_AUTOTUNE", "1")
    monkeypatch.setattr(testing, "do_bench", lambda call, warmup, rep: 1.0)
    assert pick("kernel", TABLE, CARD, 64, torch.float16, lambda meta: None)["BM"] == 1
