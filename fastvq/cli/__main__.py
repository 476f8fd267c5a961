"""``python -m fastvq.cli``, which ``torchrun -m fastvq.cli`` needs."""

from fastvq.cli.main import main

main()
