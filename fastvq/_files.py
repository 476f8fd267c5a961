"""Files of a run: written whole or not at all, one run a folder, leftovers of killed runs removed."""

from __future__ import annotations

import contextlib
import contextvars
import errno
import os
import socket
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from fastvq._shorten import shorten_text

__all__ = ["lock_folder", "remove_leftovers", "write_atomically"]

TEMPORARY = ".fastvq-tmp"  # ends the name of a file that is being written
LOCK = ".fastvq-lock"
NAME_PART = 40  # characters of a file's name in its temporary file's, which must not become too long
# A file system without locks says one of these.
NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}

# Folders that the running call holds already: a command locks its folder, and so does the training inside it.
_held: contextvars.ContextVar[frozenset[Path]] = contextvars.ContextVar("held", default=frozenset())
_handles: set[int] = set()

if sys.platform == "win32":
    import msvcrt

    def _lock(handle: int) -> bool:
        """Takes the exclusive lock of an open file without waiting; False: another holds it."""
        try:
            msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        return True

else:
    import fcntl

    def _lock(handle: int) -> bool:
        """Takes the exclusive lock of an open file without waiting; False: another holds it."""
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
        return True

    def _close_in_child() -> None:
        # The system frees a lock when the last copy of its handle closes. A forked child must not keep a copy.
        for handle in _handles:
            with contextlib.suppress(OSError):
                os.close(handle)
        _handles.clear()

    os.register_at_fork(after_in_child=_close_in_child)


def write_atomically(path: Path | str, data: bytes | Sequence[bytes | memoryview]) -> None:
    """Writes a file so that a reader finds the whole old one or the whole new one, after a crash too.

    Args:
        data: the content, in one piece or in several.

    Raises:
        OSError: it could not be written (a full disk, say); a file that was there stays as it was.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = _temporary(path)
    try:
        with os.fdopen(handle, "wb") as file:
            for piece in [data] if isinstance(data, bytes) else data:
                file.write(piece)
            file.flush()
            os.fsync(file.fileno())
            # mkstemp makes files that only their owner may read.
            umask = os.umask(0)
            os.umask(umask)
            os.chmod(name, 0o666 & ~umask)
            if sys.platform != "win32":  # there, an open file cannot be renamed
                os.replace(name, path)  # before the file closes: until then its lock says that it is in use
        if sys.platform == "win32":
            os.replace(name, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            os.unlink(name)
        if isinstance(error, OSError) and error.filename is None:
            error.filename = str(path)  # the error of a full disk names no file
        raise
    with contextlib.suppress(OSError):  # a file system that has no fsync of folders
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _temporary(path: Path) -> tuple[int, str]:
    """(handle, name) of a new temporary file, locked while it is written: ``remove_leftovers`` leaves it alone."""
    while True:
        handle, name = tempfile.mkstemp(prefix=f".{path.name[:NAME_PART]}.", suffix=TEMPORARY, dir=path.parent)
        # Between its creation and its lock the file looks like a leftover and may be removed: then make another.
        if sys.platform == "win32" or (_lock(handle) and os.fstat(handle).st_nlink):
            return handle, name
        os.close(handle)


def remove_leftovers(folder: Path | str) -> None:
    """Removes the temporary files that killed writes left in ``folder``; those of living processes stay."""
    with contextlib.suppress(FileNotFoundError), os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith(".") and entry.name.endswith(TEMPORARY) and entry.is_file(follow_symlinks=False):
                with contextlib.suppress(OSError):
                    handle = os.open(entry.path, os.O_RDWR)
                    try:
                        if sys.platform == "win32" or _lock(handle):
                            os.unlink(entry.path)
                    finally:
                        os.close(handle)


@contextlib.contextmanager
def lock_folder(op: str, folder: Path | str) -> Iterator[None]:
    """Holds ``folder`` for one run at a time, and first removes what a killed run left half written there.

    The folder is made where there is none. The lock belongs to the process: it ends with it, however it ends. A nested
    call for a folder that the caller holds already does nothing. Where a file system has no locks there is no
    protection.

    Raises:
        ValueError: another run holds the folder; the message names its process.
        OSError: the folder cannot be made or written to.
    """
    folder = Path(folder)
    key = folder.resolve()
    if key in _held.get():
        yield
        return
    path = folder / LOCK
    handle = _take(path)
    if handle is None:
        holder = ""
        with contextlib.suppress(OSError, UnicodeDecodeError):
            holder = f" ({shorten_text(path.read_text())})"
        raise ValueError(f"{op}: another run{holder} is writing to {folder}; wait for its end, or take another folder")
    _handles.add(handle)
    token = _held.set(_held.get() | {key})
    try:
        os.truncate(handle, 0)
        os.write(handle, f"process {os.getpid()} on {socket.gethostname()}".encode())
        remove_leftovers(folder)
        yield
    finally:
        _held.reset(token)
        with contextlib.suppress(OSError):
            os.unlink(path)  # while it is locked: who takes it later finds that it is no longer the folder's
        _handles.discard(handle)
        os.close(handle)


def _take(path: Path) -> int | None:
    """The handle of the locked file, None where another process or call holds it."""
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except FileNotFoundError:  # a run that wrote nothing has just removed the folder
            continue
        if not _lock(handle):
            os.close(handle)
            return None
        # The holder before may have removed the file between opening and locking.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(handle), os.stat(path)):
                return handle
        os.close(handle)
