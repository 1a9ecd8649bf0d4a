"""A fitted adapter in use: answers to new rows with probabilities, saved and loaded as one self-contained folder."""

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import groupby
from operator import attrgetter
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .. import UsageError
from ..adapters import Adapter, adapted
from ..engine.peft import claim, read_adapter, read_config, save_adapter, save_merged
from ..engine.store import checkpoint_digest, versions
from ..engine.subject import Subject, open_subject
from ..episode import with_demonstrations
from ..files import finite, write, write_text
from ..generate import Decoding
from ..labels import Scoring, label_scores
from ..models.checkpoint import load
from ..models.taps import device_of
from ..prefix import share_prefix
from ..scale.decode import fast_decoding
from ..scoring import answer_texts, last_states
from ..tasks import Example
from ..tasks.chat import ChatTemplate
from ..tasks.rows import Row, fill
from ..tokenizer import Rendered
from .probe import PROBE, Probe, read_probe, write_probe
from .serving import write_decision
from .spec import FOREIGN, SPEC, check_given, read_spec

BESIDE = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "generation_config.json",
)
BESIDE += ("added_tokens.json",)
TOP, AT_ONCE = 5, 64
CARD_MARK = b"tags: [ia2mini, "  # of a model card that ia2mini wrote
ADAPTER = ("adapter_model.safetensors", "adapter_config.json")
ADDED = r"^(?=(row_)*(answer|abstained|confidence|probabilities)$)"  # what a row's answer is called
# mean difference of a canary's log-probabilities
ALLOWED = {"float32": 1e-3, "bfloat16": 0.25, "float16": 0.1}


