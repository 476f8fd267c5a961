"""The scripts that draw the pictures of docs and run its notebooks find every name of fastvq that they use."""

import ast
import importlib
import sys
import types
from pathlib import Path

import pytest
import torch
from PIL import Image

pytest.importorskip("matplotlib", reason="needs matplotlib, which is not installed")
DOCS = Path(__file__).parents[1] / "docs"
SCRIPTS = ("pictures", "pictures_codes", "pictures_models", "notebooks")


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(DOCS)
    yield importlib.import_module
    for name in SCRIPTS:
        sys.modules.pop(name, None)


def missing(tree: ast.AST, names: dict[str, object]) -> list[str]:
    """Attributes, asked of modules and classes of fastvq, that there are none of."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            owner = names.get(node.value.id)
            name = owner.__name__ if isinstance(owner, types.ModuleType) else getattr(owner, "__module__", "") or ""
            if name.partition(".")[0] == "fastvq" and not hasattr(owner, node.attr):
                found.append(f"{node.value.id}.{node.attr}")
    return found


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_name_of_fastvq_is_there(script, name):
    """Names that a script imports inside of a function too."""
    module = script(name)
    tree = ast.parse((DOCS / f"{name}.py").read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "fastvq":
            assert all(hasattr(importlib.import_module(node.module), one.name) for one in node.names)
    assert missing(tree, vars(module)) == []


def test_a_name_that_is_gone_is_found(script):
    names = vars(script("pictures_codes"))
    tree = ast.parse("ops.nearest(x)\nops.closest(x)\nVectorQuantizer.no_such\nfastvq.kmeans\nplt.nothing")
    assert sorted(missing(tree, names)) == ["VectorQuantizer.no_such", "ops.closest"]


def test_the_quickest_picture_is_drawn(script, tmp_path, monkeypatch):
    pictures = script("pictures")
    monkeypatch.setattr(pictures, "OUT", tmp_path)
    torch.manual_seed(0)
    pictures.save("regions", pictures.pictures_codes.PICTURES["regions"]())
    with Image.open(tmp_path / "regions.png") as picture:
        assert min(picture.size) > 300


def test_a_cell_of_a_notebook_runs(script):
    notebooks = script("notebooks")
    names: dict[str, object] = {}
    assert notebooks.run("import fastvq\nprint(fastvq.__name__)", names, "cell", []) == "```\nfastvq\n```"
