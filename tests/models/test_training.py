"""Training: learning, resumed runs that agree bit for bit, backends against each other, errors."""

import functools
import itertools
import json
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastvq
from fastvq.data import Loader
from fastvq.models import VQVAE, Prior
from fastvq.training import TrainConfig, autoencoder_objective, prior_objective, train
from fastvq.training.state import load_run
from tests.support.models.small import Squares, pictures, small_vqvae, small_vqvae2

ROOT = Path(__file__).parents[2]
CONFIG = dict(steps=12, batch_size=8, accumulate=2, lr=3e-3, warmup=3, ema=0.9, save_every=4, log_every=3)


def run(folder, *, resume=False, on_step=None, make=small_vqvae2, **changes):
    config = TrainConfig(**{**CONFIG, **changes})
    model = make(kmeans_init=True, dead_code_threshold=1.0, update="manual")
    loader = Loader(Squares(), config.batch_size, augment="shift")
    train(model, autoencoder_objective, loader, config, folder, resume=resume, on_step=on_step)
    return model


def lines(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    return run(folder), folder


def test_training_lowers_the_loss_and_logs_it(tmp_path):
    run(tmp_path, make=small_vqvae, steps=60, log_every=20)
    log = lines(tmp_path)
    assert [line["step"] for line in log] == [20, 40, 60]
    assert log[-1]["reconstruction_loss"] < 0.7 * log[0]["reconstruction_loss"]
    assert {"loss", "psnr", "perplexity_0", "used_0", "rate", "gradient_norm", "pictures_per_second"} <= log[0].keys()


def test_a_run_that_was_killed_resumes_to_the_same_bits(tmp_path, whole):
    script = [sys.executable, "-m", "tests.support.models.killed_run", str(tmp_path), "10"]
    killed = subprocess.run(script, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert [line["step"] for line in lines(tmp_path)] == [3, 6, 9]
    model = run(tmp_path, resume=True)
    assert same(model, whole[0])
    assert (tmp_path / "model.safetensors").read_bytes() == (whole[1] / "model.safetensors").read_bytes()
    assert [line["step"] for line in lines(tmp_path)] == [3, 6, 9, 12]


def test_a_finished_run_is_not_overwritten(whole):
    with pytest.raises(ValueError, match="holds a run already; resume it"):
        run(whole[1])
    assert same(run(whole[1], resume=True), whole[0])


def test_a_state_of_another_run_is_refused(tmp_path, whole):
    for name in ("state.safetensors", "log.jsonl"):
        (tmp_path / name).write_bytes((whole[1] / name).read_bytes())
    with pytest.raises(ValueError, match=r"another settings \(lr was 0.003, is 0.1\)"):
        run(tmp_path, resume=True, lr=0.1)
    with pytest.raises(ValueError, match="another model"):
        run(tmp_path, resume=True, make=small_vqvae)
    state = tmp_path / "state.safetensors"
    state.write_bytes(state.read_bytes()[:-100])
    with pytest.raises(ValueError, match="truncated"):
        run(tmp_path, resume=True)
    state.write_bytes((whole[1] / "model.safetensors").read_bytes())
    with pytest.raises(ValueError, match="must hold a fastvq training state"):
        run(tmp_path, resume=True)


def test_a_full_disk_ends_the_run_and_leaves_the_last_checkpoint(tmp_path, whole):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(step):
        if step == 4:
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))

    try:
        with pytest.raises(OSError, match=r"step 8 could not be written.*last good one, of step 4"):
            run(tmp_path, on_step=fill)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert same(run(tmp_path, resume=True), whole[0])


@pytest.mark.parametrize("log_every", [1, 12])
def test_a_loss_that_is_not_finite_ends_the_run_and_is_not_saved(tmp_path, log_every):
    with pytest.raises(ValueError, match="not finite near step"):
        run(tmp_path, lr=1e30, warmup=0, clip=0.0, log_every=log_every)
    assert not (tmp_path / "state.safetensors").exists()


def test_tensorboard_gets_the_numbers_of_the_log(tmp_path):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run(tmp_path, make=small_vqvae, steps=4, log_every=1, save_every=2)
    run(tmp_path, make=small_vqvae, steps=6, log_every=1, resume=True)
    read = events.EventAccumulator(str(tmp_path))
    read.Reload()
    log = lines(tmp_path)
    for name in ("loss", "psnr", "perplexity_0", "used_0", "rate"):
        written = read.Scalars(name)
        assert [(e.step, e.value) for e in written] == [(line["step"], pytest.approx(line[name])) for line in log]


