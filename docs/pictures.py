"""Draws the pictures of docs/concepts: ``python docs/pictures.py``, after the two trainings that some of them show:

``fastvq train vqvae --data digits && fastvq train prior``, four minutes on one thread. Another folder of runs may
follow: ``python docs/pictures.py runs``.
"""

from __future__ import annotations

import io
import sys
from pathlib import Path

import matplotlib
import torch

matplotlib.use("Agg")  # no display is needed to write a file
import matplotlib.pyplot as plt
import pictures_codes
import pictures_models
from matplotlib.figure import Figure
from PIL import Image

OUT = Path(__file__).resolve().parent / "images" / "concepts"


def save(name: str, figure: Figure) -> None:
    """Writes a picture of at most 256 colours, a third of the bytes of one with all colours."""
    data = io.BytesIO()
    figure.savefig(data, dpi=110, bbox_inches="tight")
    plt.close(figure)
    Image.open(data).convert("RGB").quantize(256, dither=Image.Dither.NONE).save(OUT / f"{name}.png", optimize=True)


def main(runs: Path) -> None:
    plt.rcParams.update({"font.size": 10, "axes.titlesize": 10, "figure.constrained_layout.use": True})
    torch.set_num_threads(1)
    for name, draw in pictures_codes.PICTURES.items():
        torch.manual_seed(0)
        save(name, draw())
    for name, draw_run in pictures_models.PICTURES.items():
        torch.manual_seed(0)
        save(name, draw_run(runs))


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs"))
