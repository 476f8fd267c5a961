"""Fixtures of the tests of ``fastvq encode``: a model, a folder of pictures, and the command on both."""

import json

import pytest

from fastvq._json import write_json
from tests.support.archives import png
from tests.support.models.small import small_vqvae
from tests.test_cli import fastvq


@pytest.fixture(autouse=True)
def _one_thread(threads):
    threads(1)


def said(result):
    return " ".join(result.output.split())


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A model of 16x16 colour pictures, untrained."""
    folder = tmp_path_factory.mktemp("model")
    small_vqvae(channels=3).save_pretrained(folder)
    write_json(folder / "data.json", {"data": "none", "size": 16, "channels": 3, "odd": "skip"}, seal=True)
    return folder


@pytest.fixture
def encode(model, tmp_path):
    """encode(data, *options, status=0) into tmp_path / "ids"."""

    def call(data, *options, status=0):
        order = ["encode", data, "--model", model, "--out", tmp_path / "ids", "--shard-size", 4, "--device", "cpu"]
        return fastvq(*order, *options, status=status)

    return call


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i in range(9):
        (folder / f"{i}.png").write_bytes(png(i))
    return folder


def manifest(tmp_path):
    return json.loads((tmp_path / "ids" / "manifest.json").read_text())


def contents(folder):
    """The contents of all id shards and of the manifest."""
    return {p.name: p.read_bytes() for p in [*folder.glob("ids-*"), folder / "manifest.json"]}
