"""Every example runs in its short form and prints what its first lines promise; the notebooks' cells run in order."""

import importlib.util
import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
MAX_LINES = 100
NEEDS = {
    "patch_your_model": ["vector_quantize_pytorch"],
    "train_vqvae": ["mlxtend", "PIL"],
    "train_with_accelerate": ["accelerate", "mlxtend"],
    "ddp_training": ["mlxtend"],
}
# What stands in each line that an example prints, in order.
PRINTS = {
    "patch_your_model": [r"vector_quantize_pytorch", r"indices equal: (100\.00|99\.\d\d)%; one call: .* ms before"],
    "train_vqvae": [r"step 20: loss \d", r"held-out digits: \d.* dB", r"codes in use: \d+ of 128", r"wrote "],
    "train_with_accelerate": [r"micro-batch 16: loss \d", r"processes: 1; codes in one batch: \d+ of 128"],
    "ddp_training": [r"step 6: loss \d", r"2 processes; the same codebook to the bit: True"],
    "serve": [*[rf"{n} vectors: same indices: True; microseconds: plain" for n in (1, 16, 256)]],
    "audio_rvq": [r"frames become ids \[1000, 6\]", r"1 levels: 1.0 kbit/s", r"6 levels: 6.0 kbit/s"],
    "kmeans_out_of_core": [r"file: 2 MiB", r"codebook \[256, 32\]", r"memory grew by", r"mean squared distance 0.3"],
}
NOTEBOOKS = sorted(EXAMPLES.glob("notebooks/*.ipynb"))
SHORT = {"steps": 3, "prior_steps": 2}  # put in the place of a notebook's parameters


@pytest.fixture(autouse=True)
def _one_thread(threads):
    threads(1)


def need(*packages):
    for package in packages:
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"needs {package}, which is not installed")


def test_every_example_is_tested():
    assert {p.stem for p in EXAMPLES.glob("*.py")} == PRINTS.keys()


@pytest.mark.parametrize("name", PRINTS)
def test_an_example_is_short_and_says_how_to_run_it(name):
    text = (EXAMPLES / f"{name}.py").read_text()
    assert len(text.splitlines()) < MAX_LINES
    assert text.startswith('"""') and f"examples/{name}.py" in text.split('"""')[1]


@pytest.mark.parametrize("name", PRINTS)
def test_example(name, tmp_path, monkeypatch, capsys):
    need(*NEEDS.get(name, []))
    path, options = EXAMPLES / f"{name}.py", ["--short"]
    monkeypatch.chdir(tmp_path)
    if name == "ddp_training":
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        done = subprocess.run([*torchrun, path, *options], capture_output=True, text=True, env=environment, timeout=300)
        assert done.returncode == 0, done.stderr
        printed = done.stdout
    else:
        monkeypatch.setattr(sys, "argv", [str(path), *options])
        runpy.run_path(str(path), run_name="__main__")
        printed = capsys.readouterr().out
    at = 0
    for pattern in PRINTS[name]:
        found = re.compile(pattern).search(printed, at)
        assert found, f"{pattern!r} is missing after character {at} of:\n{printed}"
        at = found.end()
    if name == "patch_your_model" and importlib.util.find_spec("transformers"):
        assert re.search(r"indices equal: (100\.00|99\.\d\d)%", printed.split("\ntransformers\n")[1])
    if name == "train_vqvae":
        assert (tmp_path / "out" / "train_vqvae.png").is_file()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=[p.stem for p in NOTEBOOKS])
def test_notebook(path, tmp_path, monkeypatch):
    need("matplotlib", "mlxtend")
    monkeypatch.setenv("MPLBACKEND", "agg")
    monkeypatch.chdir(tmp_path)
    cells = [c for c in json.loads(path.read_text())["cells"] if c["cell_type"] == "code"]
    assert not any(cell["outputs"] for cell in cells)  # the site makes them
    names = {}
    for i, cell in enumerate(cells):
        exec(compile("".join(cell["source"]), f"{path.name}, cell {i}", "exec"), names)
        if "parameters" in cell["metadata"].get("tags", []):
            names.update({name: value for name, value in SHORT.items() if name in names})
    import matplotlib.pyplot as plt

    plt.close("all")
    assert torch.is_tensor(names["ids"])
