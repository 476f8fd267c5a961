"""The command: what a new user runs, from training to an edit, on small pictures."""

import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from fastvq.cli import app
from fastvq.data import ImageFolder

from .test_data import BAD

ROOT = Path(__file__).parents[1]
HOLD = """
import sys, time
from fastvq._files import lock_folder
with lock_folder("test", sys.argv[1]):
    print("held", flush=True)
    time.sleep(99)
"""
SMALL = ["--size", "16", "--channels", "1", "--hidden", "8", "--codes", "16", "--code-dim", "4", "--blocks", "1",
         "--batch-size", "8", "--device", "cpu", "--log-every", "2"]  # fmt: skip


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def fastvq(*arguments, status=0):
    result = CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False)
    assert result.exit_code == status, result.output
    return result


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder of pictures, a two-level model of them and its priors."""
    root = tmp_path_factory.mktemp("runs")
    rng = np.random.default_rng(0)
    for i in range(30):
        path = root / "pictures" / "ab"[i % 2] / f"{i:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (16, 16), np.uint8)).save(path)
    (root / "pictures" / "a" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    data = ["--data", root / "pictures"]
    fastvq("train", "vqvae", *data, "--out", root / "vqvae", "--levels", 2, "--downsample", 2, "--steps", 6, *SMALL)
    fastvq("train", "prior", "--model", root / "vqvae", "--out", root / "prior", "--steps", 4, "--batch-size", 8,
           "--channels", 8, "--layers", 2, "--device", "cpu")  # fmt: skip
    return root


def side(path):
    with Image.open(path) as picture:
        picture.load()
        return picture.size


def test_training_writes_a_model_a_log_and_pictures(runs):
    names = {p.name for p in (runs / "vqvae").iterdir() if ".tfevents." not in p.name}
    pictures = {"codebook.png", "ids.png", "loss.png", "reconstructions.png", "usage.png"}
    assert names == {"config.json", "data.json", "log.jsonl", "model.safetensors", "skipped.json",
                     "state.safetensors", *pictures}  # fmt: skip
    assert [json.loads(s)["step"] for s in (runs / "vqvae" / "log.jsonl").read_text().splitlines()] == [2, 4, 6]
    assert min(side(runs / "vqvae" / "reconstructions.png")) > 90 and side(runs / "vqvae" / "usage.png") == (640, 300)
    assert json.loads((runs / "vqvae" / "skipped.json").read_text()).keys() == {"a/broken.png"}
    assert {p.name for p in (runs / "prior").iterdir()} == {
        "data.json", "level0", "level1", "model.json", "samples.png",
    }  # fmt: skip
    assert side(runs / "prior" / "samples.png")[0] > 8 * 96  # eight of each class in a row


def test_a_second_run_needs_resume(runs):
    again = ["train", "vqvae", "--data", runs / "pictures", "--out", runs / "vqvae", "--levels", 2, "--downsample", 2,
             "--steps", 6, *SMALL]  # fmt: skip
    assert "resume it" in " ".join(fastvq(*again, status=2).output.split())
    before = (runs / "vqvae" / "model.safetensors").read_bytes()
    fastvq(*again, "--resume")
    assert (runs / "vqvae" / "model.safetensors").read_bytes() == before


def test_a_run_is_not_gone_on_with_other_data(runs):
    before = (runs / "vqvae" / "data.json").read_text()
    for way in ([], ["--resume"]):
        said = fastvq("train", "vqvae", "--data", runs / "pictures" / "a", "--out", runs / "vqvae", *SMALL, *way,
                      status=2).output  # fmt: skip
        assert "holds a run on other data" in " ".join(said.split())
    assert (runs / "vqvae" / "data.json").read_text() == before


def test_priors_of_another_model_are_refused(runs, tmp_path):
    """Ids mean something to the model that made them alone."""
    fastvq("train", "vqvae", "--data", runs / "pictures", "--out", tmp_path / "other", "--levels", 2, "--downsample", 2,
           "--steps", 1, "--seed", 1, *SMALL)  # fmt: skip
    other = ["--model", tmp_path / "other"]
    for command in (
        ["sample", *other, "--prior", runs / "prior"],
        ["edit", *other, "--prior", runs / "prior", "--label", 0],
        ["train", "prior", *other, "--out", runs / "prior", "--resume"],
    ):
        assert "ids of another model" in " ".join(fastvq(*command, status=2).output.split())


def test_no_run_ends_for_pictures_that_cannot_be_used(runs, tmp_path):
    folder = tmp_path / "pictures"
    shutil.copytree(runs / "pictures" / "b", folder)
    for i, (name, (content, _)) in enumerate(BAD.items()):
        (folder / f"{i:02d}-{name}").write_bytes(content)
    bad = {f"{i:02d}-{name}": reason for i, (name, (_, reason)) in enumerate(BAD.items())}
    # 24 files, of which two are held out, and the epochs that see all others.
    said = fastvq("train", "vqvae", "--data", folder, "--out", tmp_path / "run", "--levels", 1, "--steps", 6, *SMALL)
    left_out = json.loads((tmp_path / "run" / "skipped.json").read_text())
    assert set(left_out) == set(bad) - {p.name for p in ImageFolder(folder, "held-out").paths}
    log = [json.loads(s) for s in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert log[-1]["skipped"] == len(left_out) and f"{len(left_out)} left out" in said.output
    fastvq("encode", folder, "--model", tmp_path / "run", "--out", tmp_path / "ids", "--device", "cpu")
    manifest = json.loads((tmp_path / "ids" / "manifest.json").read_text())
    assert manifest["pictures"] == 15 and set(manifest["skipped"]) == set(bad)
    assert all(bad[name] in reason for name, reason in manifest["skipped"].items())


def test_samples_by_label_and_of_every_class(runs, tmp_path):
    both = ["--model", runs / "vqvae", "--prior", runs / "prior"]
    fastvq("sample", *both, "--label", 1, "--n", 4, "--out", tmp_path / "one.png", "--each", tmp_path / "each")
    fastvq("sample", *both, "--n", 3, "--out", tmp_path / "all.png")
    asked = [json.loads(s) for s in (tmp_path / "one.jsonl").read_text().splitlines()]
    assert [(line["label"], line["pictures"], line["file"]) for line in asked] == [(1, 4, "one.png")]
    assert len(list((tmp_path / "each").iterdir())) == 4 and side(tmp_path / "each" / "00000.png") == (16, 16)
    assert side(tmp_path / "all.png")[0] > 3 * 96
    assert "one of the prior's classes (0 .. 1)" in " ".join(
        fastvq("sample", *both, "--label", 5, status=2).output.split()
    )


def test_a_transplant_into_a_picture_that_is_not_square(runs, tmp_path):
    for name, shape in (("wide", (16, 32)), ("tall", (40, 24))):
        Image.fromarray(np.full(shape, 99, np.uint8)).save(tmp_path / f"{name}.png")
    fastvq("edit", tmp_path / "wide.png", "--model", runs / "vqvae", "--source", tmp_path / "tall.png", "--out",
           tmp_path / "edit.png")  # fmt: skip
    assert side(tmp_path / "edit-picture.png") == (32, 16)


@pytest.mark.parametrize("way", [["--code", "3,5"], ["--swap", "1:2,2:1"], ["--source-index", "1"], ["--label", "0"]])
def test_edits_write_what_they_changed(runs, tmp_path, way):
    out = tmp_path / "edit.png"
    result = fastvq("edit", "--model", runs / "vqvae", "--prior", runs / "prior", "--box", "4,4,8,8", "--n", 2,
                    "--candidates", 2, "--out", out, *way)  # fmt: skip
    said = json.loads(result.stdout)
    assert json.loads((tmp_path / "edit.jsonl").read_text()).items() >= said.items()
    assert said["region"] == [4, 4, 8, 8] and len(said["changed_ids"]) == 2
    assert side(out)[0] > 4 * 96 and side(tmp_path / "edit-picture.png") == (16, 16)
    assert (tmp_path / "edit-1.png").exists() == (way[0] == "--label")


def test_an_edit_of_a_file(runs, tmp_path):
    Image.new("RGBA", (40, 22), (200, 30, 30, 255)).save(tmp_path / "mine.png")
    fastvq("edit", tmp_path / "mine.png", "--model", runs / "vqvae", "--code", "3,5", "--out", tmp_path / "out.png")
    assert side(tmp_path / "out-picture.png") == (40, 20)


def test_encoding_is_resumed_and_decoded(runs, tmp_path):
    command = ["encode", runs / "pictures", "--model", runs / "vqvae", "--out", tmp_path / "ids", "--shard-size", 10,
             "--batch-size", 4, "--device", "cpu"]  # fmt: skip
    fastvq(*command)
    manifest = json.loads((tmp_path / "ids" / "manifest.json").read_text())
    assert manifest["pictures"] == 30 and list(manifest["skipped"]) == ["a/broken.png"]
    files = {p: p.read_bytes() for p in (tmp_path / "ids").glob("ids-*")}
    log = [json.loads(s) for s in (tmp_path / "ids" / "log.jsonl").read_text().splitlines()]
    assert len(files) == 4 and {line["shard"] for line in log} == {p.name for p in files}
    assert sum(line["pictures"] for line in log) == 30 and log[-1]["left_out"] == 1
    assert side(tmp_path / "ids" / "usage.png") == (640, 300)
    assert side(tmp_path / "ids" / "reconstructions.png")[0] > 8 * 96
    kept, lost, cut = sorted(files)[:3]
    lost.unlink()
    cut.write_bytes(files[cut][:50])
    stamp = kept.stat().st_mtime_ns
    fastvq(*command)
    assert json.loads((tmp_path / "ids" / "manifest.json").read_text()) == manifest
    assert all(p.read_bytes() == content for p, content in files.items()) and kept.stat().st_mtime_ns == stamp
    fastvq("decode", tmp_path / "ids", "--model", runs / "vqvae", "--out", tmp_path / "decoded", "--limit", 7)
    assert len(list((tmp_path / "decoded").rglob("*.png"))) == 7 and (tmp_path / "decoded" / "log.jsonl").is_file()
    assert side(tmp_path / "decoded" / "a" / "00.png.png") == (16, 16)
    assert "another shard_size" in fastvq(*command, "--shard-size", 5, status=2).output


def test_shards_are_encoded_without_those_that_are_broken(runs, tmp_path):
    with tarfile.open(tmp_path / "set.tar", "w") as tar:
        for path in sorted((runs / "pictures").rglob("*.png")):
            tar.add(path, path.name)
    fastvq("encode", tmp_path / "set.tar", "--model", runs / "vqvae", "--out", tmp_path / "ids", "--shard-size", 16)
    manifest = json.loads((tmp_path / "ids" / "manifest.json").read_text())
    assert [s["pictures"] for s in manifest["shards"]] == [15, 15]  # of 16 samples and of 15
    assert list(manifest["skipped"]) == ["set.tar/broken"]


def test_a_second_run_into_a_folder_is_refused(runs, tmp_path):
    model = ["--model", runs / "vqvae"]
    for i, command in enumerate((
        ["train", "vqvae", "--data", runs / "pictures", "--levels", 1, "--steps", 2, *SMALL],
        ["train", "prior", *model, "--steps", 1],
        ["encode", runs / "pictures", *model],
    )):  # fmt: skip
        out = tmp_path / str(i)
        # Another process: a folder that this one holds counts as the command's own.
        first = subprocess.Popen([sys.executable, "-c", HOLD, out], cwd=ROOT, stdout=subprocess.PIPE)
        assert first.stdout.readline()
        said = fastvq(*command, "--out", out, status=2).output
        first.kill()
        first.wait()
        first.stdout.close()
        assert f"another run (process {first.pid}" in said and [p.name for p in out.iterdir()] == [".fastvq-lock"]


def test_a_damaged_shard_is_named_and_made_again(runs, tmp_path):
    both = ["--model", runs / "vqvae", "--out"]
    command = ["encode", runs / "pictures", *both, tmp_path / "ids", "--shard-size", 10, "--device", "cpu"]
    fastvq(*command)
    path = sorted((tmp_path / "ids").glob("ids-*"))[1]
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    leftover = tmp_path / "ids" / ".ids.12345678.fastvq-tmp"
    leftover.touch()
    said = fastvq("decode", tmp_path / "ids", *both, tmp_path / "decoded", status=2).output
    assert path.name in said and "its digest differs" in said
    fastvq(*command)
    assert path.read_bytes() == content and not leftover.exists()
    other = sorted((tmp_path / "ids").glob("ids-*"))[0]
    path.write_bytes(other.read_bytes())  # whole, and not what belongs there
    said = fastvq("decode", tmp_path / "ids", *both, tmp_path / "decoded", status=2).output
    assert "is not the shard that manifest.json lists" in said


def test_info_describes_what_it_is_given(runs):
    assert json.loads(fastvq("info").stdout)["build"]
    described = json.loads(fastvq("info", runs / "vqvae").stdout)
    assert described["class"] == "VQVAE2" and described["step"] == 6
    assert json.loads(fastvq("info", runs / "prior" / "level1").stdout)["class"] == "Prior"


def test_info_names_a_damaged_file(runs, tmp_path):
    def refused(folder, *named):
        lines = fastvq("info", folder, status=2).stderr.splitlines()
        assert len(lines) == 1 and all(part in lines[0] for part in named), lines

    def whole(folder):
        return fastvq("info", folder).stdout

    model, expected = tmp_path / "model", whole(runs / "vqvae")
    shutil.copytree(runs / "vqvae", model)
    for name in ("config.json", "data.json", "model.safetensors", "state.safetensors"):
        content = (model / name).read_bytes()
        (model / name).write_bytes(content[:-9] + bytes([content[-9] ^ 1]) + content[-8:])
        refused(model, name)
        (model / name).write_bytes(content)
    config = (model / "config.json").read_text()
    (model / "config.json").write_text(json.dumps(json.loads(config)))  # in another layout
    assert whole(model) == expected
    shutil.copy(runs / "prior" / "level0" / "config.json", model)
    refused(model, "config.json must describe the model in model.safetensors")
    (model / "config.json").unlink()  # it is inside the weights' file too
    assert whole(model) == expected

    ids = tmp_path / "ids"
    fastvq("encode", runs / "pictures", "--model", runs / "vqvae", "--out", ids, "--shard-size", 10, "--device", "cpu")
    expected = whole(ids)
    for path in (ids / "order.json", ids / "manifest.json", *sorted(ids.glob("ids-*"))):
        content = path.read_bytes()
        path.write_bytes(content[:-9] + bytes([content[-9] ^ 1]) + content[-8:])
        refused(ids, path.name)
        path.write_bytes(content)
    path.unlink()
    refused(ids, f"there is no file {path}")
    path.write_bytes(content)
    assert whole(ids) == expected


def test_errors_are_one_line(runs, tmp_path):
    both = ["--model", runs / "vqvae", "--prior", runs / "prior"]
    broken = runs / "pictures" / "a" / "broken.png"
    shutil.copytree(runs / "vqvae", tmp_path / "cut")
    weights = tmp_path / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "manifest.json").write_text('{"name": "an app"}')
    for arguments, message in (
        (["train", "vqvae", "--data", "digit", "--out", tmp_path / "x"], "data must be digits"),
        (["sample", "--model", tmp_path], "train a model first"),
        (["edit", "--model", runs / "vqvae", "--box", "1,2", "--code", "1,1"], "--box must be 4 whole numbers"),
        (["edit", "--model", runs / "vqvae", "--box", "9,9,1,1", "--code", "1,1"], "region as a box"),
        (["edit", "--model", runs / "vqvae", "--box", "0,0,99,4", "--code", "1,1"], "region as a box"),
        (["edit", "--model", runs / "vqvae", "--index", 99, "--code", "1,1"], "holds out pictures 0 .. 2, got 99"),
        (["edit", *both, "--label", 2], "must be one of the prior's classes (0 .. 1), got 2"),
        (["edit", broken, "--model", runs / "vqvae", "--code", "1,1"], "cannot be read"),
        (["edit", tmp_path / "none.png", "--model", runs / "vqvae", "--code", "1,1"], "No such file"),
        (["sample", *both, "--size", 18], "size must be multiples of 4"),
        (["sample", *both, "--device", "abacus"], "device must be one that this torch can use"),
        (["info", tmp_path], "train a model first"),
        (["info", tmp_path / "cut"], "truncated"),
        (["info", tmp_path / "foreign"], "manifest.json must be an object with"),
        (["decode", tmp_path / "foreign", "--model", runs / "vqvae"], "manifest.json must be an object with"),
        (["encode", tmp_path / "none", "--model", runs / "vqvae"], "data must be digits"),
    ):
        output = fastvq(*arguments, status=2).output
        assert message in " ".join(output.split()) and "Traceback" not in output


def test_two_processes_do_what_one_does(tmp_path):
    """Under torchrun: losses within rounding of one process that takes the same micro-batches, tokens to the bit."""
    rng = np.random.default_rng(0)
    (tmp_path / "pictures").mkdir()
    for i in range(24):
        Image.fromarray(rng.integers(0, 256, (16, 16), np.uint8)).save(tmp_path / "pictures" / f"{i:02d}.png")
    # Means of the first batch, and replacements, are of other vectors where two processes hold them.
    command = ["train", "vqvae", "--data", tmp_path / "pictures", "--levels", 1, "--steps", 4, "--no-kmeans",
             "--dead-codes", 0, *SMALL[:-1], 1]  # fmt: skip
    fastvq(*command, "--accumulate", 2, "--out", tmp_path / "one")
    _torchrun([*command, "--accumulate", 1, "--out", tmp_path / "two"])
    one, two = ([json.loads(s) for s in (tmp_path / n / "log.jsonl").read_text().splitlines()] for n in ("one", "two"))
    assert [line["step"] for line in two] == [1, 2, 3, 4]
    # Gradients are summed in another order: an element may be off by a rounding, 6e-8 of the sum of its terms' sizes,
    # and Adam moves a weight whose gradient is nothing but rounding by at most 2 * lr * steps. Such a weight moves the
    # loss by its gradient times that, so to second order the losses differ by rounding only.
    for a, b in zip(one, two, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-5) and b["psnr"] == pytest.approx(a["psnr"], rel=1e-5)
    tokens = ["encode", tmp_path / "pictures", "--model", tmp_path / "one", "--shard-size", 8, "--batch-size", 4,
              "--device", "cpu"]  # fmt: skip
    fastvq(*tokens, "--out", tmp_path / "ids-one")
    _torchrun([*tokens, "--out", tmp_path / "ids-two"])
    for path in (tmp_path / "ids-one").glob("ids-*"):
        assert path.read_bytes() == (tmp_path / "ids-two" / path.name).read_bytes()
    assert (tmp_path / "ids-one" / "manifest.json").read_text() == (tmp_path / "ids-two" / "manifest.json").read_text()


def _torchrun(arguments):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "fastvq.cli"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    done = subprocess.run(
        [*command, *map(str, arguments)], env=environment, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr[-3000:]
