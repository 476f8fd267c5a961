"""Groups the members of a WebDataset archive into samples, each with a picture and a label.

A member's name is a key and a field: ``faces/x.seg.png`` is field ``seg.png`` of key ``faces/x``. The key ends at the
first period of the file's name, as in WebDataset. With ``field="*.jpg"`` (or ``"*"`` for any picture) the key ends at
the last period, for names that contain periods.

Consecutive members with the same key are one sample. Its picture is the chosen ``field``. If no field is chosen, it is
the only field that is a picture; several are an error. Its label is the field ``cls``, a whole number, or the entry
``label`` of the field ``json``.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import NamedTuple

from fastvq._shorten import shorten, shorten_text
from fastvq.data.sources import EXTENSIONS, OP, OTHER_FORMATS
from fastvq.data.tar import BROKEN, Member, TarReader

__all__ = ["MAX_MEMBER_BYTES", "Sample", "check_field", "read_samples"]

MAX_MEMBER_BYTES = 256 << 20  # a larger member is not read as a picture
MAX_LABEL_BYTES = 4 << 20
MAX_LABEL = (1 << 63) - 1
LABELS = ("cls", "json")
NAMED = 8  # fields that an error lists

Note = Callable[[str, str], None]  # (name, reason why it is not used)


class Sample(NamedTuple):
    name: str
    data: bytes | None  # the encoded picture; None: the sample has none that can be read
    label: int | None
    problem: str = ""  # why there is no picture


def check_field(field: str | None) -> None:
    """ValueError unless ``field`` can be the field of a picture."""
    if field is None or field == "*":
        return
    inner = field.removeprefix("*.")
    if f".{inner.lower().rpartition('.')[2]}" not in EXTENSIONS or ("." in inner and inner != field):
        raise ValueError(
            f"{OP}: field must be a picture's, jpg or seg.png say, or *.jpg or * where periods belong to names, "
            f"got {shorten(field)}"
        )


def read_samples(
    tar: TarReader, archive: str, field: str | None, note: Note, n_classes: int | None
) -> Iterator[Sample]:
    """Yields the samples of the archive named ``archive``. All samples have different names.

    Args:
        field: the field of the picture, see the head of this file.
        note: called for each part of a sample that is not used, for example an impossible label.

    Raises:
        ValueError: a sample has several pictures and no ``field`` was chosen.
        BrokenArchive: the archive cannot be read to its end. The samples before, and the one being read, come first.
    """
    reader = iter(tar)
    group: _Group | None = None
    seen: set[str] = set()  # keys of samples that had a picture
    early: dict[str, int] = {}  # labels that came before their picture
    broken: Exception | None = None
    while broken is None:
        try:
            member = next(reader, None)
            if member is None:
                break
            key, own = _split(member.name, field is not None and field.startswith("*"))
            if group is None or key != group.key:
                if group is not None:
                    yield from group.finish(seen, early)
                group = _Group(archive, key, field, note, n_classes)
            group.add(own, member, tar)
        except BROKEN as error:
            broken = error
    if group is not None:
        yield from group.finish(seen, early)
    for key in early:
        note(f"{archive}/{key}", "a label without a picture")
    if broken is not None:
        raise broken


class _Group:
    """Consecutive members with the same key."""

    def __init__(self, archive: str, key: str, field: str | None, note: Note, n_classes: int | None) -> None:
        self.key, self.name, self.field, self.note, self.n_classes = key, f"{archive}/{key}", field, note, n_classes
        self.pictures: list[str] = []  # fields that are pictures
        self.chosen: str | None = None
        self.data: bytes | None = None
        self.problem = ""
        self.others: list[str] = []  # fields of pictures in a format that is not read
        self.labels: dict[str, int] = {}

    def add(self, field: str, member: Member, tar: TarReader) -> None:
        kind = field.rpartition(".")[2].lower()
        if f".{kind}" in EXTENSIONS:
            self._add_picture(field, member, tar)
        elif kind in LABELS:
            self._add_label(field, kind, member, tar)
        elif f".{kind}" in OTHER_FORMATS:
            self.others.append(field)

    def finish(self, seen: set[str], early: dict[str, int]) -> Iterator[Sample]:
        """Yields the sample, if the members have a picture."""
        if len(self.pictures) > 1 and self.field is None:
            names = shorten_text(", ".join(self.pictures[:NAMED]) + (", ..." if len(self.pictures) > NAMED else ""))
            kind = self.pictures[0].rpartition(".")[2]
            raise ValueError(
                f"{OP}: {shorten_text(self.name)} holds several pictures ({names}); choose one with --field "
                f"{shorten_text(self.pictures[0])}, or "
                f"with --field '*.{kind}' where periods belong to the names of pictures"
            )
        label = self._label()
        if not self.pictures and not self.others:
            if label is not None and self.key in seen:
                self.note(f"{self.name} (label)", "the label lies apart from its picture and after it; it is not used")
            elif label is not None:
                early[self.key] = label
            return
        if self.key in seen:
            self.note(f"{self.name} (again)", "the archive holds this name before; only the first picture is used")
            return
        seen.add(self.key)
        before = early.pop(self.key, None)
        label = before if label is None else label
        if self.chosen is None and not self.problem:
            missing = "no picture in a format that is read" if self.field is None else f"no field {self.field}"
            self.problem = f"{missing}, but {', '.join((self.pictures + self.others)[:NAMED])}"
        yield Sample(self.name, self.data, label, self.problem)

    def _add_picture(self, field: str, member: Member, tar: TarReader) -> None:
        if field in self.pictures:
            self.note(f"{self.name}.{field} (again)", "the archive holds this name before; only the first is used")
            return
        self.pictures.append(field)
        if self.chosen is not None or not self._is_chosen(field):
            if self.field is not None and self.field.startswith("*") and self._is_chosen(field):
                self.note(f"{self.name}.{field}", f"a second picture of one name; {self.chosen} is used")
            return
        self.chosen = field
        if member.problem is not None:
            self.problem = member.problem
        elif member.size > MAX_MEMBER_BYTES:
            self.problem = f"huge: a member of more than {MAX_MEMBER_BYTES} bytes"
        else:
            try:
                self.data = tar.read()
            except BROKEN:
                self.problem = "the archive breaks off inside it"
                raise

    def _is_chosen(self, field: str) -> bool:
        if self.field is None or self.field == "*":
            return True
        return field.lower() == self.field.removeprefix("*.").lower()

    def _add_label(self, field: str, kind: str, member: Member, tar: TarReader) -> None:
        name = f"{self.name}.{field}"
        if member.problem is not None or member.size > MAX_LABEL_BYTES:
            self.note(name, member.problem or f"no label: {member.size} bytes, more than {MAX_LABEL_BYTES}")
            return
        data = tar.read()
        try:
            label = _read_label(data, kind, self.n_classes)
        except ValueError as error:
            self.note(name, f"no label: {error}; its picture has none")
            return
        if label is not None:
            self.labels.setdefault(field.lower(), label)

    def _label(self) -> int | None:
        """The label of the field ``cls`` or ``json``, or of one named like the picture's (``seg.cls``)."""
        inner = (self.chosen or "").lower().rpartition(".")[0]
        fields = [*LABELS, *(f"{inner}.{kind}" for kind in LABELS if inner)]
        found = {field: self.labels[field] for field in fields if field in self.labels}
        if len(set(found.values())) > 1:
            said = ", ".join(f"{field} says {label}" for field, label in found.items())
            self.note(f"{self.name} (label)", f"labels that differ: {said}; the first is used")
        return next(iter(found.values()), None)


