"""Pictures of a trained model: id maps, codes as swatches, an edit before and after."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from matplotlib.figure import Figure
from pictures_codes import RED, bare
from torch import Tensor

from fastvq.data import open_data
from fastvq.models import VQVAE, Prior, edit

__all__ = ["PICTURES"]

GREY = {"cmap": "gray", "vmin": -1, "vmax": 1}


def held_out(labels: list[int]) -> Tensor:  # [B, 1, 28, 28]
    """One held-out digit of each label."""
    source = open_data("digits", "held-out")
    found = {}
    for i in range(len(source)):
        picture = source.read(i)
        found.setdefault(picture.label, picture.pixels)
    return torch.stack([found[label] for label in labels]).float() / 127.5 - 1


def swatches(model: VQVAE) -> Tensor:  # [K, 4, 4]
    """Every code, decoded in a map of itself: the middle of the picture."""
    ids = torch.arange(model.n_codes[0]).view(-1, 1, 1).expand(-1, 7, 7)
    with torch.no_grad():
        return model.decode_maps([ids])[:, 0, 12:16, 12:16]


def digits(runs: Path) -> Figure:
    """Digits, the maps of 7 x 7 ids that they become, and what the ids decode to."""
    model = VQVAE.from_pretrained(runs / "vqvae")
    images = held_out([3, 5, 8, 9])
    (ids,) = model.encode_maps(images)
    with torch.no_grad():
        decoded = model.decode_maps([ids])
    figure, panels = plt.subplots(3, 4, figsize=(7, 5.4))
    for column in range(4):
        bare(panels[0, column]).imshow(images[column, 0], **GREY)
        bare(panels[1, column]).imshow(ids[column], cmap="nipy_spectral", vmin=0, vmax=255)
        for (y, x), number in zip(torch.cartesian_prod(*[torch.arange(7)] * 2), ids[column].flatten(), strict=True):
            panels[1, column].text(x, y, int(number), ha="center", va="center", fontsize=4.5, color="white")
        bare(panels[2, column]).imshow(decoded[column, 0], **GREY)
    for row, name in enumerate(("picture", "ids", "decoded")):
        panels[row, 0].set_ylabel(name)
    return figure


def codebook(runs: Path) -> Figure:
    """The 256 codes as swatches."""
    model = VQVAE.from_pretrained(runs / "vqvae")
    tiles = swatches(model)
    tiles = tiles[tiles.mean((1, 2)).argsort()]
    page = torch.zeros(16 * 5 - 1, 16 * 5 - 1)  # grey between the swatches
    for k, tile in enumerate(tiles):
        page[5 * (k // 16) : 5 * (k // 16) + 4, 5 * (k % 16) : 5 * (k % 16) + 4] = tile
    figure, panel = plt.subplots(figsize=(4.2, 4.2))
    bare(panel).imshow(page, **GREY)
    return figure


def before_and_after(runs: Path) -> Figure:
    """An edit of the upper half of a 4: ids before, ids after, and what changed in the picture."""
    model, prior = VQVAE.from_pretrained(runs / "vqvae"), Prior.from_pretrained(runs / "prior" / "level0")
    image, box = held_out([4]), (4, 0, 24, 12)
    edited = edit(
        model, image, box, prior=[prior], labels=9, n_candidates=16, generator=torch.Generator().manual_seed(1)
    )
    (before,), (after,) = model.encode_maps(image), edited.maps
    change = (edited.image - edited.reconstruction)[0, 0]
    figure, panels = plt.subplots(1, 6, figsize=(11.5, 2.4))
    ids = {"cmap": "nipy_spectral", "vmin": 0, "vmax": 255}
    for panel, title, shown, style in zip(
        panels,
        ("picture", "decoded", "ids before", "ids after", "edited", "change"),
        (image[0, 0], edited.reconstruction[0, 0], before[0], after[0], edited.image[0, 0], change),
        (GREY, GREY, ids, ids, GREY, {"cmap": "RdBu", "vmin": -2, "vmax": 2}),
        strict=True,
    ):
        bare(panel, title).imshow(shown, **style)
    x0, y0, x1, y1 = box
    for panel in (panels[0], panels[5]):
        panel.add_patch(plt.Rectangle((x0 - 0.5, y0 - 0.5), x1 - x0, y1 - y0, fill=False, ec=RED, lw=1.5))
    return figure


PICTURES: dict[str, Callable[[Path], Figure]] = {"digits": digits, "codebook": codebook, "edit": before_and_after}
