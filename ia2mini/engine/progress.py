"""The phase that a command is in, out of how many, and how far it is."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from tqdm import tqdm


def silent(label: str, total: int) -> tqdm:
    return tqdm(disable=True)


@dataclass
class Progress:
    """Counts the phases of a command as they begin."""

    bar: Callable = silent  # bar(label, total) -> context manager yielding a tqdm
    phases: int = 0  # in all
    done: int = 0  # begun or found on disk

    @contextmanager
    def phase(self, name: str, total: int) -> Iterator[tqdm]:
        self.done += 1
        with self.bar(f"{self.done}/{self.phases} {name}", total) as bar:
            yield bar

    def kept(self) -> None:
        """Count a phase whose result is on disk."""
        self.done += 1
