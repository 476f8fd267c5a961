"""``fastvq encode`` and ``decode``: no names, archives or faults lose or mix up pictures."""

import gzip
import shutil
import unicodedata

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from fastvq.cli.encode import _EncodeJob
from fastvq.cli.file_names import FileNames
from fastvq.data import Shards, http
from fastvq.models import VQVAE
from fastvq.training import ProcessContext
from tests.support.archives import archive, header, png, send, server
from tests.support.encode import (  # noqa: F401  (fixtures)
    _one_thread,
    contents,
    encode,
    manifest,
    model,
    pictures,
    said,
)

from .test_cli import fastvq

# Names of pictures.

HARD_NAMES = [
    "a.png", "a.jpg", "a b.png", "a_b.png", "a/b.png", "가족.png", "사진.png", "日本.png", "x.png/in.png", "x.jpg",
    "100%.png", "%2F.png", "..png", "log.jsonl/y.png", "é.png", "e\u0301.png",
    "A.JPG",
]  # fmt: skip


def test_decode_writes_one_file_a_picture(encode, model, tmp_path):
    folder = tmp_path / "pictures"
    for i, name in enumerate(HARD_NAMES):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(png(i))
    encode(folder)
    fastvq("decode", tmp_path / "ids", "--model", model, "--out", tmp_path / "decoded")
    found = {
        p.relative_to(tmp_path / "decoded").as_posix() for p in (tmp_path / "decoded").rglob("*.png") if p.is_file()
    }
    plain = {f"{name}.png" for name in HARD_NAMES}
    changed = {"x.png/in.png.png": "x%2Epng/in.png.png", "log.jsonl/y.png.png": "log%2Ejsonl/y.png.png",
               "%2F.png.png": "%252F.png.png", "é.png.png": "é.png%2F2.png", "A.JPG.png": "A.JPG.png",
               "a.jpg.png": "a.jpg%2F2.png"}  # fmt: skip
    assert found == {changed.get(name, name) for name in plain}


WORDS = st.lists(
    st.sampled_from(["a", ".", "..", "/", "%", "2F", "\0", ".png", "\n", "가", "\udc80", "\ud800", "~", " "]),
    max_size=8,
)


@settings(max_examples=50, deadline=None)
@given(st.lists(WORDS.map("".join) | st.text(max_size=3), max_size=20))
def test_no_two_names_get_one_path(tmp_path_factory, names):
    root = tmp_path_factory.mktemp("names")
    files, there = FileNames(), []
    for name in [*names, "long" * 100, "long" * 101, "deep/" * 450, "deep/" * 451]:
        path = root / files.path(name)
        assert root in path.parents and ".." not in path.parts
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("xb"):  # it must not be there
            there.append(path)
    folded = {unicodedata.normalize("NFC", str(path)).casefold() for path in there}
    assert len(folded) == len(there)
    assert len(there) == len(names) + 4
    shutil.rmtree(root)


@pytest.mark.parametrize(
    "names, paths",
    [
        (["a.png", "A.png", "a.png"], ["a.png.png", "A.png%2F2.png", "a.png%2F3.png"]),
        (["Cats/a", "cats/a", "cats/b"], ["Cats/a.png", "cats/a%2F2.png", "cats/b.png"]),
        (["é", "e\u0301", "É"], ["é.png", "e\u0301%2F2.png", "É%2F3.png"]),
        (
            ["가족", unicodedata.normalize("NFD", "가족")],
            ["가족.png", unicodedata.normalize("NFD", "가족") + "%2F2.png"],
        ),
        (["STRASSE", "straße"], ["STRASSE.png", "straße%2F2.png"]),
        (["cats./a", "cats/a", "cats /a"], ["cats./a.png", "cats/a%2F2.png", "cats /a%2F3.png"]),
        (["图片", "圖片"], ["图片.png", "圖片.png"]),
        ([".. /a", "x.PNG./a"], ["%2E%2E%20/a.png", "x.PNG%2E/a.png"]),
    ],
)
def test_names_that_a_file_system_may_take_for_one(names, paths):
    files = FileNames()
    assert [str(files.path(name)) for name in names] == paths


