"""Weights on disk: written whole or not at all; files of another kind are refused."""

import json
import resource

import pytest
import torch
from safetensors.torch import save_file

from fastvq._files import write_atomically
from fastvq.models import VQVAE, VQVAE2, Prior
from fastvq.models.autoencoder import Autoencoder
from fastvq.models.checkpoints import load_tensors, save_tensors
from tests.support.models.small import pictures, small_vqvae, small_vqvae2


@pytest.mark.parametrize("make", [small_vqvae, small_vqvae2])
def test_a_model_comes_back_as_it_was(make, tmp_path):
    model = make(commitment_weight=0.5, dead_code_threshold=1.0).eval()
    model.save_pretrained(tmp_path)
    back = Autoencoder.from_pretrained(tmp_path)
    assert type(back) is type(model) and back.config == model.config and not back.training
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), back.state_dict().values(), strict=True))
    image = pictures(2)
    assert torch.equal(back.decode_maps(back.encode_maps(image)), model.decode_maps(model.encode_maps(image)))


def test_a_prior_comes_back_as_it_was(tmp_path):
    prior = Prior(16, 8, 2, 3, above=[(16, 2)], shape=(4, 4)).eval()
    prior.save_pretrained(tmp_path)
    back = Prior.from_pretrained(tmp_path)
    ids, above, labels = (
        torch.zeros(1, 4, 4, dtype=torch.int64),
        [torch.ones(1, 2, 2, dtype=torch.int64)],
        torch.tensor([2]),
    )
    assert torch.equal(prior(ids, labels, above), back(ids, labels, above)) and back.shape == (4, 4)


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.999])
def test_a_truncated_file_says_so(share, tmp_path):
    small_vqvae().save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    with pytest.raises(ValueError, match=r"model\.safetensors must be a safetensors file.*truncated"):
        VQVAE.from_pretrained(tmp_path)


def test_a_pickle_is_not_opened(tmp_path):
    class Trap:
        def __reduce__(self):
            return (pytest.fail, ("a checkpoint was unpickled",))

    small_vqvae().save_pretrained(tmp_path)
    torch.save({"trap": Trap()}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="must be a safetensors file"):
        VQVAE.from_pretrained(tmp_path)


def test_foreign_files_are_named(tmp_path):
    small_vqvae().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"must describe a VQVAE2, got class 'VQVAE'"):
        VQVAE2.from_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["__sha256__"]  # as who edits the file on purpose does
    (tmp_path / "config.json").write_text(json.dumps({**config, "hidden": 12}))
    with pytest.raises(ValueError, match=r"of another shape: .* is .* not .*another configuration"):
        VQVAE.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**config, "heads_of_hydra": 9}))
    with pytest.raises(ValueError, match="does not fit this version of VQVAE"):
        VQVAE.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"class": "VQ')
    with pytest.raises(ValueError, match="must be JSON"):
        VQVAE.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file({"weight": torch.zeros(3)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="must hold a VQVAE, got format None"):
        VQVAE.from_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match="train a model first"):
        VQVAE.from_pretrained(tmp_path / "nowhere")


def test_a_full_disk_leaves_the_last_good_file(tmp_path):
    """A limit on the size of files stands for the disk: writes fail in the middle, as they do on a full one."""
    path = tmp_path / "weights.safetensors"
    save_tensors(path, {"a": torch.ones(10)}, {"format": "test"})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(OSError, match=r"weights\.safetensors"):
            save_tensors(path, {"a": torch.ones(10_000)}, {"format": "test"})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert torch.equal(load_tensors("test", path, "test")[0]["a"], torch.ones(10))
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_files_are_written_for_everyone_who_may_read(tmp_path):
    import os

    before = os.umask(0o022)
    try:
        write_atomically(tmp_path / "a", b"x")
    finally:
        os.umask(before)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize("make", [small_vqvae, small_vqvae2])
def test_files_of_earlier_versions_are_read(make, tmp_path):
    """They held a bool ``initialised``, and no digests."""
    model = make(kmeans_init=True).train()
    model(pictures(8))
    state = {name: t.bool() if name.endswith("initialised") else t for name, t in model.state_dict().items()}
    config = {"class": type(model).__name__, **model.config}
    save_file(state, tmp_path / "model.safetensors", {"fastvq": json.dumps({"format": type(model).__name__})})
    (tmp_path / "config.json").write_text(json.dumps(config))
    back = Autoencoder.from_pretrained(tmp_path)
    assert all(torch.equal(t, back.state_dict()[name]) for name, t in model.state_dict().items())
    torch.manual_seed(1)
    model(pictures(8))
    torch.manual_seed(1)
    back.train()(pictures(8))
    assert all(torch.equal(t, back.state_dict()[name]) for name, t in model.state_dict().items())
