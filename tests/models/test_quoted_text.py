"""Errors quote the start of what a file holds, never all of it, and stay one line."""

import io
import json
import tarfile

import pytest
import torch
from safetensors.torch import save

from fastvq._files import LOCK, _lock, lock_folder
from fastvq._json import read_json, write_json
from fastvq._shorten import printable, shorten, shorten_text
from fastvq.cli.encode_config import open_output
from fastvq.cli.id_shards import FORMAT, MANIFEST_KIND, load_shard
from fastvq.cli.shared import check_outside, write_data
from fastvq.data import BadPicture, ImageFolder, Shards, open_data, read_picture
from fastvq.models import VQVAE
from fastvq.models.checkpoints import METADATA, load_state, save_tensors
from fastvq.training.state import STATE
from tests.support.models.small import small_vqvae

from .test_damaged_files import read
from .test_training import run

LONG = "x" * 5000
MOST = 1000  # characters of an error line, the path of the test's folder included


def test_values_and_texts_are_cut_at_their_limits():
    assert shorten("a") == "'a'" and shorten([1, "b"]) == "[1, 'b']" and shorten(LONG) == f"'{LONG[:79]}..."
    assert shorten_text("a\n b\x1b[31m\udcff") == "a b\\x1b[31m\\xdcff" == printable("a\n b\x1b[31m\udcff")
    assert shorten_text(ValueError(LONG)) == f"{LONG[:160]}..." and len(shorten_text("\0" * 10**6, 50)) == 53


def model_of(folder, metadata=None, tensors=None, config=None):
    """A model whose weights' metadata, tensors or edited config.json are changed."""
    model = small_vqvae()
    model.save_pretrained(folder)
    path = folder / "model.safetensors"
    before, described = read(path)
    save_tensors(path, {**before, **(tensors or {})}, {**described, **(metadata or {})})
    if config is not None:
        (folder / "config.json").write_text(json.dumps({"class": "VQVAE", **model.config, **config}))
    return VQVAE.from_pretrained(folder)


def header(folder, change):
    """Weights with a header that safetensors refuses with a message of its own."""
    small_vqvae().save_pretrained(folder)
    path = folder / "model.safetensors"
    data = path.read_bytes()
    n = int.from_bytes(data[:8], "little")
    changed = json.dumps(change(json.loads(data[8 : 8 + n]))).encode()
    path.write_bytes(len(changed).to_bytes(8, "little") + changed + data[8 + n :])
    return VQVAE.from_pretrained(folder)


def resumed(folder, **metadata):
    run(folder, steps=1, make=small_vqvae)
    tensors, described = read(folder / STATE)
    save_tensors(folder / STATE, tensors, {**described, **metadata})
    run(folder, steps=1, make=small_vqvae, resume=True)


def shard(folder, metadata, tensors=None):
    path = folder / "ids-00000.safetensors"
    whole = {"labels": torch.zeros(0, dtype=torch.int64)} if tensors is None else tensors
    save_tensors(path, whole, {"format": FORMAT, "names": "[]", **metadata})
    return load_shard("op", path, [4])


def begun(folder):
    (folder / "ids-00000.safetensors").touch()
    config = {"model_sha256": "", "data": LONG, "split": LONG, "size": 8, "shard_size": 3, "odd": LONG, "field": LONG}
    write_json(folder / "order.json", config)
    now = dict.fromkeys(config, "a")

    class Nothing:
        def listing(self):
            return []

    open_output(folder, {**now, "listing": {}}, Nothing(), [4], restart=False)


def other_data(folder):
    (folder / STATE).touch()
    write_json(folder / "data.json", {"data": LONG, "size": 8, "channels": 1, "odd": LONG, "field": LONG})
    write_data(folder, "digits", open_data("digits"), "skip", None)


def held(folder):
    with (folder / LOCK).open("w") as file:
        file.write(LONG)
        file.flush()
        assert _lock(file.fileno())
        with lock_folder("op", folder):
            pass


def archive(folder, *names):
    with tarfile.open(folder / "set.tar", "w") as tar:
        for name in names:
            info = tarfile.TarInfo(name)
            info.size = 3
            tar.addfile(info, io.BytesIO(b"abc"))
    shards = Shards(str(folder / "set.tar"))
    list(shards.stream())
    raise ValueError("; ".join(shards.skipped.values()))


def no_picture(folder):
    inner = folder / "ab"
    inner.mkdir()
    (inner / "a.heic").touch()
    source = ImageFolder.__new__(ImageFolder)
    source._find = lambda: source.skipped.update({LONG: LONG}) or []
    source.__init__(inner)


