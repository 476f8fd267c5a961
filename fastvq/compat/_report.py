"""What ``fastvq.patch`` returns: the quantizers of a model in three groups, and its text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeVar

__all__ = ["PatchReport", "Patched", "Skipped"]


@dataclass(frozen=True)
class Patched:
    """One module that runs on fastvq's kernels; ``limits``: where it still runs its own code, and why."""

    name: str
    cls: str
    limits: tuple[str, ...] = ()


@dataclass(frozen=True)
class Skipped:
    """One quantizer that stays as it was, and why."""

    name: str
    cls: str
    reason: str


@dataclass
class PatchReport:
    """What ``patch`` did. True if anything runs on fastvq now; ``print`` shows it.

    Attributes:
        replaced: the modules that are faster now.
        left: quantizers that fastvq knows and left as they are, each with the reason.
        others: quantizers that fastvq does not know, or that search no codebook (FSQ, LFQ), each with the reason.
        notes: what to know of the installed versions.
    """

    replaced: list[Patched] = field(default_factory=list)
    left: list[Skipped] = field(default_factory=list)
    others: list[Skipped] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.replaced)

    def __str__(self) -> str:
        faster, left = _outermost(self.replaced), _outermost(self.left)
        lines = [f"fastvq: {len(faster)} faster, {len(left)} left as is, {len(self.others)} not of ours"]
        lines += ["faster:"] if faster else []
        for done, inside in faster:
            lines.append(f"  {_place(done)}: {_short(done.cls)}{_count(inside)}")
            lines += [f"    its own code {limit}" for limit in _limits([done, *inside])]
        lines += ["left as they are:"] if left else []
        for one, same in left:
            lines.append(f"  {_place(one)}: {_short(one.cls)}{_count(same)}: {one.reason}")
        lines += ["not a quantizer of ours:"] if self.others else []
        lines += [f"  {_place(one)}: {_short(one.cls)}: {one.reason}" for one in self.others]
        lines += [f"note: {note}" for note in self.notes]
        return "\n".join(lines)


Module = TypeVar("Module", Patched, Skipped)


def _outermost(found: Sequence[Module]) -> list[tuple[Module, list[Module]]]:
    """Each module that lies in no other of the list, and those inside it that have nothing different to tell."""
    groups: list[tuple[Module, list[Module]]] = []
    for one in found:
        for first, inside in groups:
            same = getattr(one, "reason", "") == getattr(first, "reason", "")
            if same and (not first.name or one.name.startswith(f"{first.name}.")):
                inside.append(one)
                break
        else:
            groups.append((one, []))
    return groups


def _limits(modules: Sequence[Patched]) -> list[str]:
    return list(dict.fromkeys(limit for one in modules for limit in one.limits))


def _place(one: Patched | Skipped) -> str:
    return one.name or "(the module itself)"


def _short(cls: str) -> str:
    """Package and class: the file between them tells a user nothing."""
    package, _, name = cls.partition(".")
    return f"{package}.{name.rpartition('.')[2]}" if name else package


def _count(inside: Sequence[object]) -> str:
    return f" and {len(inside)} {'module' if len(inside) == 1 else 'modules'} inside it" if inside else ""
