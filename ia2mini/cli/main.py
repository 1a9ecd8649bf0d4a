"""The command `ia2mini`: the group with all of its commands."""

from . import fit, models, run, use  # noqa: F401  (their commands join the group)
from .group import main

__all__ = ["main"]
