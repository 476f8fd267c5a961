"""Every row of docs/what_happens_when.md names tests that there are."""

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
