"""A fitted adapter in use: it answers new rows with probabilities, one by one or in scikit-learn's style."""

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import numpy as np
from torch import Tensor

from .. import UsageError
from ..adapters import Adapter, adapted
from ..engine.subject import Subject, open_subject
from ..episode import with_demonstrations
from ..labels import Scoring, label_scores
from ..methods import WITH_DEMONSTRATIONS
from ..prefix import share_prefix
from ..scale.decode import decoding_for
from ..tasks import Example, same_answer
from ..tasks.own import true_answer
from ..tasks.rows import (
    Row,
    all_rows,
    blank_of,
    blocks,
    iter_rows,
    labels_after_prompt,
    nonempty_prompt,
    only_column,
    rename_clashes,
)
from ..tasks.turns import open_turns
from . import folder as folders
from .answers import answer_texts
from .measures import confidence_threshold
from .probe import Probe, last_states, read_probe
from .spec import FOREIGN, check_given, read_spec

ANSWER_COLUMNS = ("answer", "abstained", "confidence", "probabilities")


class Query(NamedTuple):
    """A row to answer: its prompt, and the tokens of each label (none for texts)."""

    prompt: str
    label_tokens: list[list[int]]


@dataclass
class Predictor:
    """The base model with an adapter (or without), and everything that answering rows needs.

    Rows are dicts of columns, texts for the template's only column, or a pandas DataFrame.
    """

    subject: Subject
    adapter: Adapter | None
    theta: Tensor | None  # [1, M]
    # template, labels, max_tokens, stop, temperature, confidences, demonstrations, method, report, …
    spec: dict
    report: dict = field(default_factory=dict)
    probe: Probe | None = None  # answers in place of the model's head

    def __post_init__(self):
        self.as_turn = str
        if self.spec["chat"]:
            self.subject, self.as_turn = self.subject.in_turns(self.spec["template"])

    def __repr__(self) -> str:
        """One line and the sentence of the fit, in place of every row and weight."""
        about = f"<Predictor {self.spec['method']} on {self.subject!r}>"
        return "\n".join([about, self.report["sentence"]]) if "sentence" in self.report else about

    def student(self, with_adapter: bool = True) -> AbstractContextManager:
        """The model with the adapter if there is one, else the base."""
        theta = self.theta if with_adapter and self.adapter else None
        return adapted(self.subject.model, self.adapter, theta)

    @property
    def classes_(self) -> np.ndarray:
        """The labels [C], in the order of the columns of `predict_proba`."""
        if not self.spec["labels"]:
            raise AttributeError("it answers with text: there are no classes")
        return np.array(self.spec["labels"], dtype=object)

    def predict(self, rows, icl: bool = False, coverage: float | None = None) -> np.ndarray:
        """The answer to each row, [n] texts, None where it abstains; options and errors as in `answer_rows`."""
        answers = [answer["answer"] for _, answer in self.full_answers(rows, icl, coverage)]
        return np.array(answers, dtype=object)

    def predict_proba(self, rows, icl: bool = False) -> np.ndarray:
        """The probability of each label among them, [n, C] float64, columns as `classes_`. Raises UsageError."""
        labels = self.spec["labels"]
        if not labels:
            raise UsageError("it answers with text, not with labels, and has no probabilities")
        answers = [answer["probabilities"] for _, answer in self.full_answers(rows, icl)]
        probabilities = [list(shares.values()) for shares in answers]
        return np.array(probabilities, dtype=np.float64).reshape(-1, len(labels))

    def score(self, rows, labels, icl: bool = False) -> float:
        """The share of right answers, by the true ones in `labels`. Raises UsageError, also for an unknown label."""
        predicted = self.predict(rows, icl)
        rows = [Row(f"label {i}", {"label": label}) for i, label in enumerate(labels, 1)]
        true = [true_answer(row, "label", self.spec["labels"]) for row in rows]
        if len(predicted) != len(true) or not true:
            counts = f"{len(predicted)} rows and {len(true)} labels"
            raise UsageError(f"{counts}: give one label for each row")
        return float(np.mean([self.is_right(*pair) for pair in zip(predicted, true)]))

    def is_right(self, answer: str, true: str) -> bool:
        """Whether an answer is right: the same label, or a text that parses to the same value."""
        if self.spec["labels"]:
            return answer == true
        return same_answer(self.spec["parser"], answer, true)

    def answer_rows(self, rows, icl: bool = False, coverage: float | None = None) -> Iterator[dict]:
        """Each row with its answer added: `answer`, `confidence` and, of labels, `probabilities`; lazily, in order.

        A column of the row that has such a name becomes `row_answer` and so on. None in place of a row says that the
        next has yet to come: what has come is answered first. `icl`: the base with demonstrations instead, as always
        where these were shipped. `coverage`: the least certain rows get the answer None, by the threshold above which
        that share of the held-out rows was. Raises UsageError for a row that cannot be answered; `outcomes` goes on.
        """
        for row, answer in raise_errors(self.outcomes(rows, icl, coverage)):
            yield with_answer(row, answer)

    def full_answers(
        self, rows, icl: bool = False, coverage: float | None = None
    ) -> Iterator[tuple[Row, dict]]:
        """Each row and its answer, of labels also the `log_probabilities` among them. Raises UsageError."""
        rows = all_rows(rows, only_column(self.spec["template"]))
        return raise_errors(self.outcomes(rows, icl, coverage))

    def outcomes(
        self, rows, icl: bool = False, coverage: float | None = None
    ) -> Iterator[tuple[Row, dict | UsageError]]:
        """Every row and its answer as in `full_answers`, or the UsageError for which it cannot be answered."""
        if coverage is not None and icl and self.spec["method"] != "icl":
            reason = "the held-out confidences are those of what was shipped"
            raise UsageError(f"--coverage with --icl: {reason}; leave one of the two out")
        threshold = confidence_threshold(self.spec["confidences"], coverage)
        demonstrations = self.demonstrations(icl)
        for block in blocks(iter_rows(rows, only_column(self.spec["template"]))):
            for row, answer in zip(block, self.answer_block(block, demonstrations, icl)):
                if isinstance(row, UsageError):
                    row = Row("", {})
                elif isinstance(answer, dict) and answer["confidence"] < threshold:
                    answer = {**answer, "answer": None, "abstained": answer["answer"]}
                yield row, answer

    def answer_block(
        self, block: list[Row | UsageError], demonstrations: list[Example], icl: bool
    ) -> list[dict | UsageError]:
        """The answer to each row of a block, or the UsageError for which it cannot be answered."""
        found: list = list(block)  # what is no row is an error already
        queries = {}  # by the row's place in the block
        for place, row in enumerate(block):
            if isinstance(row, Row):
                try:
                    queries[place] = self.make_query(row, demonstrations)
                except UsageError as error:
                    found[place] = error
        # The rows of a group are scored together, so they need the same label tokens. Only labels of an adapter that
        # ia2mini did not fit may have other tokens after another prompt.
        for label_tokens, group in groupby(queries, lambda place: queries[place].label_tokens):
            places = list(group)
            prompts = [queries[place].prompt for place in places]
            answers = self.answer_prompts(prompts, demonstrations, label_tokens, icl)
            for place, answer in zip(places, answers):
                found[place] = answer
        return found

    def demonstrations(self, icl: bool = False) -> list[Example]:
        """What stands before every row: shipped demonstrations; with `icl` kept ones or the context. UsageError."""
        spec = self.spec
        if not icl and spec["method"] not in WITH_DEMONSTRATIONS:
            return []
        if not spec["demonstrations"]:
            raise UsageError("--icl: this adapter keeps no demonstrations")
        as_prompt = str if spec["context"] else self.as_turn
        return [Example(as_prompt(e["prompt"]), e["answer"]) for e in spec["demonstrations"]]

    def make_query(self, row: Row, demonstrations: list[Example]) -> Query:
        """The prompt of a row. Raises UsageError for one that is missing, empty or too long."""
        template = self.spec["template"]
        text = nonempty_prompt(template, open_turns(row, template))
        try:
            prompt = self.as_turn(text)
            tokens = len(self.subject.tokenizer.encode(with_demonstrations(demonstrations, prompt)))
            label_tokens = self.label_tokens(prompt)
        except UsageError as error:
            raise UsageError(f"{row.where}: {error}") from None
        answer = max(map(len, label_tokens), default=self.spec["max_tokens"])
        most = self.subject.context_length
        # the answer's last token is not read
        if 0 < tokens and tokens + answer - 1 <= most:
            return Query(prompt, label_tokens)
        also = " with demonstrations" if demonstrations else ""
        lengths = [f"its prompt{also} has {tokens} tokens"]
        if answer > 1:
            lengths.append(f"its answer may have {answer}")
        raise UsageError(f"{row.where}: {', '.join(lengths)}; the model reads 1 to {most}")

    def label_tokens(self, prompt: str) -> list[list[int]]:
        """The tokens of every label: as they were fitted; of an adapter that ia2mini did not fit, after this prompt."""
        if not self.spec["labels"]:
            return []
        if not self.is_foreign:
            return self.fitted_label_tokens
        return self.subject.tokenizer.label_tokens(prompt, self.written_labels())

    @property
    def is_foreign(self) -> bool:
        """Whether ia2mini did not fit the adapter: it has no example row."""
        return "example" not in self.spec

    @cached_property
    def fitted_label_tokens(self) -> list[list[int]]:
        prompt = self.as_turn(self.spec["example"])
        return self.subject.tokenizer.label_tokens(prompt, self.written_labels())

    def written_labels(self) -> tuple[str, ...]:
        """The labels as written after a prompt: a blank at the template's end belongs to the label."""
        return labels_after_prompt(self.spec["template"], self.spec["labels"])

    def answer_prompts(
        self,
        prompts: list[str],
        demonstrations: list[Example],
        label_tokens: list[list[int]],
        icl: bool,
    ) -> list[dict]:
        """What the adapted model (with `icl` the base) answers to prompts; without `label_tokens` a text."""
        tokenizer = self.subject.tokenizer
        temperature = self.spec["temperature"]
        if icl and self.spec["method"] != "icl":
            temperature = 1.0  # the temperature was fitted to the shipped model's answers
        with self.student(not icl) as student:
            if demonstrations:
                student, ids = share_prefix(student, tokenizer, [demonstrations], prompts)
            else:
                ids = tokenizer.encode_all(prompts)
            if not label_tokens:
                answers = self.generate_texts(student, ids)
            elif self.probe is not None and not icl:
                scores = self.probe.log_probabilities(last_states(student, ids))
                answers = self.likeliest_labels(scores, temperature)
            else:
                scoring = Scoring(ends=tokenizer.eos_ids)
                scores = label_scores(student, ids, label_tokens, scoring).log_probabilities[0]
                answers = self.likeliest_labels(scores, temperature)
        if any(np.isnan(answer["confidence"]) for answer in answers):
            raise UsageError("the model computes NaN: weights too large; try --dtype float32")
        return answers

    def likeliest_labels(self, scores: Tensor, temperature: float) -> list[dict]:
        """The likeliest label of each row, and the probabilities of all, from log-probabilities [n, C]."""
        labels = self.spec["labels"]
        logs = (scores.double() / temperature).log_softmax(-1)
        answers = []
        for best, row in zip(logs.argmax(-1).tolist(), logs):
            probabilities = row.exp().tolist()
            answer = {
                "answer": labels[best],
                "confidence": probabilities[best],
                "probabilities": dict(zip(labels, probabilities)),
                "log_probabilities": row.tolist(),
            }
            answers.append(answer)
        return answers

    def generate_texts(self, student, ids: list[list[int]]) -> list[dict]:
        """Generate a text after each prompt; returns the texts and their confidences."""
        decoding = decoding_for(self.subject.model, self.spec["max_tokens"], self.spec["stop"])
        blank = blank_of(self.spec["template"])
        answers = []
        for text, confidence in answer_texts(student, self.subject.tokenizer, ids, decoding):
            answers.append({"answer": text.removeprefix(blank), "confidence": confidence})
        return answers

    def save(self, folder: str | Path) -> None:
        """`folder.save`: write the adapter in peft's format and `ia2mini.json`. Raises UsageError."""
        folders.save(self, Path(folder))

    def merge(self, out: str | Path) -> float:
        """`folder.merge`: write a merged checkpoint; returns the largest difference of a logit. Raises UsageError."""
        return folders.merge(self, Path(out))


