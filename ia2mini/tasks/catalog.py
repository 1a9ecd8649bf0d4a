"""The task catalog: one entry per task (`paper.json`; protocol section 1), and how rows become prompts and answers."""

import difflib
import json
import random
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import numpy as np

from ia2mini import UsageError

from .rows import Row, blank_of, fill, find_label, missing_part, prompt_of
from .world import TOY_TASKS


@dataclass(frozen=True)
class Example:
    """One row as text: the prompt, the answer right after it and, where there are labels, its index in them."""

    prompt: str
    answer: str
    label: int | None = None


@dataclass(frozen=True)
class Task:
    """A task: where its rows are, which of them count, and how a row becomes prompt and answer.

    Templates name columns in braces. A task with `labels` answers with one of them, `labels[i]`, where i is what
    `label_index` has for the text in `answer_column` (None drops the row; by default "0" is 0 and so on). A task
    without labels answers with the text of `answer`.
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
    answer_column: str = "label"
    label_index: dict[str, int | None] = field(default_factory=dict, hash=False)
    ood: tuple[str, ...] = ()  # out-of-distribution evaluations
    max_tokens: int = 1  # of an answer in evaluation
    teacher_tokens: int | None = None  # of the teacher's responses to training rows; None: as many
    parser: str | None = None  # of a text: answer -> what is compared, one of answers.PARSERS
    prepare: str | None = None  # adds columns to a row, one of PREPARE
    # in this order: "shuffle"; "filter" drops rows without a label; "complete" drops rows without prompt or answer;
    # "unique" drops repeated prompts; "split" divides the rows into pool and evaluation
    steps: tuple[str, ...] = ("shuffle", "filter")
    held_out: int = 500  # rows of the evaluation after "split": the last ones
    # rows in a zip instead of Parquet: path, sha256, member
    archive: tuple[str, str, str] | None = None
    # another dataset id with the same rows, then its splits, if `hub` has no Parquet
    fallback: tuple[str, ...] = ()
    folder: str | None = None  # folder in a local collection, where it is not the hub's name
    files: tuple[str, str] | None = None  # own rows: file of the pool, file of the evaluation
    remarks: tuple[str, ...] = ()  # own rows: sentences on how they were read

    @property
    def evals(self) -> tuple[str, ...]:
        """The names of the tasks to evaluate on: this one first, then those out of distribution."""
        return (self.name, *self.ood)

    @property
    def blank(self) -> str:
        return blank_of(self.prompt)

    def prompt_of(self, row: Row) -> str:
        """The prompt of a row. UsageError for a missing column."""
        return prompt_of(self.prompt, row)

    def label_of(self, row: Row) -> int | None:
        """Index of the row's label, or None where the row is not part of the task. UsageError for an unknown label."""
        indices = self.label_index or {str(i): i for i in range(len(self.labels))}
        text = row.text(self.answer_column)
        key = find_label(text, indices) or find_label(text.lower(), indices)
        if key is None:
            unknown = f"unknown label {text!r} in column {self.answer_column!r}"
            raise UsageError(
                f"{row.where}: {unknown}; known labels: {', '.join(map(repr, indices))}"
            )
        return indices[key]

    def example(self, row: Row) -> Example:
        """The prompt and the answer of a row. UsageError for a missing column, an empty answer or an unknown label."""
        prompt = self.prompt_of(row)
        if self.labels:
            label = self.label_of(row)
            return Example(prompt, self.blank + self.labels[label], label)
        answer = self.blank + fill(self.answer, row)
        if not answer.strip():
            raise UsageError(f"{row.where}: the answer is empty")
        return Example(prompt, answer)


def arrange(task: Task, role: str, rows: list[Row]) -> list[Row]:
    """The rows of a role in order, after the task's preparation and steps."""
    if task.prepare:
        rows = [Row(row.where, {**row, **PREPARE[task.prepare](row)}) for row in rows]
    for step in task.steps:
        if step == "shuffle":
            # `datasets`' shuffle(seed=42)
            rows = [rows[i] for i in np.random.default_rng(42).permutation(len(rows))]
        elif step == "filter":
            rows = [row for row in rows if not task.labels or task.label_of(row) is not None]
        elif step == "complete":
            rows = [row for row in rows if not missing_part(row, task.prompt, task.answer_column)]
        elif step == "unique":
            first = {fill(task.prompt, row): row for row in reversed(rows)}
            rows = [row for row in rows if first[fill(task.prompt, row)] is row]
        else:
            rows = rows[-task.held_out :] if role == "eval" else rows[: -task.held_out]
    return rows


def list_choices(choices: list[str]) -> str:
    words = ("apple", "Friday", "banana", "Saturday", "Thursday", "Sunday", "Wednesday", "Monday")
    return "\n".join(f"[{word}]{choice}" for word, choice in zip(words, choices, strict=False))


def shuffle_choices(row: Row) -> dict:
    """SciQ's four choices in an order drawn from a generator seeded with the question's text: the same in any file."""
    columns = ("distractor1", "distractor2", "distractor3", "correct_answer")
    choices = [row.text(column) for column in columns]
    order = random.Random(row.text("question")).sample(range(4), 4)
    return {"choices": list_choices([choices[i] for i in order]), "label": order.index(3)}


def eight_choices(row: Row) -> dict:
    """QASC's choices in their own order."""
    choices = row["choices"].get("text") if isinstance(row["choices"], dict) else None
    if not isinstance(choices, list) or len(choices) != 8:
        raise UsageError(f"{row.where}: column 'choices' must hold a list 'text' of eight choices")
    return {"choices": list_choices(choices)}


def cut_text(row: Row) -> dict:
    """The text cut to 256 characters, then its last space-separated piece dropped."""
    return {"text": " ".join(row.text("text")[:256].split(" ")[:-1])}


PREPARE = {prepare.__name__: prepare for prepare in (shuffle_choices, eight_choices, cut_text)}


@cache
def all_tasks() -> dict[str, Task]:
    """Every task by its name: the paper's twelve (of `paper.json`), then the embedded ones."""
    tasks = {}
    paper = Path(__file__).with_name("paper.json").read_text(encoding="utf-8")
    for name, fields in json.loads(paper).items():
        values: dict = {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}
        tasks[name] = Task(name, **values)
    for toy in TOY_TASKS:
        classification = {"prompt": "Text:{text}\nLabel:", "labels": toy.labels}
        fields = classification if toy.labels else {"max_tokens": 200, "parser": "number"}
        train = "train" if len(toy.evals) > 1 else None
        tasks[toy.name] = Task(
            toy.name, toy.name, train=train, eval="eval", ood=toy.evals[1:], steps=(), **fields
        )
    return tasks


def find_task(name: str) -> Task:
    """The task with this name. Raises UsageError, with the nearest name, if there is none."""
    tasks = all_tasks()
    if name not in tasks:
        near = difflib.get_close_matches(name.lower(), tasks, 1, 0)[0]
        raise UsageError(f"unknown task {name!r}: did you mean {near!r}? `ia2mini tasks` lists all")
    return tasks[name]
