"""``fastvq encode`` that is resumed, stopped or fails: no picture is lost or mixed up, and the exit status is right."""

import json
import shutil
import signal

import pytest

from fastvq._json import read_json
from tests.support.archives import archive, png
from tests.support.encode import (  # noqa: F401  (fixtures)
    _one_thread,
    contents,
    encode,
    manifest,
    model,
    pictures,
    said,
)
from tests.support.models.small import small_vqvae

from .test_cli import fastvq


def test_resume_with_a_picture_added_is_refused(encode, pictures, tmp_path):
    encode(pictures)
    before = contents(tmp_path / "ids")
    (pictures / "00.png").write_bytes(png(99))
    text = said(encode(pictures, status=2))
    assert "begun with other pictures: 1 added (00.png)" in text and "--restart" in text
    assert contents(tmp_path / "ids") == before


def test_resume_with_a_picture_removed_or_changed_is_refused(encode, pictures, tmp_path):
    encode(pictures)
    (pictures / "3.png").unlink()
    (pictures / "4.png").write_bytes(png(4, size=(20, 20)))
    assert "1 removed (3.png), 1 of another size (4.png)" in said(encode(pictures, status=2))
    (tmp_path / "ids" / "listing.jsonl").unlink()
    assert "it listed 9, and now there are 8" in said(encode(pictures, status=2))


def test_restart_begins_anew(encode, pictures, tmp_path):
    encode(pictures)
    (tmp_path / "ids" / "mine.txt").write_text("mine")
    (pictures / "0.png").unlink()
    encode(pictures, "--restart")
    assert manifest(tmp_path)["pictures"] == 8 and (tmp_path / "ids" / "mine.txt").read_text() == "mine"


def test_a_folder_of_a_model_is_no_folder_of_maps(encode, pictures, model):
    before = {p: p.read_bytes() for p in model.iterdir()}
    assert "holds a model" in said(encode(pictures, "--out", model, "--restart", status=2))
    assert {p: p.read_bytes() for p in model.iterdir()} == before


def test_resume_with_an_archive_deleted_is_refused(encode, tmp_path):
    for i in range(2):
        (tmp_path / f"set-{i}.tar").write_bytes(archive([("x.png", png(i))]))
    encode(tmp_path / "set-*.tar")
    (tmp_path / "set-0.tar").unlink()
    assert "1 removed (set-0.tar)" in said(encode(tmp_path / "set-*.tar", status=2))


@pytest.mark.parametrize(
    "option, said_by_it",
    [
        (["--size", 32], "another size (16, now 32)"),
        (["--odd", "convert"], "another odd ('skip', now 'convert')"),
        (["--split", "train"], "another split"),
        (["--shard-size", 5], "another shard_size (4, now 5)"),
        (["--field", "png"], "another field (None, now 'png')"),
    ],
)
def test_resume_with_another_option_is_refused(encode, pictures, option, said_by_it):
    encode(pictures)
    assert said_by_it in said(encode(pictures, *option, status=2))


def test_resume_with_another_model_is_refused(encode, pictures, tmp_path, model):
    encode(pictures)
    shutil.copytree(model, tmp_path / "other")
    small_vqvae(seed=1, channels=3).save_pretrained(tmp_path / "other")
    assert "begun with another model;" in said(encode(pictures, "--model", tmp_path / "other", status=2))
    text = said(fastvq("decode", tmp_path / "ids", "--model", tmp_path / "other", status=2))
    assert "made by another model" in text


def test_folders_of_earlier_versions_are_continued(encode, pictures, tmp_path):
    encode(pictures)
    ids = tmp_path / "ids"
    whole = contents(ids)
    config = read_json("test", ids / "order.json")
    earlier = {name: config[name] for name in ("model_sha256", "data", "split", "size", "shard_size")}
    (ids / "order.json").write_text(json.dumps(earlier))
    (ids / "listing.jsonl").unlink()
    (ids / "ids-00001.safetensors").unlink()
    encode(pictures)
    assert contents(ids) == whole
    (ids / "order.json").write_text(json.dumps(earlier))
    (pictures / "0.png").rename(pictures / "00.png")
    assert "0.png is not where it was" in said(encode(pictures, status=2))


# Exit status.


def test_a_call_that_encodes_nothing_ends_with_1_and_leaves_nothing(encode, tmp_path):
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a.png").write_bytes(b"no picture")
    text = said(encode(tmp_path / "pictures", status=1))
    assert "no picture was encoded, 1 left out" in text and "a.png: cannot be read" in text
    assert not (tmp_path / "ids").exists()
    (tmp_path / "set.tar").write_bytes(b"")
    assert "empty" in said(encode(tmp_path / "set.tar", status=1))


def test_a_call_that_fails_leaves_no_folder(encode, pictures, tmp_path, monkeypatch):
    encode(tmp_path / "nowhere", status=2)
    encode(pictures, "--size", 18, status=2)
    assert not (tmp_path / "ids").exists()
    monkeypatch.setattr("fastvq.cli.encode.save_shard", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    assert "disk full" in said(encode(pictures, status=2))
    assert not (tmp_path / "ids").exists()
    monkeypatch.undo()
    encode(pictures, "--shard-size", 3)
    assert manifest(tmp_path)["pictures"] == 9


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stopped_encode_goes_on(encode, pictures, model, tmp_path, monkeypatch, number, status):
    from fastvq.cli import encode as module

    def save(path, *rest):
        if path.name == "ids-00001.safetensors":
            signal.raise_signal(number)
        saved(path, *rest)

    saved = module.save_shard
    monkeypatch.setattr(module, "save_shard", save)
    text = said(encode(pictures, status=status))
    assert "the same command goes on where it stopped" in text
    for command in (["decode", tmp_path / "ids", "--model", model], ["info", tmp_path / "ids"]):
        assert "`fastvq encode` did not end there" in said(fastvq(*command, status=2))
    monkeypatch.undo()
    encode(pictures)
    assert manifest(tmp_path)["pictures"] == 9
