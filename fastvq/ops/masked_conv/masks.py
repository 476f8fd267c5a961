"""Which taps of a kernel count."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["COLOUR_MASKS", "MASKS", "active_taps", "active_weights", "tap_range"]

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


def active_weights(
    mask: str,
    taps: Tensor | None,  # [kh, kw] bool, for mask "custom"
    colours: int,
    shape: torch.Size,  # [C_out, C_in, kh, kw]
    device: torch.device,
) -> Tensor:  # bool, broadcasts to shape
    """True where a weight counts."""
    c_out, c_in, kh, kw = shape
    used = torch.zeros(kh * kw, dtype=torch.bool, device="cpu")
    used[active_taps(mask, taps, kh, kw, colours)] = True
    used = used.view(1, 1, kh, kw)
    if colours > 1:
        used = used.repeat(c_out, c_in, 1, 1)
        group_out, group_in = (torch.arange(n, device="cpu") * colours // n for n in (c_out, c_in))
        before = torch.le if mask.endswith("B") else torch.lt
        used[:, :, kh // 2, kw // 2] = before(group_in[None, :], group_out[:, None])
    return used.to(device)
