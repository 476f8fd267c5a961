"""A short training, killed at every write and resumed: python -m tests.support.models.kill_points FOLDER.

Prints one JSON line: the number of writes, and the faults found. Each run is a fork of this process. The parent imports
everything once and never computes, so a kill point costs a fraction of a second.
"""

import contextlib
import json
import os
import signal
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from fastvq import _files
from fastvq.cli import app
from fastvq.training import log

with contextlib.suppress(ImportError):
    import torch.utils.tensorboard

WHEN = ("before", "during", "after")
FILES = ("model.safetensors", "state.safetensors", "config.json", "data.json", "reconstructions.png", "usage.png")


class Killer:
    """Kills the process before, during or after (``when``) the ``at``-th write, and counts the writes."""

    def __init__(self, at, when):
        self.at, self.when, self.n = at, when, 0
        self.make, self.fsync, self.replace, self.line = _files._temporary, os.fsync, os.replace, log.write_line
        _files._temporary, os.fsync, os.replace, log.write_line = self.begin, self.sync, self.commit, self.append

    def is_at(self, when):
        return self.n == self.at and self.when == when

    def die(self):
        os.kill(os.getpid(), signal.SIGKILL)

    def begin(self, path):
        self.n += 1
        if self.is_at("before"):
            self.die()
        return self.make(path)

    def sync(self, handle):
        if self.is_at("during"):
            os.ftruncate(handle, os.fstat(handle).st_size // 2)
            self.die()
        self.fsync(handle)

    def commit(self, *names):
        self.replace(*names)
        if self.is_at("after"):
            self.die()

    def append(self, path, line):
        self.n += 1
        if self.is_at("before"):
            self.die()
        if self.is_at("during"):
            with path.open("a") as file:
                file.write(json.dumps(line)[:9])
            self.die()
        self.line(path, line)
        if self.is_at("after"):
            self.die()


def run(root, folder, *, resume=False, at=0, when="after"):
    """(exit code of a forked run, number of its writes)."""
    arguments = ["train", "vqvae", "--data", root / "pictures", "--out", folder, "--levels", 1, "--size", 8,
                 "--channels", 1, "--hidden", 4, "--codes", 4, "--code-dim", 2, "--blocks", 1, "--batch-size", 2,
                 "--steps", 4, "--save-every", 2, "--log-every", 2, "--ema", 0.9, "--device", "cpu"]  # fmt: skip
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        with contextlib.suppress(BaseException):
            killer = Killer(at, when)
            status = app([*map(str, arguments), *["--resume"][: int(resume)]], standalone_mode=False) or 0
            os.write(writing, str(killer.n).encode())
        os._exit(status)
    os.close(writing)
    written = os.read(reading, 99).decode()
    os.close(reading)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), int(written or 0)


def main(root):
    torch.set_num_threads(1)
    rng = np.random.default_rng(0)
    (root / "pictures").mkdir()
    for i in range(12):
        Image.fromarray(rng.integers(0, 256, (8, 8), np.uint8)).save(root / "pictures" / f"{i}.png")
    status, writes = run(root, root / "whole")
    faults = [f"the whole run ended with {status}"] if status else []
    whole = [(root / "whole" / name).read_bytes() for name in FILES]
    for at in range(1, writes + 1):
        for when in WHEN:
            folder = root / f"{at}-{when}"
            killed, resumed = run(root, folder, at=at, when=when)[0], run(root, folder, resume=True)[0]
            fault = f"write {at}, {when}: "
            if (killed, resumed) != (-signal.SIGKILL, 0):
                faults.append(fault + f"killed {killed}, resumed {resumed}")
                continue
            differing = [n for n, content in zip(FILES, whole, strict=True) if (folder / n).read_bytes() != content]
            hidden = [p.name for p in folder.iterdir() if p.name.startswith(".")]
            steps = [json.loads(line)["step"] for line in (folder / "log.jsonl").read_text().splitlines()]
            if differing or hidden or steps != [2, 4]:
                faults.append(fault + f"{differing} differ, {hidden} left, log of steps {steps}")
    print(json.dumps({"writes": writes, "points": writes * len(WHEN), "faults": faults}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
