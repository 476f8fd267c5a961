"""The examples of README and docs run, and print what the page says they print; links lead somewhere."""

import contextlib
import io
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
MADE = ROOT / "docs" / "generated"  # by a build of the site, in the form that the site needs
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted(page for page in (ROOT / "docs").rglob("*.md") if MADE not in page.parents),
]
NAMES = [page.relative_to(ROOT).as_posix() for page in PAGES]
BLOCKS = {
    f"{name}-{i}": block
    for name, page in zip(NAMES, PAGES, strict=True)
    for i, block in enumerate(re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.S))
}


@pytest.mark.parametrize("block", BLOCKS.values(), ids=BLOCKS)
def test_example(block):
    for peer in re.findall(r"^from (vector_quantize_pytorch) import", block, flags=re.M):
        pytest.importorskip(peer)  # the extra ``bench`` installs it
    promised = re.findall(r"print\(.*\) +# (.*)", block)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(block, "README.md", "exec"), {})
    assert printed.getvalue().splitlines() == promised and promised


def test_the_two_commands_stand_alone_on_their_lines():
    for command in (
        'pip install -e ".[bench]" && python benchmarks/bench_quantize.py',
        'pip install -e ".[test]" && pytest -n auto --dist loadfile',
    ):
        assert README.splitlines().count(command) == 1


def anchors(page):
    """The names that a heading can be linked by, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 130
