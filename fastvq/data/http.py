"""Archives from a web server, read as a stream: every wait has an end, and a broken connection is opened again."""

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

__all__ = ["HttpFile"]

TIMEOUT_S = 30.0  # to wait for a connection, for an answer, or for the next bytes
MIN_BYTES_PER_S = 1024  # a slower server counts as one that does not answer
RETRIES, PAUSE_S = 3, 0.5  # further tries after a failure, and the pause before the first; it doubles
PROGRESS_BYTES = 1 << 20  # a connection that brought so much gives back the tries
TRY_AGAIN = (408, 429)  # with 5xx, the answers of a server that may be another one later


class _FinalError(OSError):
    """An error that another try would meet again."""


class HttpFile(io.RawIOBase):
    """The body of an http(s) address, from front to end.

    Where a connection breaks it is opened again at the byte where it broke, with a Range request, or by reading up to
    there where the server knows no ranges.

    Raises:
        OSError, http.client.HTTPException, while reading: the server refuses, or does not answer in time, or its
            answer is broken, each time.
    """

    def __init__(self, address: str) -> None:
        super().__init__()
        # Spaces and letters beyond ASCII, which http.client refuses; all that is quoted already stays.
        self._address = urllib.parse.quote(address, safe="".join(map(chr, range(33, 127))))
        self._response: Any = None
        self._at = 0
        self._length: int | None = None
        self._tag: str | None = None  # of the file's version
        self._waited_s, self._came = 0.0, 0  # since the pace was looked at last
        self._failures, self._good_at = 0, 0  # tries that failed since the byte where they began

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
        wanted = {"Range": f"bytes={self._at}-"} if self._at else {}
        try:
            request = urllib.request.Request(self._address, headers=wanted)
            response = _within(TIMEOUT_S, lambda: urllib.request.urlopen(request, timeout=TIMEOUT_S))
        except ValueError as error:  # an address that is none
            raise _FinalError(f"{self._address} cannot be opened: {error}") from None
        self._response = response
        length, tag, place = response.length, response.headers.get("ETag"), 0
        if response.status == 206 and self._at:
            place = self._at
            if not response.headers.get("Content-Range", "").startswith(f"bytes {place}-"):
                raise _FinalError("the server answers with another range than the one it was asked for")
        whole = None if length is None else place + length
        if self._at and (whole, tag) != (self._length, self._tag):
            raise _FinalError("the file on the server changed while it was read")
        self._length, self._tag = whole, tag
        while place < self._at:
            data = response.read1(min(self._at - place, 1 << 20))
            if not data:
                raise ConnectionError(f"the connection ended at byte {place}")
            place += len(data)

    def _drop(self) -> None:
        if self._response is not None:
            with contextlib.suppress(OSError, HTTPException):
                self._response.close()
            self._response = None


def _is_refusal(error: Exception) -> bool:
    return isinstance(error, urllib.error.HTTPError) and error.code < 500 and error.code not in TRY_AGAIN


def _within(seconds: float, work: Callable[[], Any]) -> Any:
    """``work()``, or TimeoutError. A socket's own limit is between two bytes, and a header may come byte by byte."""
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
