"""A fitted adapter in use: answers to new rows with probabilities, one by one or as scikit-learn gives them."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import groupby
from operator import attrgetter
from pathlib import Path
from typing import NamedTuple

import numpy as np
from torch import Tensor

from .. import UsageError
from ..adapters import Adapter, adapted
from ..engine.peft import read_adapter
from ..engine.subject import Subject, open_subject
from ..episode import with_demonstrations
from ..generate import Decoding
from ..labels import Scoring, label_scores
from ..methods import BEHIND_DEMONSTRATIONS
from ..models.taps import device_of
from ..prefix import share_prefix
from ..scale.decode import fast_decoding
from ..scoring import answer_texts, last_states
from ..tasks import Example, same_answer
from ..tasks.chat import ChatTemplate
from ..tasks.own import true_answer
from ..tasks.rows import (
    Row,
    blank_of,
    blocks,
    each_row,
    only_column,
    prompt_of,
    renamed,
    spoken,
)
from ..tasks.turns import ALL_TURNS, open_turns
from . import folder as folders
from .probe import Probe, read_probe
from .spec import FOREIGN, check_given, read_spec

ADDED = ("answer", "abstained", "confidence", "probabilities")  # what a row's answer is called


@dataclass
class Predictor:
    """The base model under one adapter (none: the base itself), with what it needs to answer rows.

    Rows are dicts of columns, texts for the template's only column, or a pandas DataFrame.
    """

    subject: Subject
    adapter: Adapter | None
    theta: Tensor | None  # [1, M]
    # template, labels, max_tokens, stop, temperature, confidences, demonstrations, method, report, …
    spec: dict
    report: dict = field(default_factory=dict)
    probe: Probe | None = None  # answers in the place of the model's head

    def __post_init__(self):
        self.chat = str
        if self.spec["chat"]:
            conversations = self.spec["template"] == ALL_TURNS
            self.chat = ChatTemplate(self.subject.folder, self.subject.tokenizer, conversations)
            self.subject = replace(self.subject, tokenizer=self.chat.tokenizer)

    def student(self, wanted: bool = True) -> AbstractContextManager:
        """The model under the adapter, if there is one and it is wanted."""
        if wanted and self.adapter:
            return adapted(self.subject.model, self.adapter, self.theta)
        return nullcontext(self.subject.model)

    @property
    def classes_(self) -> np.ndarray:
        """The labels [C], in the order of the columns of `predict_proba`."""
        if not self.spec["labels"]:
            raise AttributeError("it answers with text: there are no classes")
        return np.array(self.spec["labels"], dtype=object)

    def predict(self, rows, icl: bool = False, coverage: float | None = None) -> np.ndarray:
        """The answer to each row, [n] texts; with `coverage` None where it abstains. Raises UsageError.

        `icl` and `coverage` as in `answer_rows`.
        """
        found = [row["answer"] for row in self.answer_rows(rows, icl, coverage)]
        return np.array(found, dtype=object)

    def predict_proba(self, rows, icl: bool = False) -> np.ndarray:
        """The probability of each label among them, [n, C] float64, columns as `classes_`. Raises UsageError."""
        labels = self.spec["labels"]
        if not labels:
            raise UsageError("it answers with text, not with labels, and has no probabilities")
        found = []
        for _, said in self.answers(rows, icl):
            found.append([said["probabilities"][label] for label in labels])
        return np.array(found, dtype=np.float64).reshape(-1, len(labels))

    def score(self, rows, labels, icl: bool = False) -> float:
        """The share of rows whose answer is the true one in `labels`. Raises UsageError, also for an unknown label."""
        said = self.predict(rows, icl)
        true = []
        for number, label in enumerate(labels, 1):
            value = label.item() if isinstance(label, np.generic) else label
            row = Row(f"label {number}", {"label": value})
            true.append(true_answer(row, "label", self.spec["labels"]))
        if len(said) != len(true) or not true:
            raise UsageError(
                f"{len(said)} rows and {len(true)} labels: give one label for each row"
            )
        return float(np.mean([self.is_right(*pair) for pair in zip(said, true)]))

    def is_right(self, said: str, true: str) -> bool:
        """Whether an answer is the true one: the same label, or a text that is read as the same."""
        if self.spec["labels"]:
            return said == true
        return same_answer(self.spec["parser"], said, true)

    def answer_rows(
        self,
        rows,
        icl: bool = False,
        coverage: float | None = None,
        wrong: Callable | None = None,
    ) -> Iterator[dict]:
        """Each row with its answer added: `answer`, `confidence` and, of labels, `probabilities`; lazily, in order.

        A column of the row's own that is called so becomes `row_answer` and so on. None in place of a row says that the
        next has yet to come: what has come is answered first.
        `icl`: the base with demonstrations instead, as always where these were shipped. `coverage`: the least certain
        rows get the answer None, by the threshold above which that share of the held-out rows was. A row that cannot be
        answered is a UsageError, which `wrong`, where given, is called with instead.
        """
        for row, said in self.outcomes(rows, icl, coverage):
            if not isinstance(said, UsageError):
                yield renamed(row, ADDED) | said
            elif wrong is None:
                raise said
            else:
                wrong(said)

    def outcomes(
        self, rows, icl: bool = False, coverage: float | None = None
    ) -> Iterator[tuple[Row, dict | UsageError]]:
        """Every row and what `answer_rows` adds to it, or the UsageError for which it cannot be answered."""
        if coverage is not None and icl and self.spec["method"] != "icl":
            known = "the held-out confidences are those of what was shipped"
            raise UsageError(f"--coverage with --icl: {known}; leave one of the two out")
        threshold = self.threshold(coverage)
        for row, said in self.each_answer(rows, icl):
            if isinstance(said, dict):
                said.pop("log_probabilities", None)
                if said["confidence"] < threshold:
                    abstained = said.pop("answer")
                    said = {"answer": None, "abstained": abstained, **said}
            yield row, said

    def answers(self, rows, icl: bool = False) -> Iterator[tuple[Row, dict]]:
        """Each row and what is said to it, of labels also the `log_probabilities` among them. Raises UsageError."""
        for row, said in self.each_answer(rows, icl):
            if isinstance(said, UsageError):
                raise said
            yield row, said

    def each_answer(self, rows, icl: bool) -> Iterator[tuple[Row, dict | UsageError]]:
        """As `answers`, with the UsageError of a row that cannot be answered in its place."""
        shown = self.shown() if icl or self.spec["method"] in BEHIND_DEMONSTRATIONS else []
        column = only_column(self.spec["template"])
        for some in blocks(each_row(rows, column)):
            found: list = list(some)  # in place of each row what is said to it
            asked = []
            for place, row in enumerate(some):
                try:
                    if isinstance(row, Row):
                        asked.append(self.question(row, shown, place))
                except UsageError as error:
                    found[place] = error
            for labels, group in groupby(asked, attrgetter("labels")):
                alike = list(group)
                prompts = [question.prompt for question in alike]
                for question, said in zip(alike, self.answer(prompts, shown, labels, icl)):
                    found[question.place] = said
            for row, said in zip(some, found):
                yield row if isinstance(row, Row) else Row("", {}), said

    def shown(self) -> list[Example]:
        """The demonstrations, or the context, that stand before every row where they are asked for."""
        spec = self.spec
        if not spec["demonstrations"]:
            raise UsageError("--icl: this adapter keeps no demonstrations")
        asked = str if spec["context"] else self.chat
        return [Example(asked(e["prompt"]), e["answer"]) for e in spec["demonstrations"]]

    def question(self, row: Row, shown: list[Example], place: int = 0) -> "Question":
        """What a row asks. Raises UsageError for a missing column, and where it is longer than the model reads."""
        template = self.spec["template"]
        prompt = self.chat(prompt_of(template, open_turns(row, template)))
        tokens = len(self.subject.tokenizer.encode(with_demonstrations(shown, prompt)))
        try:
            labels = self.label_tokens(prompt)
        except UsageError as error:
            raise UsageError(f"{row.where}: {error}") from None
        answer = max(map(len, labels)) if labels else self.spec["max_tokens"]
        # the answer's last token is not read
        if 0 < tokens and tokens + answer - 1 <= self.subject.reads:
            return Question(place, prompt, labels)
        said = [f"its prompt{' with demonstrations' if shown else ''} has {tokens} tokens"]
        if answer > 1:
            said.append(f"its answer may have {answer}")
        raise UsageError(
            f"{row.where}: {', '.join(said)}; the model reads 1 to {self.subject.reads}"
        )

    def label_tokens(self, prompt: str) -> list[list[int]]:
        """The tokens of every label: as they were fitted, or of a strange adapter as they stand behind this prompt."""
        if "example" in self.spec:
            return self.fitted_label_tokens
        if not self.spec["labels"]:
            return []
        return self.behind(prompt)

    @cached_property
    def fitted_label_tokens(self) -> list[list[int]]:
        if not self.spec["labels"]:
            return []
        return self.behind(self.chat(self.spec["example"]))

    def spoken(self) -> list[str]:
        """The labels as they stand behind a prompt: with the blank that the template ends with."""
        return list(spoken(self.spec["template"], self.spec["labels"]))

    def behind(self, prompt: str) -> list[list[int]]:
        """The tokens of every label behind a prompt; a blank at the template's end belongs to the label."""
        return self.subject.tokenizer.label_tokens(prompt, tuple(self.spoken()))

    def threshold(self, coverage: float | None) -> float:
        """The confidence that the share `coverage` of held-out rows reaches (split conformal: of n + 1 rows)."""
        if coverage is None:
            return 0.0
        if not 0 < coverage <= 1:
            raise UsageError(f"--coverage {coverage:g}: a share of the rows, above 0 and at most 1")
        held = sorted(self.spec["confidences"])
        if not held:
            raise UsageError(
                "--coverage needs the held-out confidences of `ia2mini fit`; this adapter has none"
            )
        below = min(len(held), int(np.floor((len(held) + 1) * (1 - coverage) + 1e-9)))
        return held[below - 1] if below else 0.0

    def answer(
        self, prompts: list[str], shown: list[Example], labels: list[list[int]], icl: bool = False
    ) -> list[dict]:
        """Answers to prompts after the demonstrations `shown`: the adapted model's or, with `icl`, the base's."""
        tokenizer = self.subject.tokenizer
        with self.student(not icl) as student:
            if shown:
                student, ids = share_prefix(student, tokenizer, [shown], prompts)
            else:
                ids = tokenizer.encode_all(prompts)
            if labels and self.probe is not None and not shown:
                found = self.shares(self.probe.log_probabilities(last_states(student, ids)))
            elif labels:
                how = Scoring(ends=tokenizer.eos_ids)
                scored = label_scores(student, ids, labels, how)
                found = self.shares(scored.log_probabilities[0])
            else:
                found = self.answer_text(student, ids)
        if any(np.isnan(answer["confidence"]) for answer in found):
            raise UsageError(
                "the model computes NaN: weights of model or adapter are too large; try --dtype float32"
            )
        return found

    def shares(self, scores: Tensor) -> list[dict]:
        """From log-probabilities of the labels [n, C] the likeliest label of each row, and each label's share."""
        labels = self.spec["labels"]
        logs = (scores.double() / self.spec["temperature"]).log_softmax(-1)
        found = []
        for best, row in zip(logs.argmax(-1).tolist(), logs):
            shares = row.exp().tolist()
            about = {
                "answer": labels[best],
                "confidence": shares[best],
                "probabilities": dict(zip(labels, shares)),
                "log_probabilities": row.tolist(),
            }
            found.append(about)
        return found

    def answer_text(self, student, ids: list[list[int]]) -> list[dict]:
        """What is generated behind each prompt, and how sure it is."""
        most = self.spec["max_tokens"]
        hooks = fast_decoding(device_of(self.subject.model), most)
        how = Decoding(most, self.spec["stop"], hooks=hooks)
        texts, sure = answer_texts(student, self.subject.tokenizer, ids, how)
        blank = blank_of(self.spec["template"])
        found = []
        for text, share in zip(texts, sure):
            found.append({"answer": text.removeprefix(blank), "confidence": share})
        return found

    def save(self, folder: str | Path) -> None:
        """Write the adapter in peft's format and `ia2mini.json`. Raises UsageError, also for a folder of others."""
        folders.save(self, Path(folder))

    def merge(self, out: str | Path) -> float:
        """Write a checkpoint with the adapter in its matrices; the largest difference of a logit on a prompt.

        Raises UsageError for a folder `out` that holds anything but this same merge.
        """
        return folders.merge(self, Path(out))


