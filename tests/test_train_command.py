"""``fastvq train``: few pictures, signals, and runs that fail at once."""

import signal

import pytest

from fastvq.cli import train as module
from fastvq.models import VQVAE, Prior
from tests.support.archives import png

from .test_cli import fastvq

SMALL = ["--size", "16", "--hidden", "8", "--codes", "16", "--code-dim", "4", "--blocks", "1", "--levels", "1",
         "--batch-size", "4", "--device", "cpu", "--steps", "6", "--save-every", "4", "--log-every", "2"]  # fmt: skip


@pytest.fixture(autouse=True)
def _one_thread(threads):
    threads(1)


@pytest.fixture
def train(tmp_path):
    """train(number of pictures, *options) into tmp_path / "run"."""

    def call(n, *options, status=0):
        for i in range(n):
            (tmp_path / "pictures").mkdir(exist_ok=True)
            (tmp_path / "pictures" / f"{i:02d}.png").write_bytes(png(i))
        command = ["train", "vqvae", "--data", tmp_path / "pictures", "--out", tmp_path / "run", *SMALL, *options]
        return " ".join(fastvq(*command, status=status).output.split())

    return call


@pytest.mark.parametrize("n", [1, 9])
def test_few_pictures_are_trained_on_and_none_is_held_out(train, tmp_path, n):
    assert "no picture is held out: training pictures are shown" in train(n)
    assert (tmp_path / "run" / "reconstructions.png").is_file() and VQVAE.from_pretrained(tmp_path / "run")
    text = fastvq("edit", "--model", tmp_path / "run", "--code", 1, status=2).output
    assert "has none" in " ".join(text.split())


def test_a_held_out_part_that_cannot_be_used_does_not_end_a_run(train, tmp_path):
    train(10)
    (tmp_path / "pictures" / "09.png").write_bytes(b"no picture")
    assert "no picture is held out" in train(0, "--out", tmp_path / "other")


def raises_at_step(monkeypatch, number, step):
    """The signal arrives while that step is computed."""
    calls = []

    def objective(net, batch):
        calls.append(1)
        if len(calls) == step:
            signal.raise_signal(number)
        return real(net, batch)

    real = module.autoencoder_objective
    monkeypatch.setattr(module, "autoencoder_objective", objective)


def test_sigterm_saves_a_checkpoint_and_ends_with_143(train, tmp_path, monkeypatch):
    train(12)
    whole = (tmp_path / "run" / "model.safetensors").read_bytes()
    raises_at_step(monkeypatch, signal.SIGTERM, 3)
    other = ["--out", tmp_path / "other"]
    text = train(12, *other, status=143)
    assert "stopped by SIGTERM after step 3, which is saved" in text and "with --resume goes on" in text
    monkeypatch.undo()
    train(12, *other, "--resume")
    assert (tmp_path / "other" / "model.safetensors").read_bytes() == whole
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_ctrl_c_says_how_to_resume(train, tmp_path, monkeypatch):
    raises_at_step(monkeypatch, signal.SIGINT, 5)
    assert "stopped by Ctrl-C; the same command with --resume goes on from the last checkpoint" in train(12, status=130)
    monkeypatch.undo()
    train(12, "--resume")


def test_a_run_that_fails_at_once_leaves_no_folder(train, tmp_path):
    for option, said in (("--size=18", "size must be multiples of 4"), ("--lr=-1", "lr must be above 0")):
        assert said in train(3, option, status=2)
    for path in (tmp_path / "pictures").iterdir():
        path.write_bytes(b"no picture")
    assert "no picture of pictures can be used" in train(0, status=2)
    assert not (tmp_path / "run").exists()


def test_a_prior_that_fails_at_once_leaves_no_folder(train, tmp_path):
    train(3)
    command = ["train", "prior", "--model", tmp_path / "run", "--out", tmp_path / "prior", "--steps", 2]
    (tmp_path / "set.tar").write_bytes(b"")
    assert "no picture of shards" in fastvq(*command, "--data", tmp_path / "set.tar", status=2).output
    assert not (tmp_path / "prior").exists()


def test_a_prior_of_pictures_with_and_without_a_class_knows_none(train, tmp_path):
    (tmp_path / "pictures" / "cats").mkdir(parents=True)
    (tmp_path / "pictures" / "cats" / "a.png").write_bytes(png(7))
    train(3)
    options = ["--steps", 2, "--channels", 8, "--layers", 1, "--batch-size", 4]
    fastvq("train", "prior", "--model", tmp_path / "run", "--out", tmp_path / "prior", *options)
    assert Prior.from_pretrained(tmp_path / "prior" / "level0").n_classes is None


def test_a_model_that_must_not_be_read_says_so(train, tmp_path, monkeypatch):
    train(3)
    weights = tmp_path / "run" / "model.safetensors"
    real = type(weights).open

    def refused(path, *options, **more):
        if path == weights:
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, *options, **more)

    monkeypatch.setattr(type(weights), "open", refused)
    said = " ".join(fastvq("info", tmp_path / "run", status=2).output.split())
    assert "Permission denied" in said and "truncated" not in said


def test_resume_with_other_pictures_is_refused(train, tmp_path):
    train(3)
    options = ["--channels", 8, "--layers", 1, "--batch-size", 4]
    prior = ["train", "prior", "--model", tmp_path / "run", "--out", tmp_path / "prior", *options]
    fastvq(*prior, "--steps", 2)
    fastvq(*prior, "--steps", 3, "--resume", "--data", f"{tmp_path / 'pictures'}/")  # one folder, another path
    assert "holds a run on other data (listing was of 3 files" in train(4, "--resume", status=2)
    text = " ".join(fastvq(*prior, "--steps", 4, "--resume", status=2).output.split())
    assert "holds a run on other data (listing was of 3 files" in text
