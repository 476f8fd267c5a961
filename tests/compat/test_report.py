"""The report of ``fastvq.patch``: what is faster, what is left as it is and why, what is not a quantizer of ours."""

import importlib.metadata
import re
from pathlib import Path

import pytest
from torch import nn

import fastvq.nn
from fastvq.compat._apply import _untested
from fastvq.compat._registry import TARGETS

vqp = pytest.importorskip("vector_quantize_pytorch")
SIZES = {"dim": 8, "codebook_size": 16}


def lines(report):
    return str(report).splitlines()


def test_three_groups():
    model = nn.ModuleDict(
        {
            "plain": vqp.VectorQuantize(**SIZES),
            "levels": vqp.ResidualVQ(num_quantizers=2, **SIZES),
            "sampled": vqp.VectorQuantize(**SIZES, stochastic_sample_codes=True),
            "fsq": vqp.FSQ(levels=[4, 4]),
            "signs": vqp.ResidualLFQ(dim=8, codebook_size=16, num_quantizers=2),
            "ours": fastvq.nn.VectorQuantizer(8, 16),
        }
    )
    report = fastvq.patch(model)
    assert [one.name for one in report.replaced if "." not in one.name] == ["plain", "levels"]
    assert [one.name for one in report.left] == ["sampled", "sampled._codebook"]
    assert {one.name for one in report.others} == {"fsq", "signs", "ours"}
    assert lines(report) == [
        "fastvq: 2 faster, 1 left as is, 3 not of ours",
        "faster:",
        "  plain: vector_quantize_pytorch.VectorQuantize and 1 module inside it",
        "  levels: vector_quantize_pytorch.ResidualVQ and 4 modules inside it",
        "left as they are:",
        "  sampled: vector_quantize_pytorch.VectorQuantize and 1 module inside it: codes are sampled "
        "(stochastic_sample_codes or straight_through), not the nearest ones",
        "not a quantizer of ours:",
        "  fsq: vector_quantize_pytorch.FSQ: it rounds every number to a few levels; there is no codebook to search, "
        "so it needs no patch",
        "  signs: vector_quantize_pytorch.ResidualLFQ: it takes the sign of every number; there is no codebook to "
        "search, so it needs no patch",
        "  ours: fastvq.VectorQuantizer: it is fastvq's own, which needs no patch",
    ]


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda: vqp.VectorQuantize(**SIZES, affine_param=True), "affine_param"),
        (lambda: vqp.ResidualVQ(num_quantizers=2, **SIZES, affine_param=True), "affine_param"),
        (lambda: vqp.ResidualVQ(num_quantizers=2, **SIZES, implicit_neural_codebook=True), "implicit_neural_codebook"),
        (lambda: vqp.ResidualVQ(num_quantizers=2, **SIZES, beam_size=2), "beam search"),
    ],
)
def test_a_module_that_always_runs_its_own_code_is_not_replaced(make, why):
    module = make()
    before = [type(one) for one in module.modules()]
    report = fastvq.patch(module)
    assert not report and report.left[0].name == "" and why in report.left[0].reason
    assert [type(one) for one in module.modules()] == before
    with pytest.raises(ValueError, match=why):
        fastvq.patch(module, strict=True)


def test_a_module_that_sometimes_runs_its_own_code_says_when():
    report = fastvq.patch(vqp.VectorQuantize(**SIZES, codebook_diversity_loss_weight=0.1))
    assert "    its own code in training: the diversity loss is a softmax over all distances" in lines(report)
    report = fastvq.patch(vqp.ResidualVQ(num_quantizers=2, **SIZES, beam_size=2, eval_beam_size=1))
    assert "    its own code in training: beam search needs more than the nearest code of a level" in lines(report)


def test_the_note_on_a_version_comes_once(monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "99.0")
    _untested.cache_clear()
    try:
        report = fastvq.patch(vqp.ResidualVQ(num_quantizers=3, **SIZES))
    finally:
        _untested.cache_clear()
    assert len(report.notes) == 1 and str(report).count("99.0") == 1
    assert not any(one.limits for one in report.replaced)


def test_modules_that_only_sound_like_one_are_not_mentioned():
    class VQModel(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = vqp.VectorQuantize(**SIZES)

    assert not fastvq.patch(VQModel()).others
    assert not fastvq.patch(nn.Sequential(nn.Linear(2, 2))).others


def test_the_page_of_peers_names_every_package_and_its_newest_version():
    page = (Path(__file__).parents[2] / "docs" / "drop_in.md").read_text()
    rows = {line.split(" | ")[0].strip("| "): line.split(" | ")[-1].strip("| ") for line in page.splitlines()}
    for target in TARGETS:
        if target.distribution:
            assert rows[target.distribution] == target.tested


def test_the_report_of_the_page_is_what_its_code_prints(capsys):
    text = (Path(__file__).parents[2] / "docs" / "start" / "patch.md").read_text()
    code, printed = re.findall(r"^```\n(.*?)^```$", text, flags=re.M | re.S)[:2]
    exec(compile(code, "patch.md", "exec"), {})
    assert [
        line for line in capsys.readouterr().out.splitlines() if not line.startswith("note:")
    ] == printed.splitlines()
