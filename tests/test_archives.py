"""Broken archives of every kind: whole pictures are read, the others are named, and the run goes on."""

import bz2
import gzip
import io
import lzma
import tarfile
import time

import pytest
import torch

from fastvq.data import Shards, http, open_data, read_picture
from tests.support.archives import BLOCK, END, archive, header, padded, png, send, server, with_tarfile

PICTURES = [(f"{i}.png", png(i)) for i in range(6)]


def read(path, data=None, **options):
    """(names of the pictures, {name left out: reason}) of an archive, read within seconds."""
    if data is not None:
        path.write_bytes(data)
    began = time.monotonic()
    source = Shards(str(path), size=16, **options)
    names = [p.name.partition(".tar/")[2] for p in source.stream()]
    assert time.monotonic() - began < 5
    return names, source.skipped


@pytest.fixture
def path(tmp_path):
    return tmp_path / "set.tar"


@pytest.mark.parametrize("pack", [bytes, gzip.compress, bz2.compress, lzma.compress])
@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_whole_archives_of_every_format(path, pack, form):
    long = [("가족/" + "n" * 40 + "/" + "m" * 55 + ".png", png(9))]
    data = with_tarfile([*PICTURES, *long, (f"{'d/' * 60}x.png", png(10))], form)
    names, skipped = read(path, pack(data))
    assert names == [*"012345", long[0][0][:-4], "d/" * 60 + "x"] and not skipped


def test_an_archive_cut_anywhere_is_named_and_read_up_to_there(path):
    whole = archive(PICTURES)
    starts = [whole.index(header(name, len(data))) for name, data in PICTURES]
    for cut in range(1, len(whole), 131):
        names, skipped = read(path, whole[:cut])
        there = [s for s, (_, data) in zip(starts, PICTURES, strict=True) if s + BLOCK + len(data) <= cut]
        assert names == [str(i) for i in range(len(there))]
        assert ("cut off" if cut >= BLOCK else "no tar archive") in skipped[str(path)]


def test_a_cut_between_two_members_is_no_end(path):
    names, skipped = read(path, archive(PICTURES[:4], end=b""))
    assert names == [*"0123"] and "no end-of-archive marker" in skipped[str(path)]
    assert "what follows set.tar/3 is left out" in skipped[str(path)]
    assert "inside its end-of-archive marker" in read(path, archive(PICTURES, end=bytes(BLOCK)))[1][str(path)]