def refused_kind(folder, value):
    write_json(folder / "manifest.json", value)
    read_json("op", folder / "manifest.json", MANIFEST_KIND)


def decoder_error(monkeypatch):
    def fail(*_, **__):
        raise OSError(f"{LONG}\n{LONG}")

    monkeypatch.setattr("PIL.Image.open", fail)
    read_picture(b"", "a.png", channels=1, size=8)


MANIFEST = {
    "model_sha256": "", "data": "a", "split": "all", "size": 8, "shard_size": 3, "levels": 1, "n_codes": [4],
    "strides": [2], "pictures": 1, "skipped": {}, "shards": [{"name": LONG, "pictures": 1}],
}  # fmt: skip
DOORS = {
    "safetensors' message": lambda f: header(f, lambda h: {**h, LONG: LONG}),
    "safetensors' message, a dtype": lambda f: header(f, lambda h: {**h, "t": {"dtype": LONG}}),
    "a format": lambda f: model_of(f, {"format": LONG}),
    "metadata's names": lambda f: model_of(f, {f"{LONG}{i}": "" for i in range(9)}),
    "a class": lambda f: model_of(f, config={"class": [LONG]}),
    "a config's name": lambda f: model_of(f, config={LONG: 10**12}),
    "a config's list": lambda f: model_of(f, config={LONG: [0] * 2000}),
    "a constructor's argument": lambda f: model_of(f, config={LONG: 1}),
    "a constructor's value": lambda f: model_of(f, config={"quantizer": LONG}),
    "names of tensors": lambda f: model_of(f, tensors={f"{LONG}{i}": torch.zeros(1) for i in range(9)}),
    "names and shapes": lambda f: load_state("op", f, torch.nn.Linear(2, 3), {"bias": torch.zeros([1] * 64)}),
    "a step": lambda f: resumed(f, step=json.dumps(LONG)),
    "settings": lambda f: resumed(f, training=json.dumps({f"{i}{LONG}": LONG for i in range(99)})),
    "a shard's format": lambda f: shard(f, {"format": LONG}),
    "a shard's names": lambda f: shard(f, {"names": json.dumps([[LONG]])}),
    "a shard's tensors": lambda f: shard(f, {}, {LONG: torch.zeros(1)}),
    "a shard's shape": lambda f: shard(f, {}, {"labels": torch.zeros([1] * 64)}),
    "a manifest's value": lambda f: refused_kind(f, {**MANIFEST, "data": [LONG]}),
    "a manifest's shard": lambda f: refused_kind(f, MANIFEST),
    "a manifest's entry": lambda f: refused_kind(f, {**MANIFEST, LONG: 1}),
    "other options": begun,
    "other data": other_data,
    "a lock's holder": held,
    "data": lambda f: open_data(LONG),
    "shards": lambda f: open_data(f"{LONG}.tar"),
    "torchvision": lambda f: open_data(f"torchvision:{LONG}"),
    "a field": lambda f: open_data("a.tar", field=LONG),
    "odd": lambda f: read_picture(b"", "a.png", channels=1, size=8, odd=LONG),
    "fields of a sample": lambda f: archive(f, f"a.{LONG}.png", f"a.{LONG}.jpg"),
    "a label": lambda f: archive(f, "a.png", "a.cls"),
    "pictures left out": no_picture,
}


@pytest.mark.parametrize("door", DOORS)
def test_an_error_quotes_the_start_of_a_long_text(door, tmp_path):
    with pytest.raises((ValueError, OSError)) as error:
        DOORS[door](tmp_path)
    assert len(str(error.value)) < MOST and "\n" not in str(error.value), str(error.value)[:2000]


def test_a_decoder_s_long_message_is_cut(monkeypatch):
    with pytest.raises(BadPicture) as error:
        decoder_error(monkeypatch)
    assert len(str(error.value)) < 300 and "\n" not in str(error.value)


def test_a_long_name_of_data_is_no_folder(tmp_path):
    check_outside(tmp_path, LONG)


def test_foreign_metadata_is_read_without_a_digest(tmp_path):
    """Without a digest, as an earlier version or another program wrote it."""
    small_vqvae().save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(save(read(path)[0], {METADATA: json.dumps({"format": LONG})}))
    with pytest.raises(ValueError, match="must hold a VQVAE, got format 'xxx") as error:
        VQVAE.from_pretrained(tmp_path)
    assert len(str(error.value)) < MOST
