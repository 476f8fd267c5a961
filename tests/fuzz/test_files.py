"""Damaged files before the command: one line of error and exit status 2, or what a whole file gives.

The short mode is part of the test suite. The long mode: pytest tests/fuzz/test_files.py --fuzz=20000 [--fuzz-seed=S].
"""

import collections
import contextlib
import io
import json
import os
import random
import resource
import shutil
import signal
import tarfile
import traceback
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
from PIL import Image

from fastvq.cli import app, shared
from tests.fuzz.damage import damaged

SHORT = 60  # files of the short mode, whatever --fuzz says
SECONDS, MEMORY = 120, 4 << 30  # of one command
LINE = 1000  # characters of an error
SIZE = ["--size", "8", "--channels", "1", "--device", "cpu"]
MODEL = ["--levels", "1", "--hidden", "4", "--codes", "4", "--code-dim", "2", "--blocks", "1", "--batch-size", "2",
         "--save-every", "1", "--log-every", "1", "--ema", "0.9", *SIZE]  # fmt: skip
PRIOR = ["--channels", "4", "--layers", "1", "--batch-size", "2", "--save-every", "1", "--device", "cpu"]
TRAIN = ["train", "vqvae", "--data", "pictures", "--out", "vqvae", *MODEL]
TRAIN_PRIOR = ["train", "prior", "--model", "vqvae", "--out", "prior", *PRIOR]
ENCODE = ["encode", "pictures", "--model", "vqvae", "--out", "ids", "--shard-size", "3", "--device", "cpu"]
COMMAND = typer.main.get_command(app)
JSON, TENSORS = "*.json", "*.safetensors"
# (files that it reads, command, folder that it may write to, share of the examples)
COMMANDS = [
    ([f"vqvae/{JSON}", f"vqvae/{TENSORS}"], ["info", "vqvae"], None, 8),
    ([f"prior/level0/{JSON}", f"prior/level0/{TENSORS}"], ["info", "prior/level0"], None, 5),
    ([f"ids/{JSON}", f"ids/{TENSORS}"], ["info", "ids"], None, 4),
    (["ids/manifest.json", f"ids/{TENSORS}"], ["decode", "ids", "--model", "vqvae", "--out", "decoded"], "decoded", 6),
    ([f"ids/{JSON}", f"ids/{TENSORS}", "ids/*.jsonl"], ENCODE, "ids", 4),
    ([f"vqvae/{JSON}", "vqvae/model.safetensors"], ENCODE, "ids", 2),
    (["set.tar"], ["encode", "set.tar", "--model", "vqvae", "--out", "other", "--device", "cpu"], "other", 2),
    ([f"vqvae/{JSON}", f"vqvae/{TENSORS}", "vqvae/*.jsonl"], [*TRAIN, "--steps", "2", "--resume"], "vqvae", 5),
    ([f"prior/{JSON}"], [*TRAIN_PRIOR, "--steps", "1", "--resume"], "prior", 1),
    ([f"vqvae/{JSON}", "vqvae/model.safetensors"], [*TRAIN_PRIOR, "--steps", "1", "--resume"], "prior", 2),
    ([f"prior/level0/{JSON}", f"prior/level0/{TENSORS}"], [*TRAIN_PRIOR, "--steps", "1", "--resume"], "prior", 3),
    (
        [f"prior/{JSON}", "prior/level0/config.json", "prior/level0/model.safetensors"],
        ["sample", "--model", "vqvae", "--prior", "prior", "--out", "drawn/a.png", "--n", "1"], "drawn", 3,
    ),
]  # fmt: skip


class Slow(Exception):
    pass


