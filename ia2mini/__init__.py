"""ia2mini: teach a language model a task from a handful of examples by ICL Activation Alignment (arXiv 2509.22621)."""

__version__ = "0.1.0"


class UsageError(ValueError):
    """A user's mistake: one line that says what is wrong, where, and how to mend it."""
