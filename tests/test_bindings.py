"""The stubs of the extensions name the functions of the bindings, with as many arguments."""

import ast
import re
from pathlib import Path

import pytest

import fastvq


def stub_of(name: str) -> dict[str, int | None]:
    """Names of a stub, with the number of arguments of functions."""
    found: dict[str, int | None] = {}
    for node in ast.parse((Path(fastvq.__file__).parent / f"{name}.pyi").read_text()).body:
        if isinstance(node, ast.FunctionDef):
            assert not (node.args.args or node.args.kwonlyargs), f"{node.name}: bound arguments have no names"
            found[node.name] = len(node.args.posonlyargs)
        elif isinstance(node, ast.AnnAssign) and not node.target.id.startswith("_"):
            found[node.target.id] = None
    return found


def binding_of(module) -> dict[str, int | None]:
    """The same of a module that pybind11 made: its docstrings number the arguments."""
    names = [name for name in dir(module) if not name.startswith("__")]
    return {
        name: len(re.findall(r"\barg\d+: ", function.__doc__)) if callable(function := getattr(module, name)) else None
        for name in names
    }


@pytest.mark.parametrize("name", ["_cpu", "_cpu_testing", "_cuda"])
def test_the_stub_is_the_binding(name):
    module = pytest.importorskip(
        f"fastvq.{name}", reason=f"fastvq.{name} is not part of this install", exc_type=ImportError
    )
    assert binding_of(module) == stub_of(name)
