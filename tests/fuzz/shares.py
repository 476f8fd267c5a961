"""How the examples of ``--fuzz`` are split over the fuzz tests."""

import pytest

DEFAULT = 300  # examples of all fuzz tests together, where --fuzz does not say


def share(items: list[pytest.Item], total: int) -> dict[str, int]:
    """Node id -> examples: ``total`` split over the tests marked ``fuzz`` by their weights, at least one each."""
    weights = {i.nodeid: m.kwargs.get("weight", 1) for i in items if (m := i.get_closest_marker("fuzz"))}
    whole = sum(weights.values())
    return {node: max(1, round(total * weight / whole)) for node, weight in weights.items()}
