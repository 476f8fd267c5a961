"""Runs the notebooks in examples/notebooks and writes them, with what they print and draw, as pages: docs/notebooks.

``python docs/notebooks.py`` takes a few minutes. tests/test_docs.py fails where a page is not of the present notebook.
"""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # no display is needed to write a file
import matplotlib.pyplot as plt
import torch
from PIL import Image

DOCS = Path(__file__).resolve().parent
NOTEBOOKS = DOCS.parent / "examples" / "notebooks"
# What each figure shows; a figure without an entry stops the run.
CAPTIONS = {
    "vqvae_from_nothing-1": "Digits, what their ids decode to, and the ids as colours, with the hand-made quantizer",
    "vqvae_from_nothing-2": "The same with fastvq's quantizer, which uses more codes",
    "vqvae_from_nothing-3": "The loss of both trainings over the steps",
    "editing_a_part_of_a_picture-1": "A digit drawn for each label",
    "editing_a_part_of_a_picture-2": "The upper half of a 4 replaced by the ids of another picture",
    "editing_a_part_of_a_picture-3": "The upper half of a 4 painted with the code of the background",
    "editing_a_part_of_a_picture-4": "The upper half of a 4 drawn again with the label 9",
}


def page(path: Path) -> str:
    """The cells in Markdown; below each code cell what it printed, and the figures that it showed."""
    parts, names = [], {"__name__": "__main__"}
    pictures: list[str] = []
    for cell in json.loads(path.read_text())["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
            continue
        parts.append(f"```py\n{source}\n```")
        printed = run(source, names, path.stem, pictures)
        if printed:
            parts.append(printed)
    return "\n\n".join(parts) + "\n"


def run(source: str, names: dict[str, Any], stem: str, pictures: list[str]) -> str:
    shown: list[str] = []

    def show() -> None:
        name = f"{stem}-{len(pictures) + 1}.png"
        data = io.BytesIO()
        plt.gcf().savefig(data, dpi=90, bbox_inches="tight")
        plt.close("all")
        picture = Image.open(data).convert("RGB").quantize(256, dither=Image.Dither.NONE)
        picture.save(DOCS / "images" / "notebooks" / name, optimize=True)
        pictures.append(name)
        caption = CAPTIONS[name.removesuffix(".png")]
        shown.append(f"![{caption}](../images/notebooks/{name})\n\n*{caption}.*")

    printed, before, plt.show = io.StringIO(), plt.show, show
    try:
        with contextlib.redirect_stdout(printed):
            exec(compile(source, stem, "exec"), names)
    finally:
        plt.show = before
    text = printed.getvalue().rstrip()
    return "\n\n".join([f"```\n{text}\n```"] * bool(text) + shown)


if __name__ == "__main__":
    torch.set_num_threads(1)
    for folder in (DOCS / "notebooks", DOCS / "images" / "notebooks"):
        folder.mkdir(exist_ok=True)
    for notebook in sorted(NOTEBOOKS.glob("*.ipynb")):
        (DOCS / "notebooks" / f"{notebook.stem}.md").write_text(page(notebook))