@dataclass
class Predictor:
    """The base model under one adapter (none: the base itself), with what it needs to answer rows."""

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
            self.chat = ChatTemplate(self.subject.folder, self.subject.tokenizer)
            self.subject = replace(self.subject, tokenizer=self.chat.tokenizer)

    def student(self, wanted: bool = True) -> AbstractContextManager:
        """The model under the adapter, if there is one and it is wanted."""
        model = self.subject.model
        return (
            adapted(model, self.adapter, self.theta)
            if wanted and self.adapter
            else nullcontext(model)
        )

    def predict(
        self,
        rows: Iterable[dict | None],
        icl=False,
        coverage: float | None = None,
        wrong: Callable | None = None,
    ) -> Iterator[dict]:
        """Each row with its answer added: `answer`, `confidence` and, of labels, `probabilities`; lazily, in order.

        A column of the row's own that is called so becomes `row_answer` and so on. None in place of a row says that the
        next has yet to come: what has come is answered first.
        `icl`: the base with demonstrations instead, as always where these were shipped. `coverage`: the least certain
        rows get the answer None, by the threshold above which that share of the held-out rows was. A row without its
        columns is a UsageError, which `wrong`, where given, is called with instead.
        """
        threshold = self.threshold(coverage)
        for row, found in self.answers(rows, icl, wrong):
            found.pop("log_probabilities", None)
            if found["confidence"] < threshold:
                found = {"answer": None, "abstained": found.pop("answer")} | found
            yield {re.sub(ADDED, "row_", name): value for name, value in row.items()} | found

    def answers(
        self, rows: Iterable[dict | None], icl=False, wrong=None
    ) -> Iterator[tuple[Row, dict]]:
        """Each row and what is said to it, of labels also the `log_probabilities`, among them alone."""
        shown = self.shown() if icl or self.spec["method"] == "icl" else []
        for some in blocks(rows):
            questions = []
            for row in some:
                try:
                    questions.append(self.question(row, shown))
                except UsageError as error:
                    if wrong is None:
                        raise
                    wrong(error)
            for labels, group in groupby(questions, attrgetter("labels")):
                alike = list(group)
                found = self.answer([question.prompt for question in alike], shown, labels)
                yield from zip([question.row for question in alike], found)

    def shown(self) -> list[Example]:
        """The demonstrations, or the context, that stand before every row where the base is to answer."""
        spec = self.spec
        if not spec["demonstrations"]:
            raise UsageError("--icl: this adapter keeps no demonstrations")
        asked = str if spec["context"] else self.chat
        return [Example(asked(e["prompt"]), e["answer"]) for e in spec["demonstrations"]]

    def question(self, row: Row, shown: list[Example]) -> "Question":
        """What a row asks. Raises UsageError for a missing column, and where it is longer than the model reads."""
        prompt = self.chat(fill(self.spec["template"], row))
        tokenizer = self.subject.tokenizer
        tokens = len(tokenizer.encode(with_demonstrations(shown, prompt)))
        try:
            labels = self.label_tokens(prompt)
        except UsageError as error:
            raise UsageError(f"{row.where}: {error}") from None
        answer = max(map(len, labels)) if labels else self.spec["max_tokens"]
        # the answer's last token is not read
        if 0 < tokens and tokens + answer - 1 <= self.subject.reads:
            return Question(row, prompt, labels)
        said = [f"its prompt{' with demonstrations' if shown else ''} has {tokens} tokens"]
        if answer > 1:
            said.append(f"its answer may have {answer}")
        raise UsageError(
            f"{row.where}: {', '.join(said)}; the model reads 1 to {self.subject.reads}"
        )

    def label_tokens(self, prompt: str) -> list[list[int]]:
        """The tokens of every label: as they were fitted, or of a strange adapter as they stand behind this prompt."""
        if not self.spec["labels"]:
            return []
        if "example" in self.spec:
            prompt = self.chat(self.spec["example"])
        return self.subject.tokenizer.label_tokens(prompt, self.spec["labels"])

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
        below = int(np.floor((len(held) + 1) * (1 - coverage) + 1e-9))
        return held[below - 1] if below else 0.0

    def answer(
        self, prompts: list[str], shown: list[Example], labels: list[list[int]]
    ) -> list[dict]:
        """Answers to prompts: the adapted model's, or the base's where demonstrations are shown."""
        spec, tokenizer = self.spec, self.subject.tokenizer
        model, ids = self.subject.model, tokenizer.encode_all(prompts)
        if shown:
            model, ids = share_prefix(model, tokenizer, [shown], prompts)
        found: list[dict] = []
        with nullcontext(model) if shown else self.student() as student:
            if labels:
                probe = None if shown else self.probe
                found = self.answer_labels(student, ids, labels, probe)
            else:
                hooks = fast_decoding(device_of(self.subject.model), spec["max_tokens"])
                how = Decoding(spec["max_tokens"], spec["stop"], hooks=hooks)
                texts, sure = answer_texts(student, tokenizer, ids, how)
                found = [{"answer": text, "confidence": p} for text, p in zip(texts, sure)]
        if any(np.isnan(answer["confidence"]) for answer in found):
            raise UsageError(
                "the model computes NaN: weights of model or adapter are too large; try --dtype float32"
            )
        return found

    def answer_labels(
        self, student, ids: list[list[int]], tokens: list[list[int]], probe: Probe | None = None
    ) -> list[dict]:
        """The shares of the labels: of their `tokens` by the model's head, or by a probe in its place."""
        labels = self.spec["labels"]
        if probe is not None:
            scores = probe.log_probabilities(last_states(student, ids))
        else:
            how = Scoring(ends=self.subject.tokenizer.eos_ids)
            scores = label_scores(student, ids, tokens, how).log_probabilities[0]
        logs = (scores.double() / self.spec["temperature"]).log_softmax(-1)
        found = []
        for best, row in zip(logs.argmax(-1).tolist(), logs):
            shares = row.exp().tolist()
            about = {
                "answer": labels[best],
                "confidence": shares[best],
                "probabilities": dict(zip(labels, shares)),
            }
            found.append(about | {"log_probabilities": row.tolist()})
        return found

    def canary(self, kept: dict | None = None) -> dict:
        """Next tokens of a prompt (the likeliest, or as `kept`) and their log-probabilities, with and without it."""
        prompt = self.chat(self.spec["example"])
        found: dict = {
            "dtype": str(next(self.subject.model.parameters()).dtype).removeprefix("torch.")
        }
        # a template may write today's date: what it wrote then is asked again
        if self.spec["chat"]:
            prompt = Rendered((kept or {}).get("prompt", prompt))
            found["prompt"] = str(prompt)
        tokens = self.subject.tokenizer.encode(prompt)
        self.subject.check_room(prompt, len(tokens), "fit the adapter again")
        ids = torch.tensor([tokens])
        for name, wanted in (("base", False), ("adapted", True)):
            with torch.no_grad(), self.student(wanted) as student:
                logits = (
                    student(ids.to(device_of(self.subject.model)))[0, -1]
                    .float()
                    .cpu()
                    .log_softmax(-1)
                )
            tokens = kept[name]["tokens"] if kept else logits.topk(TOP).indices.tolist()
            there = [t for t in tokens if 0 <= t < len(logits)]
            found[name] = {"tokens": tokens, "log_probabilities": logits[there].tolist()}
        return found

    def merge(self, out: Path) -> float:
        """Write a checkpoint with the adapter in its matrices; the largest difference of a logit on a prompt.

        Raises UsageError for a folder `out` that holds anything but this same merge.
        """
        subject = self.subject
        if self.adapter is None:
            answers = f"{subject.base}, a whole model already"
            if self.spec["method"] == "icl":
                answers = f"{subject.base} with demonstrations in its prompt; a merged model would lack them"
            raise UsageError(f"there is no adapter to merge; what answers is {answers}")
        dtype = str(next(subject.model.parameters()).dtype).removeprefix("torch.")
        weights = hashlib.sha256(self.theta.cpu().numpy().tobytes()).hexdigest()
        claim(out, {"base": subject.base, "adapter_digest": weights, "dtype": dtype})
        save_merged(subject.model, self.adapter, self.theta[0], out, subject.tokenizer)
        self.beside(out)
        write_decision(self, out)
        ids = torch.tensor(
            [subject.tokenizer.encode(self.chat(self.spec.get("example", "Once upon a time")))]
        )
        merged, _ = load(out, next(subject.model.parameters()).dtype, str(device_of(subject.model)))
        with torch.no_grad(), self.student() as student:
            return (
                (merged(ids.to(device_of(merged))) - student(ids.to(device_of(merged))))
                .abs()
                .max()
                .item()
            )

    def beside(self, out: Path) -> None:
        """Copy the small files of the base's checkpoint beside a whole one."""
        for name in BESIDE:
            if (self.subject.folder / name).is_file():
                write(out / name, partial(shutil.copyfile, self.subject.folder / name))

    def check(self, folder: Path) -> None:
        """Compare the canary with what was saved. Raises UsageError for another base or a damaged adapter."""
        kept, about = (
            self.spec["canary"],
            f"fitted on {self.spec['base']['name']}, loaded on {self.subject.base}",
        )
        now = self.canary(kept)
        allowed = max(ALLOWED.get(c["dtype"], 0) for c in (kept, now))
        blames = {
            "base": "the base model is not the one it was fitted on",
            "adapted": "the adapter is damaged",
        }
        for name, blame in blames.items():
            then, found = (c[name]["log_probabilities"] for c in (kept, now))
            if len(then) != len(found) or not np.abs(np.subtract(then, found)).mean() <= allowed:
                raise UsageError(
                    f"{folder}: {blame} ({about}): its test prompt gives other probabilities"
                )
        shipped = {"adapter": ADAPTER[0], "probe": PROBE}
        for what, name in shipped.items():
            if self.spec.get(f"{what}_digest") != digest(folder / name):
                raise UsageError(
                    f"{folder}: the {what} is damaged: {name} is not the file that was saved"
                )

    def save(self, folder: Path) -> None:
        """Write the adapter in peft's format and `ia2mini.json`. Raises UsageError, also for a folder of others."""
        check_own(folder)
        subject = self.subject
        for name in (*ADAPTER, PROBE):  # of an earlier fit
            (folder / name).unlink(missing_ok=True)
        if self.probe is not None:
            write_probe(self.probe, folder / PROBE)
        if self.adapter:
            save_adapter(self.adapter, self.theta[0], folder, subject.base, subject.revision)
        write_decision(self, folder)
        base = {
            "name": subject.base,
            "revision": subject.revision,
            "digest": checkpoint_digest(subject.folder),
        }
        self.spec |= {
            "base": base,
            "versions": versions(),
            "report": self.report,
            "canary": self.canary(),
        }
        self.spec["adapter_digest"] = digest(folder / ADAPTER[0])
        self.spec["probe_digest"] = digest(folder / PROBE)
        write_text(
            folder / SPEC, json.dumps(finite(self.spec), indent=1, ensure_ascii=False) + "\n"
        )


