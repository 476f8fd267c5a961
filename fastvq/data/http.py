"""Archives from a web server, read as a stream: every wait has a time limit, and a broken connection is reopened."""

from __future__ import annotations

import contextlib
import io
import queue
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from http.client import HTTPException
from typing import Any

from fastvq._shorten import shorten_text

__all__ = ["HttpFile"]

TIMEOUT_S = 30.0  # limit on waiting for a connection, for an answer, or for the next bytes
MIN_BYTES_PER_S = 1024  # a server slower than this over TIMEOUT_S of waiting counts as one that does not answer
RETRIES, PAUSE_S = 3, 0.5  # further tries after a failure; pause before the first, which doubles each time
PROGRESS_BYTES = 1 << 20  # after this many bytes the tries are counted from zero again
TRY_AGAIN = (408, 429)  # HTTP statuses that may be different later, as 5xx may


class _FinalError(OSError):
    """An error that another try cannot mend."""


class HttpFile(io.RawIOBase):
    """The body of an http(s) address, read from start to end.

    A broken connection is reopened at the byte where it broke, by a Range request. If the server does not support
    ranges, the bytes before are read again.

    Raises:
        OSError, http.client.HTTPException, while reading: the server refuses, or every try ended in a timeout or a
            broken answer.
    """

    def __init__(self, address: str) -> None:
        super().__init__()
        # Quote spaces and non-ASCII letters, which http.client refuses. Parts that are quoted already stay.
        self._address = urllib.parse.quote(address, safe="".join(map(chr, range(33, 127))))
        self._response: Any = None
        self._at = 0
        self._length: int | None = None
        self._tag: str | None = None  # the ETag, which names the file's version
        self._waited_s, self._came = 0.0, 0  # seconds waited and bytes received since the last check of the speed
        self._failures, self._good_at = 0, 0  # failed tries, and the byte at which their count began

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while True:
            try:
                if self._response is None:
                    self._open()
                return self._receive(memoryview(buffer))
            except (OSError, HTTPException) as error:
                self._drop()
                if self._at - self._good_at >= PROGRESS_BYTES:
                    self._failures, self._good_at = 0, self._at
                if self._failures == RETRIES or isinstance(error, _FinalError) or _is_refusal(error):
                    raise
                time.sleep(PAUSE_S * 2**self._failures)
                self._failures += 1

    def close(self) -> None:
        self._drop()
        super().close()

    def _receive(self, view: memoryview) -> int:
        if self._length is not None:
            view = view[: self._length - self._at]
        if not len(view):
            return 0
        began = time.monotonic()
        data = self._response.read1(len(view))
        self._waited_s += time.monotonic() - began
        self._came += len(data)
        if not data and self._length is not None:
            raise ConnectionError(f"the connection ended at byte {self._at} of {self._length}")
        if self._waited_s > TIMEOUT_S:
            if self._came < MIN_BYTES_PER_S * self._waited_s:
                raise TimeoutError(f"{self._came} bytes came in {self._waited_s:.0f} s")
            self._waited_s, self._came = 0.0, 0
        view[: len(data)] = data
        self._at += len(data)
        return len(data)

    def _open(self) -> None:
        self._waited_s, self._came = 0.0, 0
        headers = {"Range": f"bytes={self._at}-"} if self._at else {}
        try:
            request = urllib.request.Request(self._address, headers=headers)
            response = _within(TIMEOUT_S, lambda: urllib.request.urlopen(request, timeout=TIMEOUT_S))
        except ValueError as error:  # not a valid address
            raise _FinalError(f"{shorten_text(self._address)} cannot be opened: {shorten_text(error)}") from None
        self._response = response
        length, tag, at = response.length, response.headers.get("ETag"), 0
        if response.status == 206 and self._at:
            at = self._at
            if not response.headers.get("Content-Range", "").startswith(f"bytes {at}-"):
                raise _FinalError("the server answers with another range than the one it was asked for")
        whole = None if length is None else at + length
        if self._at and (whole, tag) != (self._length, self._tag):
            raise _FinalError("the file on the server changed while it was read")
        self._length, self._tag = whole, tag
        while at < self._at:
            data = response.read1(min(self._at - at, 1 << 20))
            if not data:
                raise ConnectionError(f"the connection ended at byte {at}")
            at += len(data)

    def _drop(self) -> None:
        if self._response is not None:
            with contextlib.suppress(OSError, HTTPException):
                self._response.close()
            self._response = None


def _is_refusal(error: Exception) -> bool:
    return isinstance(error, urllib.error.HTTPError) and error.code < 500 and error.code not in TRY_AGAIN


def _within(seconds: float, work: Callable[[], Any]) -> Any:
    """Runs ``work`` with a time limit. A socket's timeout is per byte, and a header may come byte by byte."""
    done: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()

    def run() -> None:
        try:
            done.put((work(), None))
        except BaseException as error:
            done.put((None, error))

    threading.Thread(target=run, daemon=True).start()
    try:
        result, error = done.get(timeout=seconds)
    except queue.Empty:
        raise TimeoutError(f"no answer within {seconds:g} s") from None
    if error is not None:
        raise error
    return result