def test_without_tensorboard_there_is_the_log_alone(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)  # importing it raises ImportError
    run(tmp_path, make=small_vqvae, steps=2, log_every=1)
    assert len(lines(tmp_path)) == 2 and not list(tmp_path.glob("*tfevents*"))


@pytest.mark.parametrize("changes", [dict(precision="bf16"), dict(compile=True, steps=2)])
def test_options_run(tmp_path, changes, monkeypatch):
    # Everything of torch.compile but the C++ compiler, which takes a minute.
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    model = run(tmp_path, make=small_vqvae, **changes)
    assert all(t.isfinite().all() and t.dtype != torch.bfloat16 for t in model.state_dict().values())
    assert VQVAE.from_pretrained(tmp_path).config == model.config


def test_a_compiled_prior_learns_what_a_plain_one_does(tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    model = small_vqvae2().eval()
    for compiled in (False, True):
        torch.manual_seed(0)
        prior = Prior(16, 8, 2, 4, above=[(16, 2)], shape=model.map_shapes(16, 16)[1])
        config = TrainConfig(steps=2, batch_size=8, log_every=1, compile=compiled)
        folder = tmp_path / str(compiled)
        train(prior, prior_objective(model, 1, with_labels=True), Loader(Squares(), 8), config, folder)
    plain, compiled = (lines(tmp_path / name) for name in ("False", "True"))
    # The same operators in the same order, but for what autograd adds up elsewhere: a few roundings of float32, and
    # the log's own to six places.
    assert [line["loss"] for line in compiled] == pytest.approx([line["loss"] for line in plain], rel=1e-6, abs=1e-6)


def test_the_exported_weights_are_the_averages(whole):
    model, folder = whole
    live = small_vqvae2(kmeans_init=True, dead_code_threshold=1.0, update="manual")
    from fastvq.training.state import Averages

    config = TrainConfig(**CONFIG)
    averages = Averages(live, config.ema)
    optimizer = torch.optim.AdamW(live.parameters(), config.lr, weight_decay=0.0)
    assert load_run(folder, live, optimizer, averages, config) == config.steps
    assert not same(live, model)
    averages.swap()
    assert same(live, model)


@pytest.mark.parametrize("level", [0, 1])
def test_a_prior_learns_each_level(tmp_path, level):
    model = small_vqvae2().eval()
    model.requires_grad_(False)
    torch.manual_seed(0)
    prior = Prior(16, 8, 2, 4, above=[(16, 2)] * level, shape=model.map_shapes(16, 16)[level])
    config = TrainConfig(steps=40, batch_size=16, lr=1e-2, warmup=2, log_every=10)
    objective = prior_objective(model, level, with_labels=True)
    train(prior, objective, Loader(Squares(), 16), config, tmp_path)
    log = lines(tmp_path)
    assert log[-1]["bits_per_id"] < log[0]["bits_per_id"]


def test_the_schedule_rises_and_falls():
    config = TrainConfig(steps=100, warmup=10, lr=1.0, final_lr=0.1)
    rates = [config.rate(s) for s in range(100)]
    assert rates[0] == pytest.approx(0.1) and max(rates) == rates[9] == rates[10] == 1.0
    assert all(a > b for a, b in itertools.pairwise(rates[10:])) and 0.1 < rates[-1] < 0.101
    for field, value in (("steps", 0), ("ema", 1.0), ("lr", 0.0), ("precision", "fp8")):
        with pytest.raises(ValueError, match=field):
            TrainConfig(**{field: value})


def test_backends_train_alike_for_fifty_steps(tmp_path):
    """Indices are exact on both, statistics are summed in float64 on both: the last bits of sums differ."""
    runs = {}
    for backend in ("cpu", "reference"):
        with fastvq.use_backend(backend):
            model = run(tmp_path / backend, steps=50, accumulate=1, log_every=1, save_every=50)
            runs[backend] = lines(tmp_path / backend), model
    (fast, a), (plain, b) = runs["cpu"], runs["reference"]
    assert len(fast) == 50
    for x, y in zip(fast, plain, strict=True):
        assert x["used_0"] == y["used_0"] and x["used_1"] == y["used_1"]
        # A rounding of a weight moves the loss by the rounding times the gradient and lr. After 50 steps that is still
        # less than a hundred roundings of the loss itself, the tolerance here.
        assert x["loss"] == pytest.approx(y["loss"], rel=100 * 2.0**-24, abs=1e-6)  # and the log's own to six places
    image = pictures(16)
    for x, y in zip(a.encode(image), b.encode(image), strict=True):
        assert (x == y).float().mean() > 0.99
