"""Training of the reference model: one loop for autoencoders and priors, checkpoints, several processes."""

from fastvq.training.config import TrainConfig
from fastvq.training.loop import Objective, train
from fastvq.training.objectives import autoencoder_objective, prior_objective
from fastvq.training.processes import (
    ProcessContext,
    Stopped,
    barrier,
    find_device,
    from_first,
    handled,
    processes,
    run_folder,
    sigterm_stops,
)

__all__ = [
    "Objective",
    "Place",
    "ProcessContext",
    "Stopped",
    "TrainConfig",
    "autoencoder_objective",
    "barrier",
    "find_device",
    "from_first",
    "handled",
    "prior_objective",
    "processes",
    "run_folder",
    "sigterm_stops",
    "train",
]

Place = ProcessContext  # the name of earlier versions
