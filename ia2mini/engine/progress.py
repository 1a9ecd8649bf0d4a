"""The phase that a command is in, out of how many, and how far it is."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import click

from ..scale import ranks

if TYPE_CHECKING:  # it takes a tenth of a second to import
    from tqdm import tqdm

MINUTE = 60


class Lines:
    """Where a progress bar is written if stderr is not a terminal: one line each time."""

    def write(self, text: str) -> None:
        if text.strip():
            click.echo(text.strip(), err=True)

    def flush(self) -> None:
        pass


def progress(label: str, total: int) -> "tqdm":
    """A progress bar on stderr with the remaining time. If stderr is no terminal: one line, then one a minute.

    The time comes before the bar, so a narrow terminal cuts the bar and not the time.
    """
    if not ranks.chief:
        return silent(label, total)
    from tqdm import tqdm

    known = "{desc} {percentage:3.0f}%, {remaining} left, {elapsed} gone |{bar:10}|{postfix}"
    bar = partial(tqdm, total=total, leave=False, bar_format=known)
    if sys.stderr.isatty():
        return bar(desc=f"phase {label:<32}")
    click.echo(f"phase {label}", err=True)
    slow = {"delay": MINUTE, "mininterval": MINUTE, "miniters": 1, "ascii": True}
    return bar(desc=f"phase {label}", file=Lines(), **slow)


def silent(label: str, total: int) -> "tqdm":
    """In place of `progress`, where nothing is to be shown."""
    from tqdm import tqdm

    return tqdm(disable=True)


@dataclass
class Progress:
    """Counts the phases of a command as they begin."""

    bar: Callable[[str, int], "tqdm"] = silent  # bar(label, total)
    phases: int = 0  # in all; 0: they are not counted
    done: int = 0  # begun or found on disk

    def phase(self, name: str, total: int) -> "tqdm":
        """The bar of the next phase."""
        self.done += 1
        if self.phases:
            name = f"{self.done}/{self.phases} {name}"
        return self.bar(name, total)

    def kept(self) -> None:
        """Count a phase whose result is on disk."""
        self.done += 1
