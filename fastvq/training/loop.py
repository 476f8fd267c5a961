"""The loop that trains an autoencoder or a prior, on one process or several, and resumes from the last checkpoint."""

from __future__ import annotations

import contextlib
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fastvq.data import Batch, Loader
from fastvq.models.checkpoints import Pretrained
from fastvq.nn import update_codebooks
from fastvq.training.config import TrainConfig
from fastvq.training.log import Log
from fastvq.training.processes import ProcessContext, Stopped, average, barrier, run_folder
from fastvq.training.state import OP, STATE, Averages, load_run, save_run

__all__ = ["Objective", "train"]

# (callable that wraps the model, batch on its device) -> (loss [], numbers for the log)
Objective = Callable[[Callable[..., Any], Batch], tuple[Tensor, dict[str, Tensor]]]


def train(
    model: Pretrained,
    objective: Objective,
    loader: Loader,
    config: TrainConfig,
    folder: Path,
    *,
    place: ProcessContext | None = None,
    resume: bool = False,
    on_step: Callable[[int], None] | None = None,
    on_log: Callable[[dict[str, Any]], None] | None = None,
    stop: Callable[[], bool] | None = None,
) -> None:
    """Trains ``model`` in place. It ends in ``eval()`` mode, with the averaged weights if ``config.ema`` is set.

    Every ``save_every`` steps and at the end, ``folder`` gets ``state.safetensors``, which holds all that a resumed run
    needs, and the model (for ``from_pretrained``). ``log.jsonl`` gets a line every ``log_every`` steps. The state is
    the checkpoint: if a crash came between the two writes, a resumed run writes the model again. The data and all
    random numbers follow from the seed and the step. So a run that was killed at any moment and resumed ends with the
    weights of an uninterrupted run, bit for bit on a CPU with the same number of threads. Only one run at a time can
    use the folder.

    Args:
        objective: the loss of one micro-batch. It must call its first argument, not the model: that averages the
            gradients of several processes.
        loader: made for this process's rank and world.
        place: rank, world and device of this process; rank 0 of 1 on the CPU unless given.
        resume: continue from the checkpoint in ``folder``, if there is one. Without it, a checkpoint there is an error.
        on_step: called after each step with the number of finished steps.
        on_log: called with each line of the log, on rank 0.
        stop: called after each step; True saves and ends the run. It must give the same answer on all processes.

    Raises:
        Stopped: ``stop`` returned True.
        ValueError: ``folder`` holds a state and ``resume`` is False; another run uses the folder; the state is
            truncated, damaged, of another format or of another run; the loss is not finite.
        OSError: a checkpoint cannot be written; the one before it is whole.
    """
    place = place or ProcessContext(0, 1, torch.device("cpu"))
    with run_folder(OP, folder, place):
        _train(model, objective, loader, config, folder, place, resume, on_step, on_log, stop)