def test_no_command_writes_into_the_pictures_it_reads(encode, model, pictures, tmp_path):
    (pictures / "usage.png").write_bytes(png(50))
    before = {p.name: p.read_bytes() for p in pictures.iterdir()}
    encode(pictures)
    for order in (
        ["encode", pictures, "--model", model, "--out", pictures, "--restart"],
        ["encode", pictures, "--model", model, "--out", pictures / "ids"],
        ["decode", tmp_path / "ids", "--model", model, "--out", pictures],
        ["train", "vqvae", "--data", pictures, "--out", pictures / "run"],
        ["train", "prior", "--model", model, "--data", pictures, "--out", pictures / "prior"],
    ):
        assert "--out must lie outside the folder of pictures" in said(fastvq(*order, status=2))
    for out in ("0.png", "./0.png"):
        order = ["edit", pictures / "0.png", "--model", model, "--code", 1, "--out", pictures / out]
        assert "0.png, which is read; take another --out" in said(fastvq(*order, status=2))
    assert {p.name: p.read_bytes() for p in pictures.iterdir()} == before


def test_a_file_in_the_place_of_a_folder_is_named(encode, pictures, tmp_path):
    (tmp_path / "file").write_bytes(b"mine")
    for out in (tmp_path / "file", tmp_path / "file" / "ids"):
        assert "file is a file: take another --out" in said(encode(pictures, "--out", out, status=2))


def test_one_folder_has_many_paths(encode, pictures, tmp_path, monkeypatch):
    encode(pictures)
    monkeypatch.chdir(tmp_path)
    for path in ("pictures", "pictures/", f"{pictures}/.", "./pictures"):
        encode(path)
    (tmp_path / "others").mkdir()
    for path in pictures.iterdir():
        shutil.copy(path, tmp_path / "others")
    assert "begun with another data" in said(encode("others", status=2))
    assert "field must be a picture's" in said(encode(pictures, "--field", "cls", status=2))


# Archives.


SIX = archive([(f"{i}.png", png(i)) for i in range(6)])
FIFTH = SIX.index(header("4.png", len(png(4))))


