"""A few-shot set: which rows train, which rows decide when to stop, and which demonstrations each sees."""

from dataclasses import dataclass, field
from zlib import crc32

import numpy as np

from . import UsageError
from .tasks import Example
from .tasks.chat import ChatPrompt


@dataclass(frozen=True)
class Episode:
    """One set of the protocol (section 2)."""

    train: list[Example]  # N rows
    dev: list[Example]  # max(1, N/2) rows, at most 48
    # for each row of train + dev + unlabelled, the demonstrations that the teacher sees before it
    demonstrations: list[list[Example]]
    # demonstrations before each evaluation row: a list for each, or a single one for all
    icl: list[list[Example]]
    # rows without answers: the teacher answers them, and IA2 trains on them, too
    unlabelled: list[Example] = field(default_factory=list)


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
