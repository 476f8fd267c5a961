"""The machinery of the fuzz tests: shares, seeds, and a fault that is found and shrunk."""

from types import SimpleNamespace

import pytest
from hypothesis import strategies as st

from tests.fuzz.examples import ROUND, Examples
from tests.fuzz.shares import share


def item(name, **marker):
    return SimpleNamespace(nodeid=name, get_closest_marker=lambda _: SimpleNamespace(kwargs=marker) if marker else None)


def test_examples_are_split_by_weight_over_the_tests_that_run():
    items = [item("a", weight=3), item("b", weight=1), item("no fuzz test"), item("c", weight=0.001)]
    assert share(items, 4000) == {"a": 2999, "b": 1000, "c": 1}
    assert share(items[:1], 4000) == {"a": 4000}


def test_a_seed_gives_the_same_examples_and_another_gives_others():
    def run(seed):
        seen = []
        Examples(ROUND + 50, seed)(lambda n: seen.append(n), n=st.integers())
        return seen

    first = run(0)
    assert len(first) == ROUND + 50 and first == run(0) != run(1)


def test_a_fault_is_found_and_shrunk():
    def check(n):
        assert n < 1000

    with pytest.raises(AssertionError) as caught:
        Examples(200, 0)(check, n=st.integers(0, 1 << 20))
    assert any("n=1000" in note for note in caught.value.__notes__)


def test_the_fixture_carries_the_share(fuzz):
    assert fuzz.count == 1 and fuzz.seed >= 0
