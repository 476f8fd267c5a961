"""The settings of a training run, apart from its model and its data."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

from fastvq._checks import check_option

__all__ = ["TrainConfig"]

PRECISIONS = ("float32", "bf16")
# Fields that may differ in a resumed run: the weights up to the saved step do not depend on them.
FREE = ("save_every", "log_every", "steps")


@dataclass(frozen=True)
class TrainConfig:
    """Settings of ``fastvq.training.train``.

    A step takes ``accumulate`` micro-batches of ``batch_size`` pictures on every process. The learning rate rises
    linearly for ``warmup`` steps and then falls along a cosine to ``lr * final_lr`` at ``steps``.
    """

    steps: int = 1000
    batch_size: int = 64
    accumulate: int = 1
    lr: float = 1e-3
    warmup: int = 50
    final_lr: float = 0.05  # share of lr at the end
    weight_decay: float = 0.0
    clip: float = 1.0  # largest norm of the gradients; 0: no clipping
    ema: float = 0.0  # decay of the moving average of the weights, which is exported; 0: the weights are exported
    precision: str = "float32"  # "bf16": autocast
    compile: bool = False
    seed: int = 0
    save_every: int = 500
    log_every: int = 50

    def __post_init__(self) -> None:
        op = "fastvq.training"
        check_option(op, "precision", self.precision, PRECISIONS)
        for name in ("steps", "batch_size", "accumulate", "save_every", "log_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{op}: {name} must be at least 1, got {getattr(self, name)}")
        if not 0 <= self.ema < 1:
            raise ValueError(f"{op}: ema must be in 0 .. 1, 1 excluded, got {self.ema}")
        if self.lr <= 0 or self.clip < 0:
            raise ValueError(f"{op}: lr must be above 0 and clip not below it, got {self.lr} and {self.clip}")

    def rate(self, step: int) -> float:
        """The learning rate of step 0, 1, ..."""
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        done = min(1.0, (step - self.warmup) / max(1, self.steps - self.warmup))
        return self.lr * (self.final_lr + (1 - self.final_lr) * (1 + math.cos(math.pi * done)) / 2)

    def fixed(self) -> dict[str, object]:
        """The fields that must be the same in a resumed run."""
        return {name: value for name, value in asdict(self).items() if name not in FREE}
