"""``fastvq edit --serve``: which runs it offers, and the errors of the command."""

import socket
import sys

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from fastvq._json import write_json
from fastvq.cli import app, shared
from fastvq.cli.serve import find_runs
from tests.support.models.small import small_vqvae
from tests.support.serve.page import loaded


@pytest.fixture
def folder(tmp_path):
    """Two models, priors of the second, a folder that is none, and pictures that the first was trained on."""
    small_vqvae(channels=1).save_pretrained(tmp_path / "one")
    run = loaded(levels=2)
    run.model.save_pretrained(tmp_path / "two")
    for level, prior in enumerate(run.priors):
        prior.save_pretrained(tmp_path / "prior" / f"level{level}")
    shared.write_prior_model(tmp_path / "prior", tmp_path / "two")
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "config.json").write_text("{")
    (tmp_path / "pictures").mkdir()
    for i in range(10):
        Image.fromarray(np.full((16, 16), 20 * i, np.uint8)).save(tmp_path / "pictures" / f"{i}.png")
    described = {"data": str(tmp_path / "pictures"), "size": 16, "channels": 1, "odd": "skip"}
    write_json(tmp_path / "one" / "data.json", described, seal=True)
    return tmp_path


def test_every_model_beside_the_given_one_is_offered_with_its_own_priors(folder):
    found = find_runs(folder / "one", folder / "nothing", "cpu")
    assert [run.name for run in found] == ["one", "two"]
    one, two = (run.load() for run in found)
    assert one.priors is None and "--model" in one.why_no_prior
    assert one.size == 16 and len(one.held_out) == 1
    assert two.model.levels == len(two.priors) == 2
    assert two.held_out is None and two.size is None  # it does not say what it was trained on


def test_a_damaged_prior_is_named(folder):
    (folder / "prior" / "level1" / "model.safetensors").write_bytes(b"cut")
    run = find_runs(folder / "two", folder / "prior", "cpu")[0].load()
    assert run.priors is None and "must be a safetensors file" in run.why_no_prior


def test_errors_of_the_command_are_one_line(folder):
    def run(*options):
        result = CliRunner().invoke(app, ["edit", "--serve", *map(str, options)])
        assert result.exit_code == 2, result.output
        return " ".join(result.output.split())

    pytest.importorskip("starlette", reason="the page needs starlette")
    pytest.importorskip("uvicorn", reason="the page is served by uvicorn")
    assert "must be a folder with a trained model" in run("--model", folder / "nothing")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert f"--port {port} cannot be used" in run("--model", folder / "one", "--port", port)
    assert "size must be in" in run("--model", folder / "one", "--size", 0)


def test_a_missing_package_is_named(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    result = CliRunner().invoke(app, ["edit", "--serve", "--model", str(folder / "one")])
    assert result.exit_code == 2 and '"fastvq-kernels[serve]"' in " ".join(result.output.split())