@pytest.mark.parametrize("pack", [gzip.compress, bz2.compress, lzma.compress])
def test_a_compressed_archive_cut_or_damaged_is_named(path, pack):
    packed = pack(archive(PICTURES))
    damaged = bytearray(packed)
    damaged[len(packed) // 2] ^= 0xFF
    for data in (packed[: len(packed) // 2], packed[:-4], bytes(damaged)):
        assert "cannot be read to its end" in read(path, data)[1][str(path)]


@pytest.mark.parametrize(
    "data, said",
    [
        (b"", "empty"),
        (b"no archive at all" * 100, "no tar archive"),
        (png(), "no tar archive"),
        (b"\x28\xb5\x2f\xfd" + bytes(600), "Zstandard"),
        (archive(PICTURES[:1]) + archive(PICTURES[1:]), "followed by other data"),
        (archive(PICTURES[:1], b"") + b"x" * BLOCK, "damaged"),
        (header("0.png", 1 << 32) + padded(png()) + END, "cut off"),
        (header("0.png", b"\x80" + b"\xff" * 11) + padded(png()) + END, "cut off"),
        (header("0.png", b"\xff" * 12) + padded(png()) + END, "no number"),
        (header("0.png", b"7x7\0" + bytes(8)) + padded(png()) + END, "no number"),
        (header("0.png", 10) + padded(png()) + END, "damaged"),
        (header("x", 1 << 31, b"x") + END, "cut off"),
        (header("x", 2 << 20, b"L") + bytes(2 << 20) + END, "a name or attributes of"),
        (header("x", 9, b"x") + padded(b"99 size=1") + END, "extended attributes"),
        (header("x", 13, b"x") + padded(b"13 size=9999\n") + header("0.png", 0) + END, "cut off"),
    ],
)
def test_an_archive_that_is_none_or_lies(path, data, said):
    assert said in read(path, data)[1][str(path)]
    if data:
        assert "cannot be read to its end" in read(path, gzip.compress(data))[1][str(path)]


def test_the_shards_after_a_broken_one_are_read(tmp_path):
    for i, data in enumerate([archive(PICTURES)[:1000], b"", archive(PICTURES[2:])]):
        (tmp_path / f"{i}.tar").write_bytes(data)
    names, skipped = read(tmp_path / "{0..2}.tar")
    assert names == [*"2345"] and len(skipped) == 2


@pytest.mark.parametrize(
    "members, labels, said",
    [
        ([("a.png", png()), ("a.cls", b"7\n")], [7], {}),
        ([("a.cls", b"7"), ("b.cls", b"8"), ("a.png", png()), ("b.png", png())], [7, 8], {}),
        ([("a.png", png()), ("b.png", png()), ("a.cls", b"7")], [None, None], {"a (label)": "apart"}),
        ([("a.cls", b"7")], [], {"a": "a label without a picture"}),
        ([("a.png", png()), ("a.cls", b"cat")], [None], {"a.cls": "no whole number"}),
        ([("a.png", png()), ("a.cls", b"-3")], [None], {"a.cls": "an impossible label"}),
        ([("a.png", png()), ("a.cls", b"9" * 30)], [None], {"a.cls": "an impossible label"}),
        ([("a.png", png()), ("a.cls", b"9" * 5000)], [None], {"a.cls": "no whole number"}),
        ([("a.png", png()), ("a.json", b'{"label": 1e999}')], [None], {"a.json": "no whole number"}),
        ([("a.png", png()), ("a.json", b'{"label": 2.5}')], [None], {"a.json": "no whole number"}),
        ([("a.png", png()), ("a.json", b"[" * 100_000)], [None], {"a.json": "no JSON"}),
        ([("a.png", png()), ("a.json", b"\xff\xfe")], [None], {"a.json": "no JSON"}),
        ([("a.png", png()), ("a.json", b'{"width": 3}')], [None], {}),
        ([("a.png", png()), ("a.cls", b"1"), ("a.json", b'{"label": 2}')], [1], {"a (label)": "differ"}),
        ([("a.png", png()), ("a.txt", b"words"), ("a.png", png(1))], [None], {"a.png (again)": "before"}),
        ([("a.png", png()), ("b.png", png()), ("a.png", png(1))], [None, None], {"a (again)": "before"}),
        ([("a.avif", b"?"), ("b.png", png())], [None], {"a": "no picture in a format that is read"}),
    ],
)
def test_members_and_labels_of_every_kind(path, members, labels, said):
    path.write_bytes(archive(members))
    source = Shards(str(path), size=16)
    assert [p.label for p in source.stream()] == labels
    assert source.skipped.keys() == {f"set.tar/{name}" for name in said}
    assert all(text in source.skipped[f"set.tar/{name}"] for name, text in said.items())


def test_links_hold_no_picture_and_are_named(path):
    names, skipped = read(path, archive(PICTURES[:1], b"") + header("1.png", 0, b"2") + END)
    assert names == ["0"] and "a link" in skipped["set.tar/1"]


SQUARE = {"channels": 3, "size": 16}
MASKED = [(f"{i}.{field}", png(10 * i + n)) for i in range(3) for n, field in enumerate(("jpg", "seg.png"))]
PERIODS = [(f"trip.2021.{i:03d}.{kind}", data) for i in range(3) for kind, data in (("png", png(i)), ("cls", b"4"))]


def test_samples_of_several_pictures_need_a_choice(path):
    path.write_bytes(archive(MASKED))
    with pytest.raises(ValueError, match=r"several pictures \(jpg, seg.png\); choose one with --field jpg"):
        read(path)
    for field in ("jpg", "seg.png"):
        source = Shards(str(path), size=16, field=field)
        found = {p.name: p.pixels for p in source.stream()}
        assert [*found] == [f"set.tar/{i}" for i in range(3)] and not source.skipped
        for i in range(3):
            assert torch.equal(found[f"set.tar/{i}"], read_picture(dict(MASKED)[f"{i}.{field}"], "", **SQUARE))
    assert "no field webp, but jpg, seg.png" in read(path, field="webp")[1]["set.tar/0"]
    with pytest.raises(ValueError, match="field must be a picture's"):
        read(path, field="cls")


@pytest.mark.parametrize("field", ["*.png", "*"])
def test_names_with_periods_are_kept_apart(path, field):
    path.write_bytes(archive(PERIODS))
    with pytest.raises(ValueError, match=r"several pictures \(2021.000.png, 2021.001.png.*--field '\*.png'"):
        read(path)
    source = Shards(str(path), size=16, field=field)
    assert [(p.name, p.label) for p in source.stream()] == [(f"set.tar/trip.2021.{i:03d}", 4) for i in range(3)]


def test_shards_of_one_name_in_two_folders_are_distinguished(tmp_path):
    for folder in ("d0", "d1"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "set.tar").write_bytes(archive(PICTURES[:1]))
    source = Shards(str(tmp_path / "d{0..1}" / "set.tar"), size=16)
    assert [p.name for p in source.stream()] == ["d0/set.tar/0", "d1/set.tar/0"]


@pytest.mark.parametrize("name", ["set.tgz", "set.tar.gz", "SET.TGZ"])
def test_compressed_archives_go_by_their_usual_names(tmp_path, name):
    (tmp_path / name).write_bytes(gzip.compress(archive(PICTURES)))
    assert len(list(open_data(str(tmp_path / name), size=16).stream())) == 6


@pytest.fixture
def hasty(monkeypatch):
    """Sets time limits short enough for a test."""
    monkeypatch.setattr(http, "TIMEOUT_S", 0.4)
    monkeypatch.setattr(http, "PAUSE_S", 0.01)


WHOLE = archive(PICTURES)


def test_a_connection_that_breaks_is_opened_again_where_it_broke(hasty):
    asked = []

    def answer(handler):
        begin = int((handler.headers["Range"] or "bytes=0-")[6:-1])
        asked.append(begin)
        rest = WHOLE[begin : begin + 4000]
        where = {"Content_Range": f"bytes {begin}-{len(WHOLE) - 1}/{len(WHOLE)}"} if begin else {}
        send(handler, rest, len(WHOLE) - begin, 206 if begin else 200, **where)

    with server(answer) as address:
        assert read(address) == ([*"012345"], {})
    assert asked == [0, 4000, 8000]


def test_a_server_that_knows_no_ranges_is_read_from_the_front_again(hasty):
    tries = []

    def answer(handler):
        tries.append(1)
        send(handler, WHOLE[: 3000 * len(tries)] if len(tries) < 3 else WHOLE, len(WHOLE))

    with server(answer) as address:
        assert read(address) == ([*"012345"], {})
    assert len(tries) == 3


def _drip(handler):
    """A header that never ends, one byte at a time."""
    handler.wfile.write(b"HTTP/1.1 200 OK\r\nX: ")
    for _ in range(30):
        handler.wfile.write(b"x")
        time.sleep(0.1)


def _stall(handler):
    send(handler, WHOLE[:3000], len(WHOLE))
    handler.wfile.flush()
    time.sleep(0.8)


def _chunks(handler):
    handler.wfile.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n10000\r\n" + WHOLE[:3000])


def _changes(handler):
    begin = int((handler.headers["Range"] or "bytes=0-")[6:-1])
    where = {"Content_Range": f"bytes {begin}-/*"} if begin else {}
    send(handler, WHOLE[begin:3000], 5000, 206 if begin else 200, ETag=f'"{begin}"', **where)


@pytest.mark.parametrize(
    "answer, said, tries",
    [
        (lambda h: send(h, b"", status=404), "404", 1),
        (lambda h: send(h, b"", status=503), "503", 4),
        (lambda h: h.wfile.write(b"nonsense\r\n\r\n"), "nonsense", 4),
        (lambda h: h.connection.close(), "", 4),
        (lambda h: send(h, WHOLE[:3000], len(WHOLE)), "the connection ended", 4),
        (lambda h: send(h, WHOLE[:3000]), "cut off", 1),
        (lambda h: send(h, b"<html>sign in</html>" * 99), "no tar archive", 1),
        (_chunks, "", 4),
        (_changes, "changed while it was read", 2),
        (_drip, "no answer within", 4),
        (_stall, "", 4),
    ],
)
def test_a_faulty_server_is_named_and_the_run_goes_on(hasty, tmp_path, answer, said, tries):
    asked = []

    def counted(handler):
        asked.append(1)
        answer(handler)

    with server(counted) as address:
        names, skipped = read(address)
    assert said in skipped[address] and "cannot be read to its end" in skipped[address]
    assert len(asked) == tries and names in ([], ["0"], ["0", "1"])


def test_an_address_that_is_none_is_named(hasty):
    for address in ("http://127.0.0.1:1/{0..1}.tar", "http://[::1/set.tar", "http://xn--\u00e9.invalid:x/set.tar"):
        source = Shards(address, size=16)
        assert not list(source.stream()) and len(source.skipped) == len(source.shards)


def test_pictures_over_the_web_are_those_of_the_disk(path):
    path.write_bytes(WHOLE)
    with server(lambda h: send(h, WHOLE)) as address:
        for a, b in zip(Shards(address, size=16).stream(), Shards(str(path), size=16).stream(), strict=True):
            assert torch.equal(a.pixels, b.pixels) and a.name == b.name


def test_the_reader_needs_no_seek():
    from fastvq.data.tar import TarReader

    class Stream(io.BytesIO):
        def seek(self, *_):
            raise OSError("a stream")

    reader = TarReader(Stream(WHOLE))
    assert [(m.name, reader.read()) for m in reader] == PICTURES
