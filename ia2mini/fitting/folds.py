"""Cross-validation of a user's rows: the folds, and the demonstrations of each row."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ..episode import Episode, all_but, seeded, shuffled
from ..tasks import Example

DEMONSTRATION_PARTS = 4  # parts of a fold's training rows, each with its own demonstrations


@dataclass(frozen=True, kw_only=True)
class Fold(Episode):
    """An episode of a user's rows, and the held-out rows that it never sees."""

    test: list[int]  # indices of the held-out rows


def draw_folds(
    rows: list[Example], number_of_folds: int, draw: Callable, seed: int = 0
) -> list[Fold]:
    """Stratified k-fold, grouped by prompt: each part has equal shares of the labels and is held out once.

    All folds train on equally many rows, without dev rows. `draw(rows, generator)`
    gives the demonstrations that are drawn from some rows: for a training row from rows of the same fold
    (`demonstrations_among`), for held-out rows from all of them.
    """
    parts = stratified_parts(rows, number_of_folds, seeded(seed, 0, "folds"))
    train_size = len(rows) - max(map(len, parts))
    folds = []
    for number, test in enumerate(parts):
        rng = seeded(seed, number, "fold")
        others = shuffled(all_but(rows, test), rng)
        train = alternate_labels(others)[:train_size]
        demonstrations = demonstrations_among(train, draw, rng)
        fold = Fold(
            train=train,
            dev=[],
            demonstrations=demonstrations,
            icl=[draw(train, rng)],
            test=test,
        )
        folds.append(fold)
    return folds


def demonstrations_among(
    rows: list[Example], draw: Callable, rng: np.random.Generator
) -> list[list[Example]]:
    """Demonstrations before each of some rows, `draw(other rows, generator)`; they never have the row's own prompt.

    The rows are dealt into `DEMONSTRATION_PARTS` parts. All rows of a part see the same demonstrations, from the other
    parts, so that the teacher reads these once a part.
    """
    parts = min(DEMONSTRATION_PARTS, len({row.prompt for row in rows}))
    by_row: list[list[Example]] = [[] for _ in rows]
    for part in stratified_parts(rows, parts, rng):
        demonstrations = draw(all_but(rows, part), rng)
        for i in part:
            by_row[i] = demonstrations
    return by_row


def stratified_parts(rows: list[Example], parts: int, rng: np.random.Generator) -> list[list[int]]:
    """Indices of all rows in parts with equal shares of each label; rows of one prompt stay together."""
    by_prompt: dict[str, list[int]] = {}
    for i in rng.permutation(len(rows)).tolist():
        by_prompt.setdefault(rows[i].prompt, []).append(i)
    groups = sorted(by_prompt.values(), key=lambda group: rows[group[0]].label or 0)
    return [sum(groups[first::parts], []) for first in range(parts)]


def alternate_labels(rows: list[Example]) -> list[Example]:
    """The rows in an order that takes one of each label in turn."""
    seen: Counter = Counter()
    rounds = []  # how many rows of the same label stand before each
    for row in rows:
        rounds.append(seen[row.label])
        seen[row.label] += 1
    order = sorted(range(len(rows)), key=rounds.__getitem__)
    return [rows[i] for i in order]


def balanced(rows: list[Example], count: int, rng: np.random.Generator) -> list[Example]:
    """Up to `count` rows in random order, each label as equally often as the rows allow."""
    return shuffled(alternate_labels(shuffled(rows, rng))[:count], rng)
