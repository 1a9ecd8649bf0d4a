"""A user's rows in folds: what each fold trains on, which rows it holds out, and the demonstrations before them.

n rows, F folds, S settings of a method (its learning rates), R = F * S runs, C labels.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from itertools import accumulate
from statistics import fmean

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from .. import UsageError
from ..batch import TokenRow
from ..engine.experiment import make_adapter
from ..engine.options import FitOptions
from ..engine.progress import silent
from ..engine.store import NoStore, Store
from ..engine.subject import Subject, max_label_tokens
from ..episode import Episode, all_but, seeded, shuffled
from ..generate import STOP
from ..methods import METHODS
from ..tasks import Example, Task
from ..tasks.rows import labels_after_prompt
from ..train import Settings
from .selection import Selection

LEAST = 4  # prompts that cross-validation needs
ALONE = 10  # up to this many are held out one at a time
DEMONSTRATION_PARTS = 4  # parts of a fold's training rows, each with its own demonstrations


@dataclass(frozen=True, kw_only=True)
class Fold(Episode):
    """An episode of a user's rows, and the held-out rows that it never sees."""

    test: list[int]  # indices of the held-out rows


@dataclass
class CrossValidation:
    """A user's rows in folds, and everything that training on them and answering their held-out rows needs."""

    subject: Subject
    task: Task
    rows: list[Example]
    options: FitOptions  # already checked (`check_options`)
    # rows without answers: the teacher's are what IA2 learns from
    unlabelled: list[Example] = field(default_factory=list)
    store: Store = field(default_factory=NoStore)  # from which an interrupted fit goes on
    bar: Callable[[str, int], tqdm] = silent  # bar(label, total)
    remarks: list[str] = field(default_factory=list)  # on unusual rows
    # fold -> its held-out rows with their answers, while candidates are scored (`held_out.true_answers`)
    true_answers: dict[int, list[TokenRow]] = field(default_factory=dict)
    states: Tensor | None = None  # the base's, once a probe has read them (`held_out.base_states`)

    def __post_init__(self):
        """Draw the folds. Raises UsageError for too long rows."""
        model = self.subject.model
        options = self.options
        self.adapter = make_adapter(model, options)
        self.rates = options.rates_for(self.subject.name, options.adapter)  # learning rates
        layers = options.layer_numbers(model.config.num_hidden_layers)
        self.settings = Settings(options.batch_size, options.epochs, layers=layers)
        self.label_tokens: list[list[int]] = []  # of each label; of texts none
        self.max_tokens = self.task.max_tokens  # of an answer
        if self.task.labels:
            answers = labels_after_prompt(self.task.prompt, self.task.labels)
            prompt = self.rows[0].prompt
            self.label_tokens = self.subject.tokenizer.label_tokens(prompt, answers)
            self.max_tokens = max_label_tokens(self.label_tokens)
        self.folds = make_folds(self)

    @property
    def stop(self) -> str | None:
        return stop_text(self.options)

    @property
    def gold(self) -> Tensor:
        """Index of each row's label, [n]; 0 for texts."""
        return torch.tensor([row.label or 0 for row in self.rows])

    @property
    def test_rows(self) -> list[list[int]]:
        """Indices of the rows that each fold holds out."""
        return [fold.test for fold in self.folds]

    @property
    def selection(self) -> Selection:
        return Selection(self.test_rows, self.gold, self.options.temperature)

    @cached_property
    def longest_prompt(self) -> str:
        prompts = [row.prompt for row in self.rows + self.unlabelled]
        return max(prompts, key=self.count_tokens)

    def count_tokens(self, text: str) -> int:
        return len(self.subject.tokenizer.encode(text))

    def demonstration_tokens(self, example: Example) -> int:
        """Number of tokens of a row with its answer, as a demonstration before a query."""
        return self.count_tokens(f"{example.prompt}{example.answer}\n\n")


def stop_text(options: FitOptions) -> str | None:
    """The text at which a generated answer ends; a turn of a chat ends by its own token."""
    return None if options.chat else STOP


def candidate_names(task: Task, options: FitOptions) -> list[str]:
    """The names of all candidates, in the order of the report."""
    probe = ["probe"] if task.labels else []
    return ["base", "icl", *probe, *options.methods]


