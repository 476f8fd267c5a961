"""Every row of docs/what_happens_when.md names tests that there are; pages of notebooks hold their present cells; every
picture has an alt text and a caption; the reference has every public name."""

import importlib
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "docs" / "what_happens_when.md").read_text()


@pytest.mark.parametrize(("section", "least"), [("Archives", 11), ("Resume", 11), ("Damaged files", 8)])
def test_every_row_is_tested(section, least):
    rows = 0
    place = ""
    for line in TEXT.split(f"\n## {section}\n")[1].split("\n## ")[0].splitlines():
        if found := re.match(r"\|.*test in `(tests/[\w/]+\.py)` \|$", line):
            place = found[1]
        elif line.startswith("| "):
            names = re.findall(r"`(test_\w+)[^`]*`(?: \(`(tests/[\w/]+\.py)`\))?", line.split("|")[-2])
            assert names, line
            for name, other in names:
                assert f"\ndef {name}(" in (ROOT / (other or place)).read_text(), name
            rows += 1
    assert rows >= least


@pytest.mark.parametrize("notebook", sorted((ROOT / "examples" / "notebooks").glob("*.ipynb")), ids=lambda p: p.stem)
def test_the_page_of_a_notebook_has_its_cells(notebook):
    """``python docs/notebooks.py`` writes it."""
    page = (ROOT / "docs" / "notebooks" / f"{notebook.stem}.md").read_text()
    at = 0
    for cell in json.loads(notebook.read_text())["cells"]:
        at = page.index("".join(cell["source"]), at)


@pytest.mark.parametrize("page", ["README.md", *sorted(p.relative_to(ROOT) for p in (ROOT / "docs").rglob("*.md"))])
def test_every_picture_has_an_alt_text_and_a_caption(page):
    text = (ROOT / page).read_text()
    for alt, below in re.findall(r"^!\[(.*?)\]\([^)]+\)\n\n?(.*)", text, flags=re.M):
        assert len(alt) > 10 and below.startswith("*"), alt
    assert len(re.findall(r"!\[", text)) == len(re.findall(r"^!\[.*?\]\([^)]+\)\n\n?\*", text, flags=re.M))


PUBLIC = ("fastvq", "fastvq.ops", "fastvq.nn", "fastvq.models", "fastvq.data", "fastvq.training")


def test_the_reference_has_every_public_name_and_no_other():
    described = set()
    for page in (ROOT / "docs" / "reference").glob("*.md"):
        module = ""
        for line in page.read_text().splitlines():
            if found := re.match(r"\.\. (currentmodule|autofunction|autoclass|autoexception):: (\S+)", line):
                if found[1] == "currentmodule":
                    module = found[2]
                    continue
                path = found[2] if found[2].startswith("fastvq.") else f"{module}.{found[2]}"
                place, _, name = path.rpartition(".")
                described.add(getattr(importlib.import_module(place), name))
    for module in PUBLIC:
        for name in importlib.import_module(module).__all__:
            one = getattr(importlib.import_module(module), name)
            if isinstance(one, type) or getattr(one, "__name__", "") == name:
                assert one in described, f"{module}.{name}"


def test_every_page_is_in_the_contents():
    listed = set(re.findall(r"^([\w/]+)$", (ROOT / "docs" / "index.md").read_text(), flags=re.M))
    pages = {p.relative_to(ROOT / "docs").with_suffix("").as_posix() for p in (ROOT / "docs").rglob("*.md")}
    assert {page for page in pages if not page.startswith("generated/")} - {"index"} <= listed
