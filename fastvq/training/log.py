"""Logs: one JSON object a line, and TensorBoard events where TensorBoard is installed."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from fastvq._files import write_atomically

__all__ = ["Log", "write_line"]


def write_line(path: Path, line: dict[str, Any]) -> None:
    """Appends a line to a JSON-lines file in one write, so that several processes can share the file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab+") as file:
        whole = True
        if file.tell():
            file.seek(-1, os.SEEK_END)
            whole = file.read(1) == b"\n"
        # A killed run may have left part of a line. Start a new line, so that this one can be read.
        file.write((b"" if whole else b"\n") + json.dumps(line).encode() + b"\n")


class Log:
    """``folder/log.jsonl``. A resumed run drops the lines of the steps after its checkpoint, which it repeats."""

    def __init__(self, folder: Path, resumed_step: int) -> None:
        self.path = folder / "log.jsonl"
        kept = [line for line in self._lines() if line.get("step", 0) <= resumed_step] if resumed_step else []
        write_atomically(self.path, "".join(json.dumps(line) + "\n" for line in kept).encode())
        self.board: Any = None
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:  # TensorBoard or a package that it needs is not installed
            return
        self.board = SummaryWriter(str(folder), purge_step=resumed_step + 1)

    def write(self, line: dict[str, Any]) -> None:
        write_line(self.path, line)
        if self.board is not None:
            for name, value in line.items():
                if isinstance(value, (int, float)) and name != "step":
                    self.board.add_scalar(name, value, line["step"])

    def close(self) -> None:
        if self.board is not None:
            self.board.close()

    def _lines(self) -> list[dict[str, Any]]:
        lines = []
        for text in self.path.read_text(errors="replace").splitlines() if self.path.is_file() else []:
            try:
                line = json.loads(text)
            except (ValueError, RecursionError):  # the line that a killed run was writing
                continue
            if isinstance(line, dict) and isinstance(line.get("step", 0), int):
                lines.append(line)
        return lines
