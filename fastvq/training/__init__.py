"""Training of the reference model: one loop for autoencoders and priors, checkpoints, several processes."""

from fastvq.training.config import TrainConfig
from fastvq.training.loop import Objective, train
from fastvq.training.objectives import autoencoder_objective, prior_objective
from fastvq.training.processes import Place, barrier, find_device, processes, run_folder

__all__ = [
    "Objective",
    "Place",
    "TrainConfig",
    "autoencoder_objective",
    "barrier",
    "find_device",
    "prior_objective",
    "processes",
    "run_folder",
    "train",
]