class Question(NamedTuple):
    """Which of some rows asks, its prompt, and the tokens of each label behind it (of texts none)."""

    place: int
    prompt: str
    labels: list[list[int]]


def load_adapter(folder: str | Path, subject: Subject | None = None, **spec) -> Predictor:
    """A saved adapter on its base model (None: loaded as the adapter names it), or any that peft wrote.

    Of the latter, `spec` says how prompts and answers are written (`template`, `labels`, …). Raises UsageError where
    the base is another one, or a file is damaged.

        load_adapter("tickets").predict(["My invoice is wrong"])[0]
    """
    folder = Path(folder)
    check_given(spec)
    if subject is None:
        name, revision = folders.base_of(folder)
        subject = open_subject(name, revision=revision)
    kept = read_spec(folder)
    adapter = None
    theta = None
    if folders.ships_adapter(folder, kept):
        adapter, theta = read_adapter(folder, subject.model)
    probe = None
    if kept and kept["method"] == "probe":
        probe = read_probe(folder, len(kept["labels"]), subject.model.config.hidden_size)
    how = {**FOREIGN, **(kept or {}), **spec}
    predictor = Predictor(subject, adapter, theta, how, how.get("report", {}), probe)
    if kept:
        folders.check(predictor, folder)
    return predictor
