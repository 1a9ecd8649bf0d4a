"""`python -m ia2mini`, also for torchrun."""

from .cli.main import main

main(prog_name="ia2mini")
