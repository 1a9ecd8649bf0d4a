"""A few-shot set: which rows train, which rows decide when to stop, and which demonstrations each sees."""

from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count
from zlib import crc32

import numpy as np

from . import UsageError
from .tasks import Example
from .tasks.chat import ChatPrompt

GROUPS = 4  # parts of a fold's training rows, each with its own demonstrations


@dataclass(frozen=True)
class Episode:
    """One set of the protocol (section 2)."""

    train: list[Example]  # N rows
    dev: list[Example]  # max(1, N/2) rows, at most 48
    # for each row of train + dev, the N - 1 demonstrations that the teacher sees before it
    demonstrations: list[list[Example]]
    icl: list[list[Example]]  # demonstrations before each evaluation row; one list: for all
    # more rows, which the teacher answers …
    unlabelled: list[Example] = field(default_factory=list)
    # … with these before each
    more_demonstrations: list[list[Example]] = field(default_factory=list)


def seeded(seed: int, number: int, purpose: str) -> np.random.Generator:
    """The generator of one purpose in one set: no draw depends on any other."""
    return np.random.default_rng([seed, number, crc32(purpose.encode())])


def draw_episode(
    pool: list[Example],
    n: int,
    number: int = 0,
    seed: int = 0,
    pool_demos: int = 0,
    reuse: bool = False,
) -> Episode:
    """Set `number` of size `n`: the pool shuffled with the set's seed, N rows to train, the next ones as dev.

    Two choices of the released scripts: with `pool_demos`, that many evaluation rows have each N - 1 demonstrations of
    their own, drawn from the rest of the pool; with `reuse`, dev row j has training row j's demonstrations.
    Raises UsageError for N too small or large. The next step is `teach`.
    """
    dev_size = min(max(1, n // 2), 48)
    if n < 2:
        raise UsageError(
            f"--n {n}: with fewer than 2 rows no demonstration is left for the teacher; use --n 2 or more"
        )
    if n + dev_size > len(pool):
        needs = f"needs {n} training and {dev_size} dev rows, but the pool holds only {len(pool)}"
        raise UsageError(f"--n {n}: {needs}; use a smaller --n")
    order = np.arange(len(pool))
    # the released scripts' order when seed is 0
    np.random.RandomState(seed * 1000 + number).shuffle(order)
    mixed = [pool[i] for i in order]
    train = mixed[:n]
    dev = mixed[n : n + dev_size]
    rest = mixed[n + dev_size :]
    rng = seeded(seed, number, "demonstrations")
    demonstrations = []
    for i in range(n):
        demonstrations.append(shuffled(all_but(train, [i]), rng))
    for j in range(dev_size):
        if reuse:
            demonstrations.append(demonstrations[j % n])
        else:
            demonstrations.append(shuffled(train, rng)[: n - 1])
    icl = [shuffled(train, seeded(seed, number, "icl"))]
    if pool_demos:
        if len(rest) < n - 1:
            needs = f"demonstrations from the pool need {n - 1} rows besides the set"
            raise UsageError(f"--n {n}: {needs}, but it has only {len(rest)}")
        rng = seeded(seed, number, "icl from the pool")
        icl = []
        for _ in range(pool_demos):
            drawn = rng.choice(len(rest), n - 1, replace=False)
            icl.append([rest[i] for i in drawn])
    return Episode(train, dev, demonstrations, icl)


@dataclass(frozen=True, kw_only=True)
class Fold(Episode):
    """An episode of one's own rows, and which of them it never sees."""

    test: list[int]  # indices of the held-out rows


def draw_folds(rows: list[Example], folds: int, choose: Callable, seed: int = 0) -> list[Fold]:
    """Cross-validation: every row is held out once, in `folds` parts with equal shares of each label.

    Rows of one prompt stay together. All folds train on equally many rows, without dev rows. `choose(rows, generator)`
    gives the demonstrations that are drawn from some rows: for a training row from rows of the same fold
    (`among_themselves`), for held-out rows from all of them.
    """
    parts = deal(rows, folds, seeded(seed, 0, "folds"))
    trained_on = len(rows) - max(map(len, parts))
    found = []
    for number, test in enumerate(parts):
        rng = seeded(seed, number, "fold")
        others = shuffled(all_but(rows, test), rng)
        train = in_turn(others)[:trained_on]
        shown = among_themselves(train, choose, rng)
        found.append(Fold(train, [], shown, [choose(train, rng)], test=test))
    return found


def among_themselves(
    rows: list[Example], choose: Callable, rng: np.random.Generator
) -> list[list[Example]]:
    """Demonstrations before each of some rows, `choose(other rows, generator)`; they never have the row's own prompt.

    The rows are dealt into `GROUPS` parts. All rows of a part see the same demonstrations from the other parts, so that
    the teacher reads these once a part.
    """
    parts = min(GROUPS, len({row.prompt for row in rows}))
    shown: list[list[Example]] = [[] for _ in rows]
    for part in deal(rows, parts, rng):
        demonstrations = choose(all_but(rows, part), rng)
        for i in part:
            shown[i] = demonstrations
    return shown


def deal(rows: list[Example], parts: int, rng: np.random.Generator) -> list[list[int]]:
    """Indices of all rows in parts with equal shares of each label; rows of one prompt stay together."""
    by_prompt: dict[str, list[int]] = {}
    for i in rng.permutation(len(rows)).tolist():
        by_prompt.setdefault(rows[i].prompt, []).append(i)

    def label_of(group: list[int]) -> tuple[bool, int]:
        label = rows[group[0]].label
        return label is None, label or 0

    groups = sorted(by_prompt.values(), key=label_of)
    return [sum(groups[first::parts], []) for first in range(parts)]


def in_turn(rows: list[Example]) -> list[Example]:
    """The rows in an order that takes one of each label in turn."""
    rounds: dict = defaultdict(count)  # label -> 0 for its first row, 1 for the next …
    return sorted(rows, key=lambda row: next(rounds[row.label]))


def balanced(rows: list[Example], count: int, rng: np.random.Generator) -> list[Example]:
    """Up to `count` rows in random order, each label as equally often as the rows allow."""
    labels = len({row.label for row in rows})
    seen: Counter = Counter()
    some = []
    for i in rng.permutation(len(rows)):  # of many rows only the first of each label are looked at
        row = rows[i]
        if seen[row.label] >= count:
            continue
        some.append(row)
        seen[row.label] += 1
        fewest = min(seen.values())
        if len(seen) == labels and labels * fewest >= count:
            break
    return shuffled(in_turn(some)[:count], rng)


def all_but(rows: list[Example], places: list[int]) -> list[Example]:
    """All rows but those at some places."""
    left_out = set(places)
    return [row for i, row in enumerate(rows) if i not in left_out]


def shuffled(rows: list[Example], rng: np.random.Generator) -> list[Example]:
    return [rows[i] for i in rng.permutation(len(rows))]


def with_demonstrations(demonstrations: list[Example], prompt: str) -> str:
    """The prompt of the protocol: each demonstration's prompt and answer, then the query's prompt, blank lines between.

    A `ChatPrompt` has them as earlier turns.
    """
    if isinstance(prompt, ChatPrompt):
        return prompt.after(demonstrations)
    solved = [demonstration.prompt + demonstration.answer for demonstration in demonstrations]
    return "\n\n".join([*solved, prompt])