def run(arguments):
    """(status, standard output, lines of error) of a command in this process; every other end is raised."""

    def late(*_):
        raise Slow(f"more than {SECONDS} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    try:
        with contextlib.redirect_stdout(io.StringIO()) as output, contextlib.redirect_stderr(io.StringIO()) as said:
            status = COMMAND.main(arguments, standalone_mode=False)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    return status or 0, output.getvalue(), said.getvalue().splitlines()


def values(path):
    """The content of a file; of JSON the values, in any layout: a digest is of these."""
    content = path.read_bytes()
    if path.suffix == ".json":
        with contextlib.suppress(ValueError, RecursionError):
            return json.loads(content)
    return content


def contents(root, folder=None, read=Path.read_bytes):
    """{path: content} below a folder, but for logs, which name times, and the curve that is drawn from one."""
    return {
        str(path.relative_to(root)): read(path)
        for path in sorted((root / (folder or ".")).rglob("*"))
        if path.is_file() and path.suffix != ".jsonl" and "tfevents" not in path.name and path.name != "loss.png"
    }


@contextlib.contextmanager
def inside(folder):
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


@contextlib.contextmanager
def limits():
    """One thread, and little memory beyond what is in use: a size from a file must not become an allocation."""
    threads, memory = torch.get_num_threads(), resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, memory[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, memory)
        torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A folder with pictures, a model, its prior, their checkpoints, id maps and an archive."""
    root = tmp_path_factory.mktemp("whole")
    rng = np.random.default_rng(0)
    (root / "pictures").mkdir()
    for i in range(11):
        Image.fromarray(rng.integers(0, 256, (8, 8), np.uint8)).save(root / "pictures" / f"{i}.png")
    (root / "pictures" / "9.png").write_bytes(b"no picture")
    with tarfile.open(root / "set.tar", "w") as tar:
        for i in range(3):
            tar.add(root / "pictures" / f"{i}.png", f"{i}.png")
    with inside(root), limits():
        for command in ([*TRAIN, "--steps", "2"], [*TRAIN_PRIOR, "--steps", "1"], ENCODE):
            assert run(command)[0] == 0
    return root


def copy(source, target):
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target)


def check(arguments, before, root, written, expected, hidden):
    """The faults of one command on a damaged folder."""
    status, output, errors = run(arguments)
    after = contents(root)
    changed = {p for p in {*before, *after} if before.get(p) != after.get(p)}
    if outside := [p for p in changed if written is None or not p.startswith(f"a/b/c/d/{written}/")]:
        yield f"wrote {outside} outside {written}"
    if left := [p for p in after if p not in before and "/." in p]:
        yield f"left {left}"
    if status == 2:
        if len(errors) != 1 or not errors[0].startswith("error: ") or len(errors[0]) > LINE:
            yield f"said {len(errors)} lines: {errors[:3]}"
    elif status == 0:
        if not hidden and (output, contents(root / "a/b/c/d", written, values)) != expected:
            yield "took a damaged file for a whole one"
    elif status != 1 or arguments[0] != "encode":
        yield f"ended with {status}: {errors[:3]}"


@pytest.mark.fuzz(weight=1)
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="measures its memory through /proc")
def test_a_damaged_file_is_one_line_of_error_or_does_no_harm(fuzz, whole, tmp_path, monkeypatch):
    monkeypatch.setattr(shared, "LINE_SECONDS", float("inf"))  # a slow machine prints no progress between
    root, counts, faults = tmp_path, collections.Counter(), collections.defaultdict(list)
    work = root / "a/b/c/d"  # a name with several .. in it still ends in a folder that is looked at
    shares = [share for *_, share in COMMANDS]
    expected = {}
    with limits():
        for number in range(max(SHORT, fuzz.count)):
            rng = random.Random(f"{fuzz.seed} {number}")
            which = rng.choices(range(len(COMMANDS)), shares)[0]
            patterns, arguments, written, _ = COMMANDS[which]
            if which not in expected:  # what the command does with whole files
                copy(whole, work)
                with inside(work):
                    status, output, errors = run(arguments)
                    assert status == 0, errors
                    expected[which] = output, contents(work, written, values)
            copy(whole, work)
            with inside(work):
                path = rng.choice(sorted(path for pattern in patterns for path in Path().glob(pattern)))
                damage = damaged(path, rng, str(root))
                if damage.content == path.read_bytes():
                    continue
                path.write_bytes(damage.content)
                before = contents(root)
                try:
                    found = list(check(arguments, before, root, written, expected[which], damage.hidden))
                except BaseException as error:
                    if isinstance(error, KeyboardInterrupt):
                        raise
                    last = traceback.extract_tb(error.__traceback__)[-1]
                    found = [f"{type(error).__name__} at {Path(last.filename).name}:{last.lineno}: {str(error)[:200]}"]
                counts[path.suffix] += 1
                case = f"{number} {path} ({damage.name}), {' '.join(arguments[:2])}"
                for fault in found:
                    faults[fault.partition(":")[0]].append(f"{case}: {fault}")
    print(f"damaged files: {sum(counts.values())} {dict(counts)}")
    shown = "\n".join(f"{len(cases)} x " + "\n  ".join(case[:LINE] for case in cases[:3]) for cases in faults.values())
    assert not faults, f"{sum(map(len, faults.values()))} faults of {sum(counts.values())} files\n{shown}"
