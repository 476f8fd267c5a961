"""Sphinx builds the site from this folder: ``sphinx-build -W --keep-going docs out/site``.

The pages are plain Markdown that reads on a code host too. Two things are done to them here: links to files of the
repository are turned into links to pages of the site or downloads, and two pages are made from the sources
(``make_pages.py``). A public name without an entry in the API reference is a warning, so it stops the build.
"""

from __future__ import annotations

import importlib
import inspect
import re
import sys
from pathlib import Path
from typing import Any

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.application import Sphinx
from sphinx.util import logging
from sphinx.writers.html5 import HTML5Translator

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
sys.path.insert(0, str(DOCS))

import make_pages  # noqa: E402

import fastvq  # noqa: E402

project = "fastvq"
author = "the fastvq authors"
version = release = fastvq.__version__
extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]
exclude_patterns = ["generated"]
root_doc = "index"

html_theme = "furo"
html_title = "fastvq"
html_static_path = ["static"]
html_css_files = ["site.css"]
html_copy_source = False
highlight_language = "none"  # of blocks that name no language
html_theme_options = {"navigation_with_keys": True}

myst_enable_extensions = ["attrs_block", "dollarmath"]
myst_heading_anchors = 4
html_math_renderer = "mathml"

# The package itself is installed, compiled or not; what a page must not need is a GPU.
autodoc_typehints = "signature"
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 88
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_use_param = False
napoleon_use_ivar = True

# The packages whose ``__all__`` is the public interface; docs/reference has an entry for every name.
PUBLIC = (
    "fastvq",
    "fastvq.ops",
    "fastvq.nn",
    "fastvq.models",
    "fastvq.data",
    "fastvq.training",
    "fastvq.distributed",
    "fastvq.onnx",
)
# Files of the repository that are pages of the site under another name.
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "benchmarks/README.md": "measuring.md",
    "examples/README.md": "examples.md",
    "examples/notebooks/vqvae_from_nothing.ipynb": "notebooks/vqvae_from_nothing.md",
    "examples/notebooks/editing_a_part_of_a_picture.ipynb": "notebooks/editing_a_part_of_a_picture.md",
    "benchmarks/results/nvidia_h100_80gb_hbm3/summary.md": "h100.md",
}
LINK = re.compile(r"(\]\()([^)\s]+)(\))")


def on_site(link: str, origin: Path, page: Path) -> str:
    """The link of a file in folder ``origin`` as the site's ``page`` has to write it."""
    path, hash_, anchor = link.partition("#")
    if "://" in link or not path:
        return link
    target = (origin / path).resolve()
    if not target.exists():
        return link
    if target.is_relative_to(ROOT) and (renamed := PAGES.get(target.relative_to(ROOT).as_posix())):
        target = DOCS / renamed
    return Path(*_relative(target, page.parent)).as_posix() + hash_ + anchor


def _relative(target: Path, start: Path) -> list[str]:
    common = 0
    for one, other in zip(target.parts, start.parts, strict=False):
        if one != other:
            break
        common += 1
    return [".."] * (len(start.parts) - common) + list(target.parts[common:])


def rewrite_page(app: Sphinx, name: str, content: list[str]) -> None:
    page = DOCS / f"{name}.md"
    content[0] = LINK.sub(lambda m: m[1] + on_site(m[2], page.parent, page) + m[3], content[0])


def rewrite_included(app: Sphinx, path: Path, name: str, content: list[str]) -> None:
    origin, page = (DOCS / path).resolve().parent, DOCS / f"{name}.md"
    if origin == DOCS / "generated":  # its links are written for the page that includes it
        return
    content[0] = LINK.sub(lambda m: m[1] + on_site(m[2], origin, page) + m[3], content[0])


def describe_field(app: Sphinx, what: str, name: str, value: object, options: object, lines: list[str]) -> None:
    """A field of a NamedTuple has no docstring; the comment behind it in the source says what it holds."""
    if not lines or not lines[0].startswith("Alias for field number"):
        return
    module, owner, field = name.rsplit(".", 2)
    source = inspect.getsource(getattr(importlib.import_module(module), owner))
    comment = re.search(rf"^    {field}: .*?  # (.*)$", source, flags=re.M)
    lines[:] = [comment[1].replace("*", r"\*")] if comment else []


def check_public_names(app: Sphinx, error: Exception | None) -> None:
    if error is not None or app.builder.format != "html":
        return
    described = {name.rpartition(".")[2] for name in app.env.get_domain("py").objects}  # type: ignore[attr-defined]
    for module in PUBLIC:
        public: Any = importlib.import_module(module)
        for name in public.__all__:
            documentable = inspect.isclass(one := getattr(public, name)) or inspect.isroutine(one)
            earlier = documentable and one.__name__ != name  # the name that earlier versions had
            if documentable and not earlier and name not in described:
                logging.getLogger(__name__).warning("%s.%s has no entry in docs/reference", module, name)


def write_formula(self: HTML5Translator, node: nodes.math | nodes.math_block) -> None:
    """MathML, which browsers draw themselves: the site needs no script from another server."""
    block = isinstance(node, nodes.math_block)
    source = node.astext().replace("\\textstyle", "")  # a size that this converter does not know inside a formula
    if "&" in source or "\\\\" in source:
        source = f"\\begin{{aligned}}{source}\\end{{aligned}}"
    formula = tex2mathml(source, as_block=block)
    self.body.append(f'<div class="math">{formula}</div>' if block else formula)
    raise nodes.SkipNode


def setup(app: Sphinx) -> None:
    app.add_html_math_renderer("mathml", (write_formula, None), (write_formula, None))
    make_pages.write(DOCS / "generated")
    app.connect("source-read", rewrite_page)
    app.connect("include-read", rewrite_included)
    app.connect("autodoc-process-docstring", describe_field)
    app.connect("build-finished", check_public_names)