def check_options(options: FitOptions, task: Task) -> None:
    """Raises UsageError for methods that are unknown, missing or useless, and where --ship names no candidate.

    It needs no model: mistakes show before one is loaded.
    """
    methods = options.methods
    unknown = [name for name in methods if name not in METHODS]
    if unknown:
        known = ", ".join(METHODS)
        raise UsageError(f"--methods {unknown[0]}: unknown; what can be tried is {known}")
    if not methods:
        raise UsageError("--methods: give at least one")
    if options.context and "icl-sft" in methods:
        given = "with the context in its prompt the model gives these answers already"
        raise UsageError(f"--methods icl-sft: {given}; leave it out")
    if options.balance and not task.labels:
        raise UsageError("--balance: weighs labels, and these answers are text; leave it out")
    may_ship = candidate_names(task, options)[1:]
    if options.ship and options.ship not in may_ship:
        tried = ", ".join(may_ship)
        raise UsageError(f"--ship {options.ship}: is not tried; what is tried here is {tried}")


def check_number(prompts: list[str]) -> None:
    """Raises UsageError for too few different prompts."""
    different = len(set(prompts))
    if different < LEAST:
        needed = f"cross-validation needs at least {LEAST}; add rows"
        raise UsageError(f"{different} rows with different prompts: {needed}")


def make_folds(cv: CrossValidation) -> list[Fold]:
    """Folds with equal shares of each label. Up to `ALONE` prompts are held out one at a time."""
    parts = len({row.prompt for row in cv.rows})
    if parts > ALONE:
        parts = min(cv.options.folds, parts)
    draw = partial(choose_demonstrations, cv)
    folds = []
    for number, fold in enumerate(draw_folds(cv.rows, parts, draw, cv.options.seed)):
        demonstrations = fold.demonstrations + before_unlabelled(cv, number, fold.train)
        folds.append(replace(fold, unlabelled=cv.unlabelled, demonstrations=demonstrations))
    return folds


def episode_of_all_rows(cv: CrossValidation) -> Episode:
    """What trains the final adapter."""
    number = len(cv.folds)  # draws that no fold has made
    draw = partial(choose_demonstrations, cv)
    rng = seeded(cv.options.seed, number, "final")
    demonstrations = demonstrations_among(cv.rows, draw, rng)
    demonstrations += before_unlabelled(cv, number, cv.rows)
    return Episode(cv.rows, [], demonstrations, icl=[], unlabelled=cv.unlabelled)


def before_unlabelled(cv: CrossValidation, number: int, rows: list[Example]) -> list[list[Example]]:
    """The demonstrations before each row without an answer: some of the training rows of episode `number`."""
    if not cv.unlabelled:
        return []
    queries = {row.prompt for row in cv.unlabelled}
    others = [row for row in rows if row.prompt not in queries]
    rng = seeded(cv.options.seed, number, "unlabelled")
    demonstrations = choose_demonstrations(cv, others or rows, rng)
    return [demonstrations] * len(cv.unlabelled)


def choose_demonstrations(
    cv: CrossValidation, rows: list[Example], rng: np.random.Generator
) -> list[Example]:
    """What the teacher sees before a query: some of `rows`, or the context. Raises UsageError for too long rows."""
    if cv.options.context:
        return [Example(cv.options.context, "")]
    return those_that_fit(cv, balanced(rows, cv.options.demonstrations, rng))


def those_that_fit(cv: CrossValidation, demonstrations: list[Example]) -> list[Example]:
    """As many of the first demonstrations as fit into the model's context with the longest row and its answer."""
    longest = cv.longest_prompt
    needed = cv.count_tokens(longest) + cv.max_tokens - 1
    cv.subject.check_room(longest, needed)
    room = cv.subject.context_length - needed
    totals = accumulate(map(cv.demonstration_tokens, demonstrations))
    return [example for example, total in zip(demonstrations, totals) if total <= room]


def mean_tokens(cv: CrossValidation) -> dict[str, float]:
    """Mean tokens of a row's prompt: alone ("query"), and with demonstrations ("icl")."""
    query = fmean(cv.count_tokens(row.prompt) for row in cv.rows)
    demonstrations = fmean(sum(map(cv.demonstration_tokens, fold.icl[0])) for fold in cv.folds)
    return {"query": query, "icl": query + demonstrations}


def draw_folds(rows: list[Example], count: int, draw: Callable, seed: int = 0) -> list[Fold]:
    """Stratified k-fold, grouped by prompt: each part has equal shares of the labels and is held out once.

    All folds train on equally many rows, without dev rows. `draw(rows, generator)`
    gives the demonstrations that are drawn from some rows: for a training row from rows of the same fold
    (`demonstrations_among`), for held-out rows from all of them.
    """
    parts = stratified_parts(rows, count, seeded(seed, 0, "folds"))
    train_size = len(rows) - max(map(len, parts))
    folds = []
    for number, test in enumerate(parts):
        rng = seeded(seed, number, "fold")
        others = shuffled(all_but(rows, test), rng)
        train = alternate_labels(others)[:train_size]
        shown = demonstrations_among(train, draw, rng)
        fold = Fold(train=train, dev=[], demonstrations=shown, icl=[draw(train, rng)], test=test)
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
