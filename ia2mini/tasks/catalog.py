"""The task catalog: one declarative row a task (protocol section 1), and how a task turns a row of columns into prompt and answer."""

import difflib
import random
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache

import numpy as np

from ia2mini import UsageError

from .answers import parse_boxed, parse_hashes, parse_number, parse_text


@dataclass(frozen=True)
class Example:
    """One row as text: the prompt, the answer right after it and, for a single-token task, the index of the answer in `Task.labels`."""

    prompt: str
    answer: str
    label: int | None = None


class Row(dict):
    """The columns of one row, and where it stands ("file:line"); asking for a column that is not there is a UsageError."""

    def __init__(self, where: str, columns: dict):
        super().__init__(columns)
        self.where = where

    def __missing__(self, column: str):
        raise UsageError(
            f"{self.where}: no column {column!r}; the columns there are {', '.join(map(repr, self)) or 'none'}"
        )

    def text(self, column: str) -> str:
        """The value of a column as text: numbers and booleans as JSON writes them. UsageError for a missing or nested value."""
        value = self[column]
        if isinstance(value, (bool, int, float)):
            return str(value).lower()
        if not isinstance(value, str):
            raise UsageError(
                f"{self.where}: column {column!r} holds {'nothing' if value is None else repr(value)[:60]}, not a text"
            )
        if re.search("[\ud800-\udfff]", value):
            raise UsageError(
                f"{self.where}: column {column!r} holds half a surrogate pair, which is no character; mend the \\ud… escape"
            )
        return value


def placeholders(template: str) -> list[str]:
    """The column names between braces in a template."""
    return re.findall(r"\{([^{}]*)\}", template)


def fill(template: str, row: Row) -> str:
    """A template with every `{column}` replaced by that column's text."""
    return re.sub(r"\{([^{}]*)\}", lambda match: row.text(match[1]), template)


@dataclass(frozen=True)
class Task:
    """A task: where its rows are, which of them count, and how a row reads as prompt and answer.

    Templates name columns in braces. A task with `labels` answers with one token, `labels[i]`, where i is what `known` says of the text
    in column `label` (None drops the row; by default "0" is 0 and so on). A task without labels answers with the text of `answer`.
    """

    name: str
    tag: str  # the paper's name of it
    hub: str | None = None  # dataset id on the hub; None for embedded tasks and own files
    config: str | None = None
    train: str | None = None  # split of the few-shot pool; None: only evaluated on
    eval: str = "test"
    prompt: str = "Question:{question}\nAnswer:"
    answer: str = "{answer}"
    labels: tuple[str, ...] = ()
    label: str = "label"
    known: dict[str, int | None] = field(default_factory=dict, hash=False)
    ood: tuple[str, ...] = ()  # out-of-distribution evaluations
    max_tokens: int = 1
    parse: Callable[[str], str | None] | None = None  # multi-token: answer text -> what is compared
    prepare: Callable[[Row], dict] | None = None  # columns to add to a row
    steps: tuple[str, ...] = (
        "shuffle",
        "filter",
    )  # in order; "split" keeps the last `held` rows for evaluation, "unique" drops repeats
    held: int = 500
    archive: tuple[str, str, str] | None = None  # rows in a zip instead of Parquet: path, sha256, member
    fallback: tuple[
        str, ...
    ] = ()  # another dataset id with the same rows, then its splits, where `hub` has no Parquet branch
    folder: str | None = None  # folder in a local collection, where it is not the hub's name
    files: tuple[str, str] | None = None  # own rows: file of the pool, file of the evaluation

    @property
    def evals(self) -> tuple[str, ...]:
        """Names of the tasks this one is evaluated on, itself first; the others are out of distribution."""
        return (self.name, *self.ood)

    def label_of(self, row: Row) -> int | None:
        """Index of the row's label, or None where the row is not part of the task. UsageError for a label nobody knows."""
        known = self.known or {str(i): i for i in range(len(self.labels))}
        text = row.text(self.label)
        key = text if text in known else text.lower()
        if key not in known:
            raise UsageError(
                f"{row.where}: unknown label {text!r} in column {self.label!r}; known labels: {', '.join(map(repr, known))}"
            )
        return known[key]

    def example(self, row: Row) -> Example:
        """The prompt and the answer of a row. UsageError for a missing column, an empty answer or an unknown label."""
        prompt = fill(self.prompt, row)
        if self.labels:
            label = self.label_of(row)
            return Example(prompt, self.labels[label], label)
        answer = fill(self.answer, row)
        if not answer.strip():
            raise UsageError(f"{row.where}: the answer is empty")
        return Example(prompt, answer)

    def as_text(self) -> "Task":
        """The same task with its label generated as text: for labels that are not single tokens."""
        return replace(self, labels=(), answer=f"{{{self.label}}}", max_tokens=200, parse=parse_text)


def shuffled(n: int) -> np.ndarray:
    """The order in which `datasets`' Dataset.shuffle(seed=42) puts n rows."""
    return np.random.default_rng(42).permutation(n)


def arrange(task: Task, role: str, rows: list[Row]) -> list[Row]:
    """The rows of a role in order, after the task's preparation and steps."""
    if task.prepare:
        rows = [Row(row.where, {**row, **task.prepare(row)}) for row in rows]
    for step in task.steps:
        if step == "shuffle":
            rows = [rows[i] for i in shuffled(len(rows))]
        elif step == "filter":
            rows = [row for row in rows if not task.labels or task.label_of(row) is not None]
        elif step == "unique":
            first = {fill(task.prompt, row): row for row in reversed(rows)}
            rows = [row for row in rows if first[fill(task.prompt, row)] is row]
        else:
            rows = rows[-task.held :] if role == "eval" else rows[: -task.held]
    return rows