class Question(NamedTuple):
    """A row, its prompt, and the tokens of each label behind it (of texts none)."""

    row: Row
    prompt: str
    labels: list[list[int]]


def blocks(rows: Iterable[dict | None]) -> Iterator[list[Row]]:
    """Rows in lists of up to `AT_ONCE`; fewer where the next row has yet to come (None)."""
    some: list[Row] = []
    number = 0
    for row in rows:
        if row is not None:
            number += 1
            some.append(row if isinstance(row, Row) else Row(f"row {number}", row))
        if some and (row is None or len(some) == AT_ONCE):
            yield some
            some = []
    if some:
        yield some


def check_own(folder: Path) -> None:
    """Raises UsageError for a folder that holds something, and not what an earlier fit left there."""
    mend = "choose a new or empty folder with --out"
    if not folder.is_dir():
        if folder.exists():
            raise UsageError(f"{folder}: is a file; {mend}")
        return
    left = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
    ours = SPEC in left or any(name.startswith("unfinished-") for name in left)
    if left and not ours:
        raise UsageError(f"{folder}: holds {left[0]!r} and is no folder of an earlier fit; {mend}")
    card = folder / "README.md"
    if card.is_file() and CARD_MARK not in card.read_bytes():
        raise UsageError(
            f"{card}: was not written by ia2mini and would be replaced; move it, or {mend}"
        )