def raise_errors(outcomes: Iterable[tuple[Row, dict | UsageError]]) -> Iterator[tuple[Row, dict]]:
    """The same rows and answers. Raises the UsageError of the first row that cannot be answered."""
    for row, answer in outcomes:
        if isinstance(answer, UsageError):
            raise answer
        yield row, answer


def with_answer(row: Row, answer: dict) -> dict:
    """The columns of a row and of its answer; the row's own names give way, as in `answer_rows`."""
    added = {name: answer[name] for name in ANSWER_COLUMNS if name in answer}
    return rename_clashes(row, ANSWER_COLUMNS) | added


def load_adapter(folder: str | Path, subject: Subject | None = None, **given) -> Predictor:
    """A saved adapter on its base model (None: loaded as the adapter names it), or any that peft wrote.

    Of the latter, `given` says how prompts and answers are written (`template`, `labels`, …). Raises UsageError where
    the base is another one, or a file is damaged.

        load_adapter("tickets").predict(["My invoice is wrong"])[0]
    """
    folder = Path(folder)
    kept = read_spec(folder)
    check_given(given, kept)
    if subject is None:
        name, revision = folders.base_of(folder)
        subject = open_subject(name, revision=revision)
    adapter, theta = folders.read_weights(folder, kept, subject)
    probe = None
    if kept and kept["method"] == "probe":
        probe = read_probe(folder, len(kept["labels"]), subject.model.config.hidden_size)
    spec = {**FOREIGN, **(kept or {}), **given}
    predictor = Predictor(subject, adapter, theta, spec, spec.get("report", {}), probe)
    if kept:
        folders.check_canary(predictor, folder)
        folders.check_digests(kept, folder)
    return predictor
