"""Makes the pages of the site that have their source elsewhere: ``python docs/make_pages.py`` writes docs/generated.

``commands.md``: every command of ``fastvq`` with its options, from the command itself.
``measurements.md`` and its plots: every file of benchmarks/results, by ``measurements.py``.
``history.md``: the first case of each of those files over time, by ``history.py``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import history
import measurements
import typer.main

import fastvq.cli


def commands() -> str:
    lines: list[str] = []
    for name, command in _leaves(typer.main.get_command(fastvq.cli.app), "fastvq"):
        arguments = [p for p in command.params if not p.opts[0].startswith("-")]
        options = [p for p in command.params if p.opts[0].startswith("-")]
        usage = " ".join(p.name.upper() if p.required else f"[{p.name.upper()}]" for p in arguments)
        lines += [f"## {name}", "", f"```\n{f'{name} {usage}'.strip()} [OPTIONS]\n```", ""]
        lines += [_as_code(" ".join((command.help or "").split())), ""]
        lines += _table("argument", [(f"`{p.name.upper()}`", p) for p in arguments])
        lines += _table("option", [("`" + " / ".join([*p.opts, *p.secondary_opts]) + "`", p) for p in options])
    return "\n".join(lines)


def _leaves(command: Any, name: str) -> Iterator[tuple[str, Any]]:
    """Every command that is no group, with its whole name."""
    if not hasattr(command, "commands"):
        yield name, command
        return
    for sub, one in command.commands.items():
        yield from _leaves(one, f"{name} {sub}")


def _as_code(text: str) -> str:
    """Options in backticks: two hyphens would become a dash."""
    return re.sub(r"(?<![`\w-])(--[a-z][a-z-]*)", r"`\1`", text)


def _table(title: str, parameters: list[tuple[str, Any]]) -> list[str]:
    if not parameters:
        return []
    lines = [f"| {title} | meaning | default |", "|---|---|---|"]
    for shown, p in parameters:
        default = "required" if p.required else "" if p.default in (None, False) else f"`{p.default}`"
        lines.append(f"| {shown} | {_as_code(p.help or '')} | {default} |".replace("*.", r"\*."))
    return [*lines, ""]


def write(folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "commands.md").write_text(commands())
    measurements.write(folder)
    history.write(folder)


if __name__ == "__main__":
    write(Path(__file__).resolve().parent / "generated")