def digest(path: Path) -> str | None:
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None


def load_adapter(folder: str | Path, subject: Subject | None = None, **spec) -> Predictor:
    """A saved adapter on its base model (None: loaded as the adapter names it), or any that peft wrote.

    Of the latter, `spec` says how prompts and answers are written (`template`, `labels`, …). Raises UsageError where
    the base is another one, or a file is damaged.

        predictor = load_adapter("tickets")
        next(predictor.predict([{"text": "My invoice is wrong"}]))["answer"]
    """
    folder = Path(folder)
    check_given(spec)
    if subject is None:
        name, revision = base_of(folder)
        subject = open_subject(name, revision=revision)
    kept = read_spec(folder)
    adapter, theta = None, None
    if ships_adapter(folder, kept):
        adapter, theta = read_adapter(folder, subject.model)
    probe = None
    if kept and kept["method"] == "probe":
        probe = read_probe(folder, len(kept["labels"]), subject.model.config.hidden_size)
    about = {**FOREIGN, **(kept or {}), **spec}
    predictor = Predictor(subject, adapter, theta, about, about.get("report", {}), probe)
    if kept:
        predictor.check(folder)
    return predictor


def ships_adapter(folder: Path, kept: dict | None) -> bool:
    """Whether an adapter belongs to what is described by `kept` (None: any folder of peft). Raises UsageError."""
    if kept is None or kept["adapter_digest"] is not None:
        return True
    for name in (*ADAPTER, "config.json"):  # the latter of full fine-tuning, which 0.3.0 had
        if (folder / name).exists():
            beside = f"its {SPEC} says that the base model answers, but {name} lies beside it"
            raise UsageError(f"{folder}: {beside}; move one of the two into a folder of its own")
    return False


def base_of(folder: Path) -> tuple[str, str | None]:
    """The base that a saved adapter names, and its commit on the hub. Raises UsageError."""
    kept = read_spec(folder)
    if kept:
        return kept["base"]["name"], kept["base"].get("revision")
    config = read_config(folder)
    for key in ("base_model_name_or_path", "revision"):
        value = config.get(key)
        if value is not None and not isinstance(value, str):
            raise UsageError(
                f"{folder / ADAPTER[1]}: {key} = {repr(value)[:80]} is not a text; give --model"
            )
    name = config.get("base_model_name_or_path")
    if not name:
        raise UsageError(f"{folder}: names no base model; give --model")
    return name, config.get("revision")
