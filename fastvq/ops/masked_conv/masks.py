"""Which taps of a kernel count."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

__all__ = ["COLOUR_MASKS", "MASKS", "MaskName", "active_taps", "tap_range"]

MaskName = Literal["A", "B", "vertical-A", "vertical-B", "horizontal-A", "horizontal-B"]
MASKS = ("A", "B", "vertical-A", "vertical-B", "horizontal-A", "horizontal-B")
COLOUR_MASKS = ("A", "B", "horizontal-A", "horizontal-B")


def tap_range(mask: str, kh: int, kw: int, colours: int) -> range:
    """Places in the kernel, row by row, of the taps that any weight is used at; all of them for mask "custom"."""
    centre_row, centre = kh // 2, (kh // 2) * kw + kw // 2
    kind, _, letter = mask.rpartition("-")
    if mask == "custom":
        return range(kh * kw)
    if kind == "vertical":
        return range((centre_row + (letter == "B")) * kw)
    # With colours, mask A sees the centre too: groups see those before them.
    return range(centre_row * kw if kind == "horizontal" else 0, centre + (letter == "B" or colours > 1))


def active_taps(mask: str, taps: Tensor | None, kh: int, kw: int, colours: int) -> list[int]:
    """``tap_range``, and for mask "custom" the places where ``taps`` is True."""
    places = tap_range(mask, kh, kw, colours)
    if taps is None:
        return list(places)
    return [i for i, used in zip(places, taps.flatten().tolist(), strict=True) if used]
