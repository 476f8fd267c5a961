"""Peak extra memory of a call: how far the resident size of this process rose above where it stood before."""

from __future__ import annotations

import ctypes
import os
import threading
from pathlib import Path
from types import TracebackType

STATUS = Path("/proc/self/status")
CLEAR_REFS = Path("/proc/self/clear_refs")
STATM = Path("/proc/self/statm")
SAMPLE_SECONDS = 0.0005


def _status_kib(field: str) -> int:
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(field + ":"))
    return int(line.split()[1])


def _release_freed_memory() -> None:
    """Give freed pages back, so that a call cannot hide its buffers in what an earlier one left behind."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
    if trim is not None:
        trim(0)


class PeakMemory:
    """``with PeakMemory() as memory: call()``, then ``memory.mib``; None where the system does not tell.

    On Linux the kernel keeps the high-water mark of the resident size (VmHWM), and writing 5 to
    ``/proc/self/clear_refs`` resets it: no peak is missed however short it is. Where that file cannot be written a
    thread samples ``/proc/self/statm`` twice a millisecond, which sees a peak only while the call lets go of the GIL.
    Results that the call returns count; what lived before it, inputs included, does not.
    """

    method = "none"

    def __enter__(self) -> PeakMemory:
        self.mib: float | None = None
        _release_freed_memory()
        try:
            CLEAR_REFS.write_text("5")
            self._before = _status_kib("VmRSS")
            self.method = "VmHWM"
        except OSError:
            if STATM.exists():
                self._start_sampling()
                self.method = "sampled"
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self.method == "sampled":
            self._stop.set()
            self._thread.join()
        self.mib = self.so_far()

    def so_far(self) -> float | None:
        if self.method == "VmHWM":
            return max(0, _status_kib("VmHWM") - self._before) / 1024
        if self.method == "sampled":
            return max(0, self._peak - self._before_pages) * os.sysconf("SC_PAGE_SIZE") / 2**20
        return None

    def _start_sampling(self) -> None:
        self._before_pages = self._peak = self._pages()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()

    def _sample(self) -> None:
        while not self._stop.wait(SAMPLE_SECONDS):
            self._peak = max(self._peak, self._pages())

    @staticmethod
    def _pages() -> int:
        return int(STATM.read_text().split()[1])
