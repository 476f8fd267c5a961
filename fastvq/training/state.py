"""The checkpoint of a run: weights, codebooks, optimizer, averaged weights and the step, in one file.

It is one file, so that a crash cannot leave parts of two steps. It holds no state of a random number generator: every
step seeds the generator from the run's seed and the step's number.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor

from fastvq._json import anything, list_of, mapping_of, parse_json, whole
from fastvq._shorten import SHOWN_NOTE, shorten, shorten_text
from fastvq.models.checkpoints import Pretrained, load_state, load_tensors, save_tensors
from fastvq.training.config import TrainConfig

__all__ = ["STATE", "Averages", "load_run", "save_run", "saved_step"]

OP = "fastvq.training"
STATE, FORMAT = "state.safetensors", "fastvq training state"
ENTRIES = ("step", "model", "training", "optimizer?")
MOST_STEPS = 1 << 40
# Early in a run the decay of an average is at most (1 + step) / (10 + step), so that it forgets the first weights.
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
        """Exchanges the averages with the live weights; a second call exchanges them back."""
        for name, p in self.live.items():
            kept = p.detach().float().clone()
            p.copy_(self.tensors[name])
            self.tensors[name].copy_(kept)


def save_run(
    folder: Path,
    model: Pretrained,
    optimizer: torch.optim.Optimizer,
    averages: Averages,
    step: int,
    config: TrainConfig,
) -> None:
    """Writes ``folder/state.safetensors``. Where that fails, raises OSError and leaves the earlier file untouched."""
    tensors: dict[str, Tensor] = {f"model.{name}": t for name, t in model.state_dict().items()}
    tensors |= {f"average.{name}": t for name, t in averages.tensors.items()}
    optimized = optimizer.state_dict()["state"]
    for number, state in optimized.items():
        tensors |= {f"optimizer.{number}.{name}": torch.as_tensor(value) for name, value in state.items()}
    metadata = {
        "format": FORMAT,
        "step": str(step),
        "model": json.dumps({"class": type(model).__name__, **model.config}),
        "training": json.dumps(config.fixed()),
        "optimizer": json.dumps(sorted(optimized)),  # numbers of the parameters that have a state
    }
    save_tensors(folder / STATE, tensors, metadata)


def load_run(
    folder: Path, model: Pretrained, optimizer: torch.optim.Optimizer, averages: Averages, config: TrainConfig
) -> int:
    """Puts a saved run's state into the arguments and returns its step.

    Raises:
        FileNotFoundError: there is no saved state.
        ValueError: the file is truncated, damaged or of another format, lacks a tensor that the run needs, or belongs
            to a run with another model or other settings.
    """
    path = folder / STATE
    tensors, metadata = load_tensors(OP, path, FORMAT, ENTRIES)
    step = _step(path, metadata)
    described = {"class": type(model).__name__, **model.config}
    for part, saved, current in (
        ("model", metadata["model"], described),
        ("settings", metadata["training"], config.fixed()),
    ):
        saved, _ = parse_json(OP, f"the {part} in {path}", saved, mapping_of(anything))
        current = json.loads(json.dumps(current))  # tuples become lists, as they did in the file
        differing = [
            f"{shorten(name)[1:-1]} was {shorten(saved.get(name))}, is {shorten(current.get(name))}"
            for name in sorted({*saved, *current})
            if saved.get(name) != current.get(name)
        ]
        if differing:
            named = shorten_text("; ".join(differing), SHOWN_NOTE)
            raise ValueError(
                f"{OP}: {path} belongs to a run with another {part} ({named}); "
                "resume with the same ones or train into another folder"
            )
    groups = _by_prefix(tensors)
    if unknown := groups.keys() - {"model", "average", "optimizer"}:
        raise ValueError(
            f"{OP}: {path} must hold a run's tensors alone, got {shorten(sorted(unknown)[0])}; it is damaged"
        )
    load_state(OP, path, model, groups.get("model", {}))
    _load_averages(path, averages, groups.get("average", {}))
    _load_optimizer(path, optimizer, groups.get("optimizer", {}), metadata, step)
    return step


def saved_step(folder: Path) -> int:
    """The step of the state in ``folder``; raises as ``load_run`` does."""
    return _step(folder / STATE, load_tensors(OP, folder / STATE, FORMAT, ENTRIES)[1])


def _step(path: Path, metadata: dict[str, str]) -> int:
    step, _ = parse_json(OP, f"the step in {path}", metadata["step"], whole(1, MOST_STEPS))
    return int(step)


def _load_averages(path: Path, averages: Averages, tensors: dict[str, Tensor]) -> None:
    expected = {f"average.{name}": tuple(t.shape) for name, t in averages.tensors.items()}
    _check_tensors(path, {f"average.{name}": t for name, t in tensors.items()}, expected)
    for name, tensor in tensors.items():
        averages.tensors[name].copy_(tensor)


def _load_optimizer(
    path: Path, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], metadata: dict[str, str], step: int
) -> None:
    """AdamW's two moments and its count of each parameter that had a gradient."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    if "optimizer" in metadata:
        kind = list_of(whole(0, len(parameters) - 1))
        numbers, _ = parse_json(OP, f"the optimizer's list in {path}", metadata["optimizer"], kind)
    else:  # earlier versions kept no list: the parameters that have tensors in the file
        numbers = [i for i in range(len(parameters)) if any(name.startswith(f"{i}.") for name in tensors)]
    expected: dict[str, tuple[int, ...]] = {}
    for i in numbers:
        shape = tuple(parameters[i].shape)
        expected |= {f"optimizer.{i}.step": (), f"optimizer.{i}.exp_avg": shape, f"optimizer.{i}.exp_avg_sq": shape}
    _check_tensors(path, {f"optimizer.{name}": t for name, t in tensors.items()}, expected)
    counts = [float(tensors[f"{i}.step"]) for i in numbers] or [step]
    if max(counts) != step or not all(0 < count <= step for count in counts):  # "not all": true for NaN too
        raise ValueError(
            f"{OP}: {path} must be of one step, got {step} and the optimizer's {min(counts)} .. {max(counts)}; "
            "it is damaged"
        )
    state = {i: {key: tensors[f"{i}.{key}"] for key in ("step", "exp_avg", "exp_avg_sq")} for i in numbers}
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _check_tensors(path: Path, tensors: dict[str, Tensor], expected: dict[str, tuple[int, ...]]) -> None:
    """ValueError unless the tensors are floating and have exactly these names and shapes."""
    for name in [*expected, *tensors]:
        if name not in tensors:
            fault = f"misses {name}"
        elif name not in expected:
            fault = f"has {shorten(name)}, which this run does not"
        elif tuple(tensors[name].shape) != expected[name]:
            fault = f"has {name} of shape {shorten(list(tensors[name].shape))}, not {list(expected[name])}"
        elif not tensors[name].is_floating_point():
            fault = f"has {name} as {tensors[name].dtype}, not as floating"
        else:
            continue
        raise ValueError(f"{OP}: {path} {fault}; it is damaged or of a run with another model or optimizer")


def _by_prefix(tensors: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    groups: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        prefix, _, rest = name.partition(".")
        groups.setdefault(prefix, {})[rest] = tensor
    return groups
