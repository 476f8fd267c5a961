"""Who may import whom: the rules of CONTRIBUTING.md, read from the sources."""

import ast
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
EXTENSIONS = {"fastvq._cpu", "fastvq._cpu_testing", "fastvq._cuda"}
BASE = {
    "_checks",
    "_counter",
    "_env",
    "_files",
    "_json",
    "_options",
    "_shorten",
    "_version",
    "_cpu",
    "_cpu_testing",
    "_cuda",
}
# A module may import modules of its own room and of rooms in lines above its line here. A file at the top of the
# package is a room, but for those of BASE, which are one together.
ROOMS = [
    {"base"},
    {"backends"},
    {"ops", "_build_info"},
    {"distributed", "_kmeans", "onnx", "_verify"},
    {"nn"},
    {"data", "models", "compat"},
    {"training", "serve"},
    {"__init__"},
    {"cli"},
    {"__main__"},
]
RANK = {room: rank for rank, rooms in enumerate(ROOMS) for room in rooms}


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def sources() -> dict[str, Path]:
    return {name_of(p): p for p in sorted((ROOT / "fastvq").rglob("*.py"))}


def imported(node: ast.stmt) -> list[str]:
    """The modules that an import statement names: ``from a import b`` names a.b where that is a module, else a."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    assert isinstance(node, ast.ImportFrom) and node.level == 0 and node.module, "imports are absolute"
    found = [f"{node.module}.{alias.name}" for alias in node.names]
    return [name if name in sources() or name in EXTENSIONS else node.module for name in found]


@cache
def imports(at_import: bool) -> dict[str, list[str]]:
    """Of every module, what it imports anywhere, or only what runs when it is imported itself."""
    found = {}
    for name, path in sources().items():
        todo, names = [ast.parse(path.read_text(encoding="utf-8"))], []
        while todo:
            for node in ast.iter_child_nodes(todo.pop()):
                if isinstance(node, ast.Import | ast.ImportFrom):
                    names += imported(node)
                elif not (at_import and (isinstance(node, ast.FunctionDef) or is_for_types(node))):
                    todo.append(node)
        found[name] = names
    return found


def is_for_types(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"


def room(name: str) -> str:
    top = [*name.split("."), "__init__"][1]
    return "base" if top in BASE else top


def test_rooms_import_one_way():
    unknown = {room(name) for name in sources()} - set(RANK)
    assert not unknown, f"give {unknown} a place in ROOMS"
    for name, names in imports(False).items():
        for other in names:
            if other.split(".")[0] != "fastvq":
                continue
            if room(name) == room(other):
                continue
            assert RANK[room(other)] < RANK[room(name)], f"{name} imports {other}, which lies above it or beside it"


def test_no_module_imports_itself_by_way_of_others():
    graph = {name: [n for n in names if n in sources() and n != name] for name, names in imports(True).items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def references() -> set[str]:
    return {name for name in sources() if name.endswith(".reference")}


def test_references_are_oracles():
    """A reference shares no code with the kernels, and only the declaration of its op imports it."""
    for name in references():
        for other in imports(False)[name]:
            plain = other.split(".")[0] in ("__future__", "collections", "math", "typing", "torch")
            assert plain or other in references() or other == "fastvq._checks", f"{name} imports {other}"
    for name, names in imports(False).items():
        for other in references().intersection(names):
            assert name in references() or name == other.removesuffix(".reference"), f"{name} imports {other}"
    assert len(references()) == 7


def test_the_arguments_of_an_op_import_torch_alone():
    for name in (n for n in sources() if n.endswith(".call")):
        assert not any(other.startswith("fastvq") for other in imports(False)[name]), name


def test_helpers_of_an_op_import_no_backend():
    for name in (n for n in sources() if n.endswith(".common")):
        for other in imports(False)[name]:
            inside = other.startswith("fastvq.") and other != "fastvq._checks"
            assert not inside or other.endswith(".common"), f"{name} imports {other}"


def test_triton_is_optional():
    """Only files named after Triton import it, or each other, when they are imported themselves."""
    for name, names in imports(True).items():
        if name.rpartition(".")[2].lstrip("_").startswith("triton_"):
            continue
        for other in names:
            last = other.rpartition(".")[2].lstrip("_")
            assert other.split(".")[0] != "triton" and not last.startswith("triton_"), f"{name} imports {other}"
