"""`python -m ia2mini`; torchrun needs it."""

from .cli import main

main()
