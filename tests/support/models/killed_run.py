"""A training that kills itself without warning: python -m tests.support.models.killed_run FOLDER STEP."""

import os
import signal
import sys
from pathlib import Path

import torch

from tests.models.test_training import run

torch.set_num_threads(1)  # as the tests do
last = int(sys.argv[2])
run(Path(sys.argv[1]), on_step=lambda step: os.kill(os.getpid(), signal.SIGKILL) if step == last else None)