def _train(
    model: Pretrained,
    objective: Objective,
    loader: Loader,
    config: TrainConfig,
    folder: Path,
    place: ProcessContext,
    resume: bool,
    on_step: Callable[[int], None] | None,
    on_log: Callable[[dict[str, Any]], None] | None,
    stop: Callable[[], bool] | None,
) -> None:
    model.to(place.device).train()
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], config.lr, weight_decay=config.weight_decay
    )
    averages = Averages(model, config.ema)
    done = 0
    if (folder / STATE).exists():
        if not resume:
            raise ValueError(f"{OP}: {folder} holds a run already; resume it, or train into another folder")
        done = load_run(folder, model, optimizer, averages, config)
        if place.first:
            with _disk_errors(folder, done, done):
                _export(folder, model, averages, compare=True)
    net = _wrap(model, config, place)
    log = Log(folder, done) if place.first else None
    batches = loader.batches(start=done * config.accumulate)
    sums: dict[str, Tensor] = {}
    since = (time.perf_counter(), time.process_time())
    saved = done
    try:
        for step in range(done, config.steps):
            torch.manual_seed(config.seed * 1_000_003 + step)
            for group in optimizer.param_groups:
                group["lr"] = config.rate(step)
            for micro in range(config.accumulate):
                last = micro + 1 == config.accumulate
                # Processes exchange gradients once a step, with the last micro-batch.
                no_sync = contextlib.nullcontext() if last or place.world == 1 else net.no_sync()
                batch = _to(next(batches), place.device)
                with no_sync, torch.autocast(place.device.type, torch.bfloat16, enabled=config.precision == "bf16"):
                    loss, numbers = objective(net, batch)
                    (loss / config.accumulate).backward()
                for name, value in {"loss": loss, **numbers}.items():
                    sums[name] = sums.get(name, 0) + value.detach().float()
            norm = nn.utils.clip_grad_norm_(model.parameters(), config.clip or float("inf"))
            optimizer.step()
            optimizer.zero_grad()
            update_codebooks(model)
            averages.update(step)
            sums["gradient_norm"] = sums.get("gradient_norm", 0) + norm.detach() * config.accumulate
            now = step + 1
            if now % config.log_every == 0 or now == config.steps:
                average(sums)
                seconds, busy = time.perf_counter() - since[0], time.process_time() - since[1]
                line = _line(now, sums, config, seconds, place.world, done, loader)
                line |= {"seconds": round(seconds, 3), "processor_seconds": round(busy, 3)}
                sums, since = {}, (time.perf_counter(), time.process_time())
                if log is not None:
                    log.write(line)
                    if on_log is not None:
                        on_log(line)
            is_last = stop is not None and stop()
            if now % config.save_every == 0 or now == config.steps or is_last:
                if sums:  # empty just after a line of the log, which has checked them
                    _check_finite(now, float(sums["loss"]), float(sums["gradient_norm"]))
                if place.first:
                    _save(folder, model, optimizer, averages, now, saved, config)
                saved = now
            if on_step is not None:
                on_step(now)
            if is_last:
                barrier()  # no process may end before the first one has saved
                raise Stopped(now)
    finally:
        if log is not None:
            log.close()
        batches.close()
    averages.swap()
    model.eval()
    barrier()


def _wrap(model: nn.Module, config: TrainConfig, place: ProcessContext) -> Any:
    net: Any = torch.compile(model) if config.compile else model
    if place.world > 1:
        # The buffers belong to codebooks; fastvq.nn keeps them equal on all ranks.
        devices = [place.device.index] if place.device.type == "cuda" else None
        with warnings.catch_warnings():
            # Newer versions of torch prefer another argument, which older ones do not have.
            warnings.filterwarnings("ignore", "`broadcast_buffers`", FutureWarning)
            net = DistributedDataParallel(net, device_ids=devices, broadcast_buffers=False)
    return net


def _to(batch: Batch, device: torch.device) -> Batch:
    return Batch(batch.images.to(device), None if batch.labels is None else batch.labels.to(device))


def _line(
    step: int, sums: dict[str, Tensor], config: TrainConfig, seconds: float, world: int, done: int, loader: Loader
) -> dict[str, Any]:
    steps = (step - 1 - max(done, (step - 1) // config.log_every * config.log_every)) + 1
    n = steps * config.accumulate
    line: dict[str, Any] = {"step": step, **{name: round(float(value) / n, 6) for name, value in sums.items()}}
    _check_finite(step, line["loss"], line["gradient_norm"])
    line["rate"] = config.rate(step - 1)
    line["pictures_per_second"] = round(n * config.batch_size * world / seconds, 1)
    if loader.source.skipped:
        line["skipped"] = len(loader.source.skipped)
    return line


def _check_finite(step: int, loss: float, norm: float) -> None:
    if not (abs(loss) < float("inf") and abs(norm) < float("inf")):
        raise ValueError(
            f"{OP}: the loss or its gradient is not finite near step {step} (loss {loss}, norm {norm}); "
            "lower lr, or clip, and resume from the last checkpoint"
        )


def _save(
    folder: Path,
    model: Pretrained,
    optimizer: torch.optim.Optimizer,
    averages: Averages,
    step: int,
    saved: int,
    config: TrainConfig,
) -> None:
    with _disk_errors(folder, step, saved):
        save_run(folder, model, optimizer, averages, step, config)
        _export(folder, model, averages)


def _export(folder: Path, model: Pretrained, averages: Averages, *, compare: bool = False) -> None:
    """Writes the model, with the averaged weights if there are any. ``compare``: only if the folder holds another
    model."""
    averages.swap()
    try:
        if not (compare and model.is_saved_in(folder)):
            model.save_pretrained(folder)
    finally:
        averages.swap()


@contextlib.contextmanager
def _disk_errors(folder: Path, step: int, saved: int) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        before = f"the last good one, of step {saved}, is still there" if saved else "there was none before it"
        raise OSError(
            f"{OP}: the checkpoint of step {step} could not be written to {folder} ({error}); {before}: "
            "make room and resume"
        ) from error
