"""A user's rows in folds: what each fold trains on, which rows it holds out, and the demonstrations before them.

n rows, F folds, S settings of a method (its learning rates), R = F * S runs, C labels.
"""

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
from ..adapters import Adapter
from ..batch import TokenRow
from ..engine.experiment import make_adapter
from ..engine.options import FitOptions
from ..engine.progress import silent
from ..engine.store import NoStore, Store
from ..engine.subject import Subject, max_label_tokens
from ..episode import seeded
from ..generate import STOP
from ..methods import METHODS
from ..tasks import Example, Task
from ..tasks.rows import labels_after_prompt
from ..train import Settings
from .folds import Fold, balanced, draw_folds
from .selection import Selection

LEAST = 4  # prompts that cross-validation needs
ALONE = 10  # up to this many are held out one at a time


@dataclass
class CrossValidation:
    """A user's rows in folds, and everything that training on them and answering their held-out rows needs."""

    subject: Subject
    task: Task
    rows: list[Example]
    options: FitOptions
    unlabelled: list[Example]  # rows without answers: the teacher's are what IA2 learns from
    label_tokens: list[list[int]]  # of each label; of texts none
    max_tokens: int  # of an answer
    adapter: Adapter
    settings: Settings
    rates: tuple[float, ...]  # learning rates
    folds: list[Fold] = field(default_factory=list)
    store: Store = field(default_factory=NoStore)  # from which an interrupted fit goes on
    bar: Callable[[str, int], tqdm] = silent  # bar(label, total)
    remarks: list[str] = field(default_factory=list)  # on unusual rows
    # fold -> its held-out rows with their answers, while candidates are scored (`held_out.true_answers`)
    true_answers: dict[int, list[TokenRow]] = field(default_factory=dict)
    states: Tensor | None = None  # the base's, once a probe has read them (`held_out.base_states`)

    @property
    def stop(self) -> str | None:
        """The text at which a generated answer ends; a turn of a chat ends by its own token."""
        return None if self.options.chat else STOP

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


def make_cross_validation(
    subject: Subject,
    task: Task,
    rows: list[Example],
    options: FitOptions,
    unlabelled: list[Example] | tuple = (),
) -> CrossValidation:
    """Rows in folds. The options are already checked (`check_options`). Raises UsageError for too long rows."""
    label_tokens: list[list[int]] = []
    max_tokens = task.max_tokens
    if task.labels:
        answers = labels_after_prompt(task.prompt, task.labels)
        label_tokens = subject.tokenizer.label_tokens(rows[0].prompt, answers)
        max_tokens = max_label_tokens(label_tokens)
    layers = options.layer_numbers(subject.model.config.num_hidden_layers)
    cv = CrossValidation(
        subject=subject,
        task=task,
        rows=rows,
        options=options,
        unlabelled=list(unlabelled),
        label_tokens=label_tokens,
        max_tokens=max_tokens,
        adapter=make_adapter(subject.model, options),
        settings=Settings(options.batch_size, options.epochs, layers=layers),
        rates=options.rates_for(subject.name, options.adapter),
    )
    cv.folds = make_folds(cv)
    return cv


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


def before_unlabelled(
    cv: CrossValidation, number: int, train: list[Example]
) -> list[list[Example]]:
    """The demonstrations before each row without an answer: some of the training rows of episode `number`."""
    queries = {row.prompt for row in cv.unlabelled}
    others = [row for row in train if row.prompt not in queries]
    rng = seeded(cv.options.seed, number, "unlabelled")
    demonstrations = choose_demonstrations(cv, others or train, rng)
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
