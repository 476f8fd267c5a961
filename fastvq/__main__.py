"""``python -m fastvq``: the command, where its script is not on the path."""

from fastvq.cli import main

main()