@pytest.mark.parametrize(
    "data",
    [SIX[:FIFTH], SIX[: FIFTH + 100], SIX[: FIFTH + 600], gzip.compress(SIX)[: len(gzip.compress(SIX)) * 3 // 4]],
)
def test_a_truncated_archive_is_not_a_whole_one(encode, tmp_path, data):
    (tmp_path / "set.tar").write_bytes(data)
    assert "set.tar: shard cannot be read to its end" in said(encode(tmp_path / "set.tar"))
    assert manifest(tmp_path)["pictures"] == 4 and manifest(tmp_path)["shards"][0]["pictures"] == 4
    assert "cannot be read to its end" in manifest(tmp_path)["skipped"][str(tmp_path / "set.tar")]


def test_a_masked_sample_is_encoded_by_choice(encode, model, tmp_path):
    (tmp_path / "set.tar").write_bytes(archive([(f"x.{kind}", png(i)) for i, kind in enumerate(("jpg", "seg.png"))]))
    assert "choose one with --field jpg" in said(encode(tmp_path / "set.tar", status=2))
    assert not (tmp_path / "ids").exists()
    encode(tmp_path / "set.tar", "--field", "jpg")
    mine = contents(tmp_path / "ids")
    (tmp_path / "set.tar").write_bytes(archive([("x.jpg", png(0))]))
    encode(tmp_path / "set.tar", "--restart")
    assert mine["ids-00000-00000.safetensors"] == contents(tmp_path / "ids")["ids-00000-00000.safetensors"]


def test_impossible_labels_do_not_end_a_run(encode, tmp_path):
    members = [
        (f"{i}.{kind}", data) for i in range(3) for kind, data in (("png", png(i)), ("cls", b"9" * (i * 20 + 1)))
    ]
    (tmp_path / "set.tar").write_bytes(archive(members))
    encode(tmp_path / "set.tar")
    assert manifest(tmp_path)["pictures"] == 3 and manifest(tmp_path)["skipped"].keys() == {
        "set.tar/1.cls", "set.tar/2.cls",
    }  # fmt: skip


def test_a_broken_server_is_named_and_the_other_archives_are_encoded(encode, tmp_path, monkeypatch):
    monkeypatch.setattr(http, "PAUSE_S", 0.01)
    whole = archive([(f"{i}.png", png(i)) for i in range(6)])
    faulty = [True]

    def answer(handler):
        if handler.path == "/0.tar" and faulty[0]:
            handler.wfile.write(b"nonsense\r\n\r\n")
        else:
            send(handler, whole)

    with server(answer) as address:
        data = address.replace("set.tar", "{0..1}.tar")
        encode(data)
        assert manifest(tmp_path)["pictures"] == 6 and len(manifest(tmp_path)["skipped"]) == 1
        # A later call reads what it could not read before, and only that.
        before = contents(tmp_path / "ids")
        faulty[0] = False
        encode(data)
    assert manifest(tmp_path)["pictures"] == 12 and not manifest(tmp_path)["skipped"]
    after = contents(tmp_path / "ids")
    assert all(after[name] == data for name, data in before.items() if name.startswith("ids-00001"))


def test_an_interrupted_encode_of_archives_ends_as_a_whole_one(encode, tmp_path):
    for i in range(3):
        (tmp_path / f"{i}.tar").write_bytes(archive([(f"{j}.png", png(10 * i + j)) for j in range(4 * i + 2)]))
    data = tmp_path / "{0..2}.tar"
    encode(data)
    whole = contents(tmp_path / "ids")
    assert len(whole) == 7 and manifest(tmp_path)["pictures"] == 18
    for first in range(3):
        for lost in list(whole)[first::3]:
            (tmp_path / "ids" / lost).unlink()
        encode(data)
        assert contents(tmp_path / "ids") == whole


# Pictures and options.


@pytest.mark.parametrize("size", [0, -4, 100000])
def test_sizes_of_no_picture_are_refused(encode, pictures, tmp_path, model, size):
    wanted = f"size must be in 1 .. 8000 pixels, got {size}"
    assert wanted in said(encode(pictures, "--size", size, status=2))
    for command in (
        ["train", "vqvae", "--data", pictures, "--out", tmp_path / "run"],
        ["edit", pictures / "0.png", "--model", model, "--code", 1],
        ["sample", "--model", model],
    ):
        assert wanted in said(fastvq(*command, "--size", size, status=2))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name, form", [("x.jpg", "JPEG"), ("x.WEBP", "WEBP"), ("x.png", "PNG")])
def test_edits_are_written_in_the_format_of_their_name(pictures, tmp_path, model, name, form):
    fastvq("edit", pictures / "0.png", "--model", model, "--code", 1, "--out", tmp_path / "to" / name)
    for path in (tmp_path / "to" / name, (tmp_path / "to" / name).with_stem("x-picture")):
        with Image.open(path) as picture:
            assert picture.format == form


def test_an_edit_without_a_format_is_refused(pictures, tmp_path, model):
    out = ["--out", tmp_path / "x.jsonl"]
    assert "--out must end in one of .png" in said(
        fastvq("edit", pictures / "0.png", "--model", model, "--code", 1, *out, status=2)
    )


def test_a_huge_picture_is_one_line(encode, pictures, recwarn):
    Image.fromarray(np.zeros((10_000, 9_500), np.uint8)).save(pictures / "huge.png")
    text = said(encode(pictures))
    assert "huge.png: huge: 9500x10000, more than 64000000 pixels" in text and "Warning" not in text
    assert not [w for w in recwarn if "decompression bomb" in str(w.message)]


def test_folders_and_pictures_that_cannot_be_opened_are_named(encode, pictures, tmp_path, monkeypatch):
    import os

    def walk(top, onerror):
        yield from found(top, onerror=onerror)
        onerror(PermissionError(13, "Permission denied", str(pictures / "secret")))

    found = os.walk
    monkeypatch.setattr(os, "walk", walk)
    (pictures / "link.png").symlink_to("nowhere.png")
    (pictures / "new.avif").write_bytes(b"?")
    encode(pictures)
    skipped = manifest(tmp_path)["skipped"]
    assert skipped == {
        "secret": "folder cannot be read: Permission denied", "new.avif": "no format that is read: .avif",
        "link.png": "cannot be read: No such file or directory",
    }  # fmt: skip


@pytest.mark.parametrize("n", [1, 4])
@pytest.mark.parametrize("world", [2, 3])
def test_archives_are_cut_alike_by_any_number_of_processes(encode, model, tmp_path, n, world):
    for i in range(n):
        cut = archive([(f"{j}.png", png(10 * i + j)) for j in range(13)] + [("bad.png", b"?")])[: -600 * i or None]
        (tmp_path / f"{i}.tar").write_bytes(cut)
    encode(tmp_path / "*.tar")
    for rank in range(world):
        source = Shards(str(tmp_path / "*.tar"), size=16)
        process = ProcessContext(rank, world, torch.device("cpu"))
        (tmp_path / "other").mkdir(exist_ok=True)
        _EncodeJob(VQVAE.from_pretrained(model), source, tmp_path / "other", 4, 64, process).encode_archives(source)
    for path in (tmp_path / "ids").glob("ids-*"):
        assert path.read_bytes() == (tmp_path / "other" / path.name).read_bytes()
    assert len(list((tmp_path / "other").glob("ids-*"))) == 4 * n
