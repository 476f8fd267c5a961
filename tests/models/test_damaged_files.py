"""Checkpoints that are damaged, foreign or of an earlier version: one line of error, or the same weights as ever."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save

from fastvq._json import SEAL
from fastvq.models import VQVAE, VQVAE2, Prior, checkpoints
from fastvq.models.autoencoder import Autoencoder
from fastvq.models.checkpoints import METADATA, ZEROS, Pretrained, load_tensors, save_tensors
from fastvq.training.state import FORMAT, saved_step
from tests.support.models.small import pictures, small_vqvae, small_vqvae2

from .test_training import run


def read(path):
    """(tensors, metadata without the digest)."""
    with safe_open(str(path), framework="pt") as file:
        metadata = json.loads(file.metadata()[METADATA])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    del metadata["sha256"]
    return tensors, metadata


def write_as_before(path, tensors, metadata):
    """As versions without digests wrote it."""
    path.write_bytes(save(tensors, {METADATA: json.dumps(metadata)}))


def flipped(content, bit):
    changed = bytearray(content)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """{name: content} of a run of two steps."""
    folder = tmp_path_factory.mktemp("trained")
    run(folder, steps=2, make=small_vqvae)
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.suffix in (".json", ".safetensors")}


@pytest.fixture
def folder(tmp_path, trained):
    for name, content in trained.items():
        (tmp_path / name).write_bytes(content)
    return tmp_path


def resume(folder):
    return run(folder, steps=2, make=small_vqvae, resume=True)


@pytest.mark.parametrize("share", [0.0, 0.05, 0.2, 0.6, 0.999])
def test_a_flipped_bit_of_a_file_is_found(folder, share):
    for name, load in (("model.safetensors", VQVAE.from_pretrained), ("state.safetensors", resume)):
        path = folder / name
        content = path.read_bytes()
        path.write_bytes(flipped(content, int(8 * len(content) * share)))
        with pytest.raises(ValueError, match=name):
            load(folder)
        path.write_bytes(content)
        load(folder)


def test_the_digest_is_inside_the_file_and_found_by_its_name(tmp_path):
    path = tmp_path / "a.safetensors"
    tricky = {"format": "test", "names": json.dumps([f'sha256": "{ZEROS}', f'\\"sha256\\": \\"{ZEROS}'])}
    save_tensors(path, {f'"sha256": "{ZEROS}"': torch.ones(2)}, tricky)
    tensors, metadata = load_tensors("op", path, "test", ["names"])
    assert len(tensors) == 1 and metadata["names"] == tricky["names"] and metadata["sha256"] != ZEROS
    content = path.read_bytes()
    for bit in range(0, 8 * len(content), 5):
        path.write_bytes(flipped(content, bit))
        with pytest.raises(ValueError, match=r"op: .*a\.safetensors"):
            load_tensors("op", path, "test", ["names"])


def test_files_of_earlier_versions_are_read(folder, trained):
    for name in ("model.safetensors", "state.safetensors"):
        tensors, metadata = read(folder / name)
        metadata.pop("optimizer", None)
        write_as_before(folder / name, tensors, metadata)
    config = json.loads((folder / "config.json").read_text())
    del config[SEAL]
    (folder / "config.json").write_text(json.dumps(config))
    before = (folder / "model.safetensors").read_bytes()
    model = resume(folder)
    assert all(torch.equal(t, VQVAE.from_pretrained(folder).state_dict()[n]) for n, t in model.state_dict().items())
    # The weights are the right ones, so the file stays: ids that were made with it keep their meaning.
    assert (folder / "model.safetensors").read_bytes() == before and saved_step(folder) == 2


def test_a_model_that_does_not_follow_the_state_is_written_again(folder, trained):
    small_vqvae(seed=5).save_pretrained(folder)
    resume(folder)
    assert (folder / "model.safetensors").read_bytes() == trained["model.safetensors"]
    (folder / "config.json").unlink()
    (folder / "model.safetensors").write_bytes(trained["model.safetensors"][:-1])
    resume(folder)
    assert {name: (folder / name).read_bytes() for name in trained} == trained


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, m: t.pop("optimizer.0.exp_avg"), "misses optimizer.0.exp_avg"),
        (lambda t, m: t.update({"optimizer.0.exp_avg": torch.zeros(3)}), "exp_avg of shape .3., not"),
        (lambda t, m: t.update({"optimizer.0.momentum": torch.zeros(3)}), "has 'optimizer.0.momentum', which this"),
        (lambda t, m: t.update({"optimizer.999.step": torch.ones(())}), "has 'optimizer.999.step', which this"),
        (lambda t, m: [t.pop(n) for n in list(t) if n.startswith("optimizer.1.")], "misses optimizer.1.step"),
        (lambda t, m: t.update({"optimizer.0.step": torch.tensor(1, dtype=torch.int64)}), "not as floating"),
        (lambda t, m: t.update({"optimizer.0.step": torch.tensor(float("nan"))}), "must be of one step"),
        (lambda t, m: t.pop(next(n for n in t if n.startswith("average."))), "misses average"),
        (lambda t, m: t.update({"average.hydra": torch.zeros(3)}), "has 'average.hydra', which this run does not"),
        (lambda t, m: t.update({"model.hydra": torch.zeros(3)}), "not known: hydra"),
        (lambda t, m: t.update({"hydra.heads": torch.zeros(3)}), "got 'hydra'"),
        (lambda t, m: t.update({"model.decoder.mix.bias": torch.zeros(8, dtype=torch.int32)}), "of another type"),
        (lambda t, m: m.update(step="-1"), "the step in .* whole number in 1 .. .*, got -1"),
        (lambda t, m: m.update(step="1000000000"), r"must be of one step, got 1000000000 and the optimizer's 2.0"),
        (lambda t, m: m.update(step="1e30"), "got 1e.30"),
        (lambda t, m: m.update(step="two"), "the step in .* must be JSON"),
        (lambda t, m: m.pop("step"), r"missing: \['step'\]"),
        (lambda t, m: m.update(heads="9"), r"not known: \['heads'\]"),
        (lambda t, m: m.update(training="[]"), "the settings in .* must be an object"),
        (lambda t, m: m.update(model="[" * 50_000), "nesting is too deep"),
        (lambda t, m: m.update(optimizer="[-1]"), r"optimizer's list in .*\[0\] must be a whole number"),
    ],
)
def test_a_state_that_does_not_fit_says_why(folder, change, message):
    path = folder / "state.safetensors"
    tensors, metadata = read(path)
    change(tensors, metadata)
    save_tensors(path, tensors, metadata)
    with pytest.raises(ValueError, match=message) as error:
        resume(folder)
    assert "\n" not in str(error.value) and "state.safetensors" in str(error.value)


@pytest.mark.parametrize(
    "changes",
    [
        dict(hidden=4 * 10**9), dict(n_codes=10**12), dict(code_dim=2**62), dict(in_channels=10**40),
        dict(n_blocks=10**7), dict(depth=10**9, quantizer="residual"), dict(n_codes=[16] * 10**5), dict(hidden=-8),
        dict(hidden="8"), dict(hidden=None), dict(hidden=[8]), dict(hidden={}), dict(n_codes=[[16]]), dict(decay="x"),
        dict(n_blocks=1.5), dict(n_codes="9" * 4000), {"class": ["VQVAE"]}, {"class": "Pretrained"}, {"class": None},
    ],
)  # fmt: skip
def test_a_config_of_absurd_sizes_is_refused_before_anything_is_made(tmp_path, changes, monkeypatch):
    model = small_vqvae()
    model.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"class": "VQVAE", **model.config, **changes}))
    made = []
    monkeypatch.setattr(torch.nn.Conv2d, "reset_parameters", lambda self: made.append(self.weight.device.type))
    with pytest.raises(ValueError, match=r"fastvq\.models\.VQVAE\.from_pretrained") as error:
        VQVAE.from_pretrained(tmp_path)
    assert "\n" not in str(error.value) and set(made) <= {"meta"} and len(made) < 5000


@pytest.mark.parametrize("changes", [dict(n_layers=10**6), dict(channels=10**9), dict(n_classes=10**12),
                                     dict(shape=[10**9, 1]), dict(above=[[16, 10**30]]), dict(above=[[16, 2]] * 10**5),
                                     dict(kernel_size=10**9), dict(shape="ab"), dict(above=3)])  # fmt: skip
def test_a_prior_of_absurd_sizes_is_refused(tmp_path, changes):
    prior = Prior(16, 8, 2, 4, shape=(4, 4))
    prior.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"class": "Prior", **prior.config, **changes}))
    with pytest.raises(ValueError, match=r"fastvq\.models\.Prior\.from_pretrained") as error:
        Prior.from_pretrained(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "metadata", ["[]", "3", '"VQVAE"', "{", "[" * 10**5, '{"format": 3}', '{"format": "VQVAE", "x": "y"}']
)
def test_foreign_metadata_is_one_line(tmp_path, metadata):
    small_vqvae().save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(save(read(path)[0], {METADATA: metadata}))
    with pytest.raises(ValueError, match=r"model\.safetensors") as error:
        VQVAE.from_pretrained(tmp_path)
    assert "\n" not in str(error.value)


def test_a_save_that_was_killed_between_its_files_leaves_a_whole_model(tmp_path, monkeypatch):
    """The old config.json stands with the new weights: the config inside the weights file is used."""
    small_vqvae().save_pretrained(tmp_path)
    new = small_vqvae2()

    def killed(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoints, "write_json", killed)
    with pytest.raises(KeyboardInterrupt):
        new.save_pretrained(tmp_path)
    for _ in range(2):
        back = Autoencoder.from_pretrained(tmp_path)
        assert type(back) is VQVAE2 and back.config == new.config
        image = pictures(1)
        assert torch.equal(back.decode_maps(back.encode_maps(image)), new.eval().decode_maps(new.encode_maps(image)))
        (tmp_path / "config.json").unlink(missing_ok=True)


def test_a_model_that_computes_in_its_constructor_is_read(tmp_path):
    class Scaled(Pretrained):
        def __init__(self, scale):
            super().__init__()
            self.config = {"scale": scale}
            self.weight = torch.nn.Parameter(torch.ones(3) * scale)
            assert float(self.weight.detach().sum()) > 0  # impossible without memory

    Scaled(2).save_pretrained(tmp_path)
    assert torch.equal(Scaled.from_pretrained(tmp_path).weight, torch.full((3,), 2.0))
    del Pretrained._kinds["Scaled"]


def test_a_state_is_no_model(folder):
    with pytest.raises(ValueError, match="must hold a VQVAE, got format 'fastvq training state'"):
        load_tensors("op", folder / "state.safetensors", "VQVAE")
    assert load_tensors("op", folder / "state.safetensors", FORMAT, ["step", "model", "training", "optimizer"])
