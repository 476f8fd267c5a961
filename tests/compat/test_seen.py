"""What a replacement touches of a peer, its target has checked: read off the source, and on versions without it."""

import ast
import inspect
import sys
import textwrap

import pytest
import torch
from torch import nn

import fastvq
from fastvq.compat._registry import TARGETS
from fastvq.compat._target import PatchedModule


def classes_of(fast):
    return [cls for cls in fast.__mro__ if issubclass(cls, PatchedModule) and cls is not PatchedModule]


def touched(fast):
    """(attributes of self that are neither ours nor any module's, names taken from the peer's file)."""
    ours = {name for cls in fast.__mro__ if issubclass(cls, PatchedModule) for name in vars(cls)}
    attributes, helpers = set(), set()
    for cls in classes_of(fast):
        for node in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(cls)))):
            if not isinstance(node, ast.Attribute):
                continue
            owner = node.value.func if isinstance(node.value, ast.Call) else node.value
            name = getattr(owner, "id", "")
            if name == "self":
                attributes.add(node.attr)
            elif name in ("peer", "peer_module"):
                helpers.add(node.attr)
    return {n for n in attributes - ours if not hasattr(nn.Module(), n)}, helpers


def shapes_of(check):
    """The attributes that ``require`` asks for, within ``all_of`` too."""
    held = inspect.getclosurevars(check).nonlocals
    names = {name.split("__")[0] for name in held.get("shapes", ())}
    return names.union(*(shapes_of(one) for one in held.get("checks", ())))


@pytest.mark.parametrize("target", TARGETS, ids=lambda t: f"{t.peer}.{t.name}")
def test_everything_that_is_touched_was_checked(target):
    attributes, helpers = touched(target.fast)
    assert attributes <= {*target.attributes, *target.replaced_methods, *shapes_of(target.reject)}
    assert helpers <= set(target.helpers)


class Bare(nn.Module):
    """A class by a known name, of a version that has nothing the replacement reads."""

    def forward(self, x):
        return x


@pytest.mark.parametrize("target", TARGETS, ids=lambda t: f"{t.peer}.{t.name}")
def test_a_version_without_it_is_left_and_says_why(target):
    module = Bare()
    names = [*target.attributes, *target.helpers]
    reason = target.missing(module, Bare)
    assert reason is None if not names else reason is not None and names[0] in reason


vqp = pytest.importorskip("vector_quantize_pytorch")


def test_kmeans_start_of_a_version_without_logger(monkeypatch):
    """Of the versions there are, some warn of too few vectors by a module-level logger, others not at all."""
    file = sys.modules["vector_quantize_pytorch.vector_quantize_pytorch"]
    monkeypatch.delattr(file, "logger", raising=False)
    module = vqp.VectorQuantize(dim=8, codebook_size=64, kmeans_init=True)
    fastvq.patch(module, strict=True)
    quantized, *_ = module(torch.randn(1, 16, 8))
    assert quantized.shape == (1, 16, 8) and bool(module._codebook.initted)


def test_a_version_without_a_helper_is_left(monkeypatch):
    file = sys.modules["vector_quantize_pytorch.vector_quantize_pytorch"]
    monkeypatch.delattr(file, "ema_inplace")
    module = vqp.VectorQuantize(dim=8, codebook_size=16)
    report = fastvq.patch(module)
    assert [one.name for one in report.left] == ["_codebook"] and "ema_inplace" in report.left[0].reason