WORDS = ("apple", "Friday", "banana", "Saturday", "Thursday", "Sunday", "Wednesday", "Monday")
CHOICES = "Question:{question}\nChoices:\n{choices}\n\nAnswer:"
TWO, FOUR = ("0", "1"), ("0", "1", "2", "3")


def list_choices(choices: list[str]) -> str:
    return "\n".join(f"[{word}]{choice}" for word, choice in zip(WORDS, choices, strict=False))


def prepare_sciq(row: Row) -> dict:
    """The four choices in an order drawn from a generator seeded with the question's text, so it is the same in any file."""
    choices = [row.text(column) for column in ("distractor1", "distractor2", "distractor3", "correct_answer")]
    order = random.Random(row.text("question")).sample(range(4), 4)
    return {"choices": list_choices([choices[i] for i in order]), "label": order.index(3)}


def prepare_qasc(row: Row) -> dict:
    choices = row["choices"].get("text") if isinstance(row["choices"], dict) else None
    if not isinstance(choices, list) or len(choices) != 8:
        raise UsageError(f"{row.where}: column 'choices' must hold a list 'text' of eight choices")
    return {"choices": list_choices(choices)}


def prepare_bbc(row: Row) -> dict:
    """The text cut to 256 characters, then its last space-separated piece dropped."""
    return {"text": " ".join(row.text("text")[:256].split(" ")[:-1])}


PAPER_TASKS = (
    Task(
        "sst2",
        "SST2",
        "stanfordnlp/sst2",
        train="train",
        eval="validation",
        prompt="Text:{sentence}\nLabel:",
        labels=TWO,
        ood=("finsen", "poems"),
    ),
    Task(
        "finsen",
        "FinS",
        "takala/financial_phrasebank",
        "sentences_50agree",
        train="train",
        eval="train",
        prompt="Text:{sentence}\nLabel:",
        labels=TWO,
        known={"0": 0, "1": None, "2": 1},
        ood=("sst2", "poems"),
        steps=("shuffle", "filter", "split"),
        archive=(
            "data/FinancialPhraseBank-v1.0.zip",
            "0e1a06c4900fdae46091d031068601e3773ba067c7cecb5b0da1dcba5ce989a6",
            "Sentences_50Agree.txt",
        ),
    ),
    Task(
        "poems",
        "PoemS",
        "google-research-datasets/poem_sentiment",
        eval="train",
        prompt="Text:{verse_text}\nLabel:",
        labels=TWO,
        known={"0": 0, "1": 1, "2": None, "3": None},
        steps=("filter", "shuffle"),
    ),
    Task(
        "strategytf",
        "STF",
        "wics/strategy-qa",
        train="test",
        eval="test",
        labels=TWO,
        label="answer",
        known={"false": 0, "true": 1},
        steps=("shuffle", "filter", "split", "shuffle"),
        fallback=("ChilleD/StrategyQA", "train", "test"),
    ),
    Task(
        "agnews", "AGN", "fancyzhx/ag_news", train="train", prompt="Text:{text}\nLabel:", labels=FOUR, ood=("bbcnews",)
    ),
    Task(
        "bbcnews",
        "BBCN",
        "SetFit/bbc-news",
        prompt="Text:{text}\nLabel:",
        labels=FOUR,
        known={"0": 3, "1": 2, "2": 1, "3": 0, "4": 0},
        prepare=prepare_bbc,
    ),
    Task(
        "sciq_remap",
        "SciQr",
        "allenai/sciq",
        train="train",
        eval="validation",
        prompt=CHOICES,
        labels=WORDS[:4],
        ood=("qasc_remap",),
        prepare=prepare_sciq,
    ),
    Task(
        "qasc_remap",
        "QASCr",
        "allenai/qasc",
        eval="validation",
        prompt=CHOICES,
        labels=WORDS,
        label="answerKey",
        known={key: i for i, key in enumerate("ABCDEFGH")},
        prepare=prepare_qasc,
    ),
    Task("gsm8k", "GSM8K", "openai/gsm8k", "main", train="train", max_tokens=200, parse=parse_number, ood=("gsm8ks",)),
    Task("gsm8ks", "GSM8Ks", "apple/GSM-Symbolic", "main", max_tokens=200, parse=parse_number),
    Task(
        "hmath_algebra",
        "HMathA",
        "EleutherAI/hendrycks_math",
        "algebra",
        train="train",
        prompt="Question:{problem}\nAnswer:",
        answer="{solution}",
        max_tokens=400,
        parse=parse_boxed,
        folder="math_algebra",
    ),
    Task(
        "sciqa",
        "SciQ",
        "allenai/sciq",
        train="train",
        eval="validation",
        answer="{support}\n#### {correct_answer}",
        max_tokens=200,
        parse=parse_hashes,
    ),
)


@cache
def all_tasks() -> dict[str, Task]:
    """Every task by its name: the paper's twelve, then the embedded ones."""
    from .world import TOY_TASKS

    toys = []
    for toy in TOY_TASKS:
        form = (
            {"prompt": "Text:{text}\nLabel:", "labels": toy.labels}
            if toy.labels
            else {"max_tokens": 200, "parse": parse_number}
        )
        train = "train" if len(toy.evals) > 1 else None
        toys.append(Task(toy.name, toy.name, train=train, eval="eval", ood=toy.evals[1:], steps=(), **form))
    return {task.name: task for task in (*PAPER_TASKS, *toys)}


def find_task(name: str) -> Task:
    """The task of a name. UsageError with the nearest name for one that is not there."""
    tasks = all_tasks()
    if name not in tasks:
        near = difflib.get_close_matches(name.lower(), tasks, 1, 0)[0]
        raise UsageError(f"unknown task {name!r}: did you mean {near!r}? `ia2mini tasks` lists all")
    return tasks[name]
