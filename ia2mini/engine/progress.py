"""The phase that a command is in, out of how many, and how far it is."""

from collections.abc import Callable
from dataclasses import dataclass

from tqdm import tqdm


def silent(label: str, total: int) -> tqdm:
    return tqdm(disable=True)


@dataclass
class Progress:
    """Counts the phases of a command as they begin."""

    bar: Callable[[str, int], tqdm] = silent  # bar(label, total)
    phases: int = 0  # in all; 0: they are not counted
    done: int = 0  # begun or found on disk

    def phase(self, name: str, total: int) -> tqdm:
        """The bar of the next phase."""
        self.done += 1
        if self.phases:
            name = f"{self.done}/{self.phases} {name}"
        return self.bar(name, total)

    def kept(self) -> None:
        """Count a phase whose result is on disk."""
        self.done += 1
