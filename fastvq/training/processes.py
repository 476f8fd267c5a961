"""Training on one process or several: rank and device of this process, and operations over all processes."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from fastvq._files import lock_folder
from fastvq._shorten import shorten_text

__all__ = [
    "ProcessContext",
    "Stopped",
    "average",
    "barrier",
    "find_device",
    "from_first",
    "handled",
    "processes",
    "run_folder",
    "sigterm_stops",
]


class ProcessContext(NamedTuple):
    """Rank and device of this process, and the number of processes (``world``)."""

    rank: int
    world: int
    device: torch.device

    @property
    def first(self) -> bool:
        return self.rank == 0


def find_device(name: str, index: int = 0) -> torch.device:
    """The torch device of a name: "cuda" is GPU number ``index``; "auto" is that GPU, or the CPU where there is none.

    Raises:
        ValueError: this installation of torch does not know the device or cannot use it.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(f"cuda:{index}" if name == "cuda" else name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # AssertionError: torch was built without CUDA
        raise ValueError(
            f"fastvq.training: device must be one that this torch can use, got {name!r} ({shorten_text(error)})"
        ) from None
    return device


@contextmanager
def processes(device: str = "auto") -> Iterator[ProcessContext]:
    """Yields the context of this process among those that ``torchrun`` started; without ``torchrun``, of one process.

    The process group (gloo on CPUs, nccl on GPUs) exists until the block ends.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    rank, local = int(os.environ.get("RANK", "0")), int(os.environ.get("LOCAL_RANK", "0"))
    place = ProcessContext(rank, world, find_device(device, local))
    if world == 1:
        yield place
        return
    if place.device.type == "cuda":
        torch.cuda.set_device(place.device)
    dist.init_process_group("nccl" if place.device.type == "cuda" else "gloo")
    try:
        yield place
    finally:
        dist.destroy_process_group()


def average(numbers: dict[str, Tensor]) -> None:
    """Replaces each number [] by its mean over all processes, in one message. Does nothing with one process."""
    if dist.is_available() and dist.is_initialized():
        packed = torch.stack(list(numbers.values()))
        dist.all_reduce(packed)
        numbers.update(zip(numbers, packed / dist.get_world_size(), strict=True))


def barrier() -> None:
    """Waits until every process has come here. Does nothing with one process."""
    if dist.is_available() and dist.is_initialized():
        dist.barrier()


def from_first(place: ProcessContext, work: Callable[[], int]) -> int:
    """Runs ``work`` in the first process and returns its number in all. If ``work`` fails, all raise."""
    value, failed = 0, None
    if place.first:
        try:
            value = work()
        except (OSError, ValueError) as error:
            failed = error
    if dist.is_available() and dist.is_initialized():
        message = torch.tensor([value, failed is not None], dtype=torch.int64, device=place.device)
        dist.broadcast(message, 0)
        value = int(message[0])
        if message[1] and failed is None:
            failed = ValueError("the first process failed; its error says why")
    if failed is not None:
        raise failed
    return value


@contextmanager
def run_folder(op: str, folder: Path, place: ProcessContext) -> Iterator[None]:
    """Locks ``folder`` for one run; the first process takes the lock (``lock_folder``) for all of them.

    Raises:
        ValueError: another run holds the lock; every process of this run raises.
        OSError: the folder cannot be created or written to.
    """
    with ExitStack() as held:

        def take() -> int:
            held.enter_context(lock_folder(op, folder))
            return 0

        from_first(place, take)
        yield


class Stopped(Exception):
    """A run was asked to stop; it saved its state first."""

    def __init__(self, step: int) -> None:
        super().__init__(f"stopped after step {step}, which is saved")
        self.step = step


@contextmanager
def sigterm_stops() -> Iterator[Callable[[], bool]]:
    """Yields a function to call once a step; it returns whether any of the processes has received SIGTERM.

    All processes get the same answer at the same step. With several processes it is the answer of the step before, so
    that no process waits for a message.
    """
    asked = [False]

    def ask(*_: Any) -> None:
        asked[0] = True

    group = dist.new_group(backend="gloo") if dist.is_available() and dist.is_initialized() else None
    waiting: list[tuple[Any, Tensor]] = []

    def is_asked() -> bool:
        if group is None:
            return asked[0]
        answer = False
        if waiting:
            work, sent = waiting.pop()
            work.wait()
            answer = bool(sent.item())
        flag = torch.tensor([asked[0]], dtype=torch.int32)
        waiting.append((dist.all_reduce(flag, dist.ReduceOp.MAX, group=group, async_op=True), flag))
        return answer

    with handled(signal.SIGTERM, ask):
        yield is_asked


@contextmanager
def handled(number: signal.Signals, handler: Callable[..., None]) -> Iterator[None]:
    """Sets a signal's handler for the block. Does nothing outside the main thread, where Python handles no signals."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(number, handler)
    try:
        yield
    finally:
        signal.signal(number, before)
