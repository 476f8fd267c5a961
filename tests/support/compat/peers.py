"""The real packages, as far as they are installed; a skip with the one command that brings them otherwise."""

import importlib
import importlib.util
import sys
from types import ModuleType

import pytest

INSTALL = (
    'pip install -e ".[test]" vector-quantize-pytorch transformers diffusers && pip install --no-deps encodec moshi '
    "&& pytest tests/compat"
)


def peer(module: str) -> ModuleType:
    """The module; the test is skipped where its package, or something that it imports, is not installed."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        pytest.skip(f"{module} cannot be imported ({error}); {INSTALL}")


def peer_part(module: str) -> ModuleType:
    """A submodule without its package's ``__init__``: encodec's and moshi's import audio and text libraries."""
    package = module.partition(".")[0]
    if package not in sys.modules:
        spec = importlib.util.find_spec(package)
        if spec is None:
            pytest.skip(f"{package} is not installed; {INSTALL}")
        bare = ModuleType(package)
        bare.__path__ = list(spec.submodule_search_locations)
        sys.modules[package] = bare
    return peer(module)
