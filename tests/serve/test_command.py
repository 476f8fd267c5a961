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
    for name in ("*", "*.example", "demo.local:80", "http://demo.local", ""):
        assert "--allow-host must be a name" in run("--model", folder / "one", "--allow-host", name)


def test_a_missing_package_is_named(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    result = CliRunner().invoke(app, ["edit", "--serve", "--model", str(folder / "one")])
    assert result.exit_code == 2 and '"fastvq-kernels[serve]"' in " ".join(result.output.split())


@pytest.mark.parametrize(
    ("options", "allowed", "refused"),
    [
        ([], ["127.0.0.1", "localhost", "[::1]"], ["elsewhere.example", "127.0.0.2"]),
        (["--host", "127.0.0.2"], ["127.0.0.2", "localhost"], ["elsewhere.example", "127.0.0.3"]),
        (["--host", "0.0.0.0"], ["elsewhere.example", "192.168.0.7"], []),
        (["--host", "0.0.0.0", "--allow-host", "demo.local", "--allow-host", "192.168.0.7"],
         ["demo.local", "192.168.0.7", "127.0.0.1"], ["elsewhere.example", "0.0.0.0"]),
    ],
)  # fmt: skip
def test_the_page_answers_to_the_names_it_was_given(folder, monkeypatch, options, allowed, refused):
    pytest.importorskip("starlette", reason="the page needs starlette")
    pytest.importorskip("httpx2", reason="starlette's test client needs httpx2")
    uvicorn = pytest.importorskip("uvicorn", reason="the page is served by uvicorn")
    from starlette.testclient import TestClient

    configs = []
    monkeypatch.setattr(uvicorn.Server, "run", lambda self, sockets: configs.append(self.config))
    result = CliRunner().invoke(app, ["edit", "--serve", "--model", str(folder / "one"), "--port", "0", *options])
    assert result.exit_code == 0, result.output
    assert 0 < configs[0].limit_concurrency <= 64
    with TestClient(configs[0].app) as client:
        for hosts, status in ((allowed, 200), (refused, 400)):
            for host in hosts:
                assert client.get("/api/runs", headers={"host": f"{host}:8765"}).status_code == status, host
