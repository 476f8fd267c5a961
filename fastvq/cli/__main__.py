"""``python -m fastvq.cli``, which ``torchrun -m fastvq.cli`` needs."""

from fastvq.cli import main

main()
