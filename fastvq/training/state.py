"""Everything a run needs to go on: weights, codebooks, optimizer, averaged weights and the step, in one file.

One file, so that a crash cannot leave parts of two steps. There is no state of random numbers in it: every step seeds
them from the run's seed and its own number.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastvq.models.checkpoints import Pretrained, load_state, load_tensors, save_tensors
from fastvq.training.config import TrainConfig

__all__ = ["STATE", "Averages", "load_run", "save_run"]

OP = "fastvq.training"
STATE, FORMAT = "state.safetensors", "fastvq training state"
# An average that starts at the first weights forgets them at this pace, however slow its own decay.
WARM_NUMERATOR, WARM_DENOMINATOR = 1, 10


class Averages:
    """Moving averages of a model's trainable weights, in float32."""

    def __init__(self, model: torch.nn.Module, decay: float) -> None:
        self.decay = decay
        self.live = {name: p for name, p in model.named_parameters() if p.requires_grad} if decay else {}
        self.tensors = {name: p.detach().float().clone() for name, p in self.live.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        if self.live:
            decay = min(self.decay, (WARM_NUMERATOR + step) / (WARM_DENOMINATOR + step))
            live = [p.detach().float() for p in self.live.values()]
            torch._foreach_lerp_(list(self.tensors.values()), live, 1 - decay)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchanges the averages with the live weights; a second call takes that back."""
        for name, p in self.live.items():
            kept = p.detach().float().clone()
            p.copy_(self.tensors[name])
            self.tensors[name].copy_(kept)


def save_run(
    folder: Path, model: Pretrained, optimizer: torch.optim.Optimizer, averages: Averages, step: int,
    config: TrainConfig,
) -> None:  # fmt: skip
    """Writes ``folder/state.safetensors``; OSError, with the earlier file untouched, where it cannot."""
    tensors: dict[str, Tensor] = {f"model.{name}": t for name, t in model.state_dict().items()}
    tensors |= {f"average.{name}": t for name, t in averages.tensors.items()}
    for number, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{number}.{name}": torch.as_tensor(value) for name, value in state.items()}
    metadata = {
        "format": FORMAT,
        "step": str(step),
        "model": json.dumps({"class": type(model).__name__, **model.config}),
        "training": json.dumps(config.fixed()),
    }
    save_tensors(folder / STATE, tensors, metadata)


def load_run(
    folder: Path, model: Pretrained, optimizer: torch.optim.Optimizer, averages: Averages, config: TrainConfig
) -> int:
    """Puts a saved run's state into the arguments and returns its step.

    Raises:
        FileNotFoundError: nothing was saved there.
        ValueError: the file is truncated or foreign, or belongs to a run with another model or other settings.
    """
    path = folder / STATE
    tensors, metadata = load_tensors(OP, path, FORMAT)
    described = {"class": type(model).__name__, **model.config}
    for what, saved, wanted in (
        ("model", json.loads(metadata["model"]), described),
        ("settings", json.loads(metadata["training"]), config.fixed()),
    ):
        wanted = json.loads(json.dumps(wanted))  # tuples become lists, as they did in the file
        differing = [
            f"{name} was {saved.get(name)!r}, is {wanted.get(name)!r}"
            for name in sorted({*saved, *wanted})
            if saved.get(name) != wanted.get(name)
        ]
        if differing:
            raise ValueError(
                f"{OP}: {path} belongs to a run with another {what} ({'; '.join(differing)}); "
                "resume with the same ones or train into another folder"
            )
    groups = _by_prefix(tensors)
    load_state(OP, path, model, groups.get("model", {}))
    for name, tensor in groups.get("average", {}).items():
        averages.tensors[name].copy_(tensor)
    state: dict[int, dict[str, Any]] = {}
    for name, tensor in groups.get("optimizer", {}).items():
        number, _, key = name.partition(".")
        state.setdefault(int(number), {})[key] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    return int(metadata["step"])


def _by_prefix(tensors: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    groups: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        prefix, _, rest = name.partition(".")
        groups.setdefault(prefix, {})[rest] = tensor
    return groups