def _split(path: str, periods: bool) -> tuple[str, str]:
    """(key, field) of a member's name; periods at the start of a file's name belong to the key."""
    while path.startswith("./"):
        path = path[2:]
    folder, slash, base = path.rpartition("/")
    front = len(base) - len(base.lstrip("."))
    at = base.rfind(".", front) if periods else base.find(".", front)
    at = len(base) if at < 0 else at
    return folder + slash + base[:at], base[at + 1 :]


def _read_label(data: bytes, kind: str, n_classes: int | None) -> int | None:
    """The label, or None where the member has none. ValueError, with the reason, for an invalid label."""
    try:
        text = data.decode()
        value: object
        if kind == "cls":
            value = int(text) if len(text) < 100 else text
        else:
            entries = json.loads(text)
            value = entries.get("label") if isinstance(entries, dict) else None
    except (ValueError, RecursionError) as error:
        reason = "metadata that is no JSON" if kind == "json" else f"a label that is no whole number: {shorten(data)}"
        raise ValueError(reason) from error
    if value is None:
        return None
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(f"a label that is no whole number: {shorten(value)}")
    if not 0 <= value <= MAX_LABEL or (n_classes is not None and value >= n_classes):
        raise ValueError(f"an impossible label, {shorten(value)}")
    return value
