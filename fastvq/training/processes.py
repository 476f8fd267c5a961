"""One process or several: who this one is, and what several do together."""

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

__all__ = [
    "Place", "Stopped", "average", "barrier", "find_device", "from_first", "handled", "processes", "run_folder",
    "sigterm_stops",
]  # fmt: skip


class Place(NamedTuple):
    rank: int
    world: int
    device: torch.device

    @property
    def first(self) -> bool:
        return self.rank == 0


def find_device(name: str, index: int = 0) -> torch.device:
    """torch's device of a name, "auto" the GPU where there is one; "cuda" is the GPU of that index.

    Raises:
        ValueError: this torch knows no such device or cannot use it.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(f"cuda:{index}" if name == "cuda" else name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # the latter where torch was built without it
        raise ValueError(
            f"fastvq.training: device must be one that this torch can use, got {name!r} ({str(error).splitlines()[0]})"
        ) from None
    return device


@contextmanager
def processes(device: str = "auto") -> Iterator[Place]:
    """This process's place among those that ``torchrun`` started; alone where it did not.

    The process group (gloo on CPUs, nccl on GPUs) lives as long as the block.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    rank, local = int(os.environ.get("RANK", "0")), int(os.environ.get("LOCAL_RANK", "0"))
    place = Place(rank, world, find_device(device, local))
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
    """Replaces each number [] by its mean over all processes, in one message; nothing where there is one."""
    if dist.is_available() and dist.is_initialized():
        packed = torch.stack(list(numbers.values()))
        dist.all_reduce(packed)
        numbers.update(zip(numbers, packed / dist.get_world_size(), strict=True))


def barrier() -> None:
    """Waits for every process; nothing where there is one."""
    if dist.is_available() and dist.is_initialized():
        dist.barrier()


def from_first(place: Place, work: Callable[[], int]) -> int:
    """The number that ``work`` returns in the first process, for all of them; where it fails, all fail."""
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
def run_folder(op: str, folder: Path, place: Place) -> Iterator[None]:
    """Holds ``folder`` for one run, whose first process takes the lock for all of them (``lock_folder``).

    Raises:
        ValueError: another run holds the folder; every process of this one raises.
        OSError: the folder cannot be made or written to.
    """
    with ExitStack() as held:

        def take() -> int:
            held.enter_context(lock_folder(op, folder))
            return 0

        from_first(place, take)
        yield


class Stopped(Exception):
    """A run that was asked to end, and saved its state before it did."""

    def __init__(self, step: int) -> None:
        super().__init__(f"stopped after step {step}, which is saved")
        self.step = step


@contextmanager
def sigterm_stops() -> Iterator[Callable[[], bool]]:
    """Yields a function that says, once a step, whether SIGTERM came to any of the processes.

    They all get the same answer at the same step. With several it is that of the step before, so that nobody waits.
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
    """A signal's handler for a while; outside of the main thread, where Python has no signals, nothing."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(number, handler)
    try:
        yield
    finally:
        signal.signal(number, before)
