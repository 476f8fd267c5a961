"""Pictures that a training leaves, its lines of progress where there is no terminal, and what ``info`` says."""

import json

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from fastvq.cli import app, run_pictures, shared
from fastvq.models import VQVAE, VQVAE2

SMALL = ["--size", "16", "--channels", "1", "--hidden", "8", "--codes", "16", "--code-dim", "4", "--blocks", "1",
         "--batch-size", "8", "--device", "cpu", "--log-every", "1"]  # fmt: skip
PICTURES = {"reconstructions.png", "ids.png", "loss.png", "usage.png", "codebook.png"}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """(folder, what the trainings said) of a two-level model of noise and its priors, with a line at every step."""
    root = tmp_path_factory.mktemp("runs")
    generator = torch.Generator().manual_seed(0)
    for i in range(20):
        pixels = torch.randint(0, 256, (16, 16), generator=generator, dtype=torch.uint8)
        (root / "pictures").mkdir(exist_ok=True)
        Image.fromarray(pixels.numpy()).save(root / "pictures" / f"{i:02d}.png")
    data, said = ["--data", root / "pictures"], []
    calls = (
        ["vqvae", *data, "--out", root / "vqvae", "--levels", 2, "--downsample", 2, "--steps", 3, *SMALL],
        ["prior", "--model", root / "vqvae", "--out", root / "prior", "--steps", 3, "--batch-size", 8, "--channels", 4,
         "--layers", 1, "--log-every", 1],
    )  # fmt: skip
    before, shared.LINE_SECONDS = shared.LINE_SECONDS, 0.0
    try:
        for call in calls:
            done = CliRunner().invoke(app, ["train", *map(str, call)], catch_exceptions=False)
            assert done.exit_code == 0, done.output
            said.append(done.output)
    finally:
        shared.LINE_SECONDS = before
    return root, said


def test_a_training_leaves_pictures_and_says_where(runs):
    root, said = runs
    assert {path.name for path in (root / "vqvae").glob("*.png")} == PICTURES
    assert all(str(root / "vqvae" / name) in said[0].replace("\n", "") for name in PICTURES)
    assert {path.name for path in (root / "prior").rglob("*.png")} == {"samples.png", "loss.png"}
    assert str(root / "prior" / "samples.png") in said[1].replace("\n", "")


def test_progress_without_a_terminal_is_a_line_at_a_time(runs):
    _, said = runs
    assert "vqvae: 2 of 3" in said[0] and "psnr" in said[0] and "s left" in said[0]
    assert "prior 1: 3 of 3" in said[1] and "bits an id" in said[1]


def test_info_of_priors_and_of_the_machine(runs, monkeypatch):
    root, _ = runs
    monkeypatch.setenv("FASTVQ_CPU_ISA", "generic")
    described = json.loads(CliRunner().invoke(app, ["info", str(root / "prior")]).stdout)
    assert [level["class"] for level in described["levels"]] == ["Prior", "Prior"]
    machine = json.loads(CliRunner().invoke(app, ["info"]).stdout)["machine"]
    assert machine["environment"]["FASTVQ_CPU_ISA"] == "generic" and machine["processor"] and machine["python"]
    assert "numpy" in machine["packages"]


def test_losses_of_a_log_with_half_a_line(tmp_path):
    log = tmp_path / "log.jsonl"
    log.write_text('{"step": 1, "loss": 0.5}\n{"step": 2, "loss": NaN}\n{"step": 3, "lo')
    assert run_pictures.read_losses(log) == [(1, 0.5)]
    assert run_pictures.read_losses(tmp_path / "absent") == []
    for losses in ([], [(1, 0.5)], [(1, 0.5), (2, 0.25)], [(1, -1.0), (2, 1.0)], [(1, 2.0), (9, 2.0)]):
        assert run_pictures.loss_curve(losses, "loss").size == (640, 240)


def test_lines_of_a_damaged_log_are_left_out(tmp_path):
    log = tmp_path / "log.jsonl"
    bad = ['{"step": 1e999, "loss": 1}', '{"step": 1, "loss": 1' + "0" * 400 + "}", '{"step": -1, "loss": 1}',
           "[]", "3", '{"step": 1' + "0" * 30 + ', "loss": 1}', '{"step": 1, "loss": -1e308}', "[" * 9999]  # fmt: skip
    log.write_text("\n".join(['{"step": 9, "loss": 2.0}', *bad, '{"step": 2, "loss": 4.0}']))
    assert run_pictures.read_losses(log) == [(2, 4.0), (9, 2.0)]


def test_a_swatch_is_what_a_code_decodes_to():
    torch.manual_seed(0)
    model = VQVAE(3, 8, 6, 4).eval()
    page = run_pictures.codebook_picture(model, [torch.tensor([0, 5, 1, 9, 2, 3])])
    ids = torch.full((1, 4, 4), 3)  # the most used one comes first
    with torch.no_grad():
        pixel = model.decode_maps([ids])[0, :, 8, 8]
    top = page.height - 2 * (run_pictures.SWATCH + run_pictures.GAP) - run_pictures.GAP
    assert page.getpixel((run_pictures.GAP, top + run_pictures.GAP)) == tuple(
        ((pixel.clamp(-1, 1) + 1) * 127.5).round().int().tolist()
    )
    two = VQVAE2(1, 8, 6, 4)
    assert run_pictures.codebook_picture(two, [torch.arange(6), torch.arange(6)]).mode == "RGB"


def test_id_pictures_have_a_row_a_level():
    images, maps = torch.zeros(2, 1, 16, 16), [torch.zeros(2, 2, 2).long(), torch.ones(2, 4, 4, 3).long()]
    page = run_pictures.id_pictures(images, maps, [4, 4])
    assert page.height > 3 * run_pictures.ID_CELL
    assert len(set(map(tuple, run_pictures.colours(512).tolist()))) == 512
