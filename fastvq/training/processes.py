"""One process or several: who this one is, and what several do together."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from fastvq._files import lock_folder

__all__ = ["Place", "average", "barrier", "find_device", "processes", "run_folder"]


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


@contextmanager
def run_folder(op: str, folder: Path, place: Place) -> Iterator[None]:
    """Holds ``folder`` for one run, whose first process takes the lock for all of them (``lock_folder``).

    Raises:
        ValueError: another run holds the folder; every process of this one raises.
        OSError: the folder cannot be made or written to.
    """
    with ExitStack() as held:
        failed: Exception | None = None
        if place.first:
            try:
                held.enter_context(lock_folder(op, folder))
            except (OSError, ValueError) as error:
                failed = error
        if dist.is_available() and dist.is_initialized():
            flag = torch.tensor([failed is not None], dtype=torch.int64, device=place.device)
            dist.broadcast(flag, 0)
            if flag.item() and failed is None:
                failed = ValueError(f"{op}: the first process could not take {folder}; its error says why")
        if failed is not None:
            raise failed
        yield
