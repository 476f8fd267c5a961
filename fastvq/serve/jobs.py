"""Work that needs a model, one piece after another in one thread, so that no two callers share the model at a time."""

from __future__ import annotations

import logging
import secrets
import threading
from collections import OrderedDict
from collections.abc import Callable
from itertools import takewhile
from queue import Queue
from typing import Any

__all__ = ["Busy", "Cancelled", "Job", "Worker"]

MAX_WAITING = 16  # jobs in the queue; further ones are refused
MAX_KEPT = 64  # finished jobs whose result can still be asked for
LOG = logging.getLogger("fastvq.serve")


class Cancelled(Exception):
    """Raised inside a job that was asked to end."""


class Busy(Exception):
    """The queue is full."""


class Job:
    """One piece of work. ``state`` is "waiting", "running", "done", "failed" or "cancelled"."""

    def __init__(self, work: Callable[[Job], Any]) -> None:
        self.id, self.work = secrets.token_urlsafe(12), work  # the result is for those who know the id
        self.state, self.progress = "waiting", 0.0
        self.result: Any = None
        self.error: str | None = None
        self.ended = threading.Event()
        self._stop = False

    def report(self, share: float) -> None:
        """Says that ``share`` of the work, in 0 .. 1, is done. Raises Cancelled where the job was asked to end."""
        if self._stop:
            raise Cancelled
        self.progress = share

    def cancel(self) -> None:
        """Asks the job to end: at once where it waits, else at its next report."""
        self._stop = True


class Worker:
    """A queue of jobs and the thread that does them."""

    def __init__(self) -> None:
        self._queue: Queue[Job | None] = Queue(MAX_WAITING)
        self._jobs: OrderedDict[str, Job] = OrderedDict()  # in the order of their submission
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="fastvq edits", daemon=True)
        self._thread.start()

    def submit(self, work: Callable[[Job], Any]) -> Job:
        """Queues ``work(job)``. Raises Busy where too many jobs wait already."""
        with self._lock:
            self.check_room()
            job = Job(work)
            self._jobs[job.id] = job
            self._queue.put_nowait(job)
            done = [key for key, other in self._jobs.items() if other.ended.is_set()]
            for key in done[: max(0, len(self._jobs) - MAX_KEPT)]:
                del self._jobs[key]
        return job

    def check_room(self) -> None:
        """Raises Busy where the queue is full, so that a caller can refuse before it prepares the work."""
        if self._queue.full():
            raise Busy

    def job(self, key: str) -> Job:
        """The job of that id; KeyError where there is none, or it ended long ago."""
        with self._lock:
            return self._jobs[key]

    def ahead(self, job: Job) -> int:
        """Number of jobs that come before this one, the running one included."""
        with self._lock:
            earlier = takewhile(lambda other: other is not job, self._jobs.values())
            return sum(not other.ended.is_set() for other in earlier)

    def close(self) -> None:
        """Ends the thread after the job that runs. Waiting jobs are cancelled."""
        with self._lock:
            for job in self._jobs.values():
                job.cancel()
        self._queue.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (job := self._queue.get()) is not None:
            job.state = "running"
            try:
                job.report(0.0)
                job.result = job.work(job)
                job.progress, job.state = 1.0, "done"
            except Cancelled:
                job.state = "cancelled"
            except (ValueError, TypeError, OSError) as error:  # the caller can mend it
                job.error, job.state = " ".join(str(error).split()), "failed"
            except Exception as error:
                LOG.exception("an edit failed")
                job.error = f"{type(error).__name__}: this is a fault of fastvq; the terminal shows where"
                job.state = "failed"
            job.work = _nothing  # what it holds, a picture for instance, is needed no longer
            job.ended.set()


def _nothing(job: Job) -> None:
    """The work of a job that has ended."""
