"""A fitted adapter in use: answers to new rows with probabilities, saved and loaded as one self-contained folder."""

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from . import UsageError, parallel
from .adapters import Adapter, adapted
from .batch import Row as IdsRow
from .batch import Watch
from .chat import ChatTemplate
from .episode import with_demonstrations
from .evaluate import answer_scores, label_scores, share_prefix
from .files import finite, read_json, write, write_text
from .generate import Decoding, generate
from .models.checkpoint import load
from .models.common import device_of
from .peft_format import read_adapter, save_adapter, save_merged
from .runs import checkpoint_digest, versions
from .spec import FOREIGN, SPEC, check_given, read_spec
from .subject import Subject, open_subject
from .tasks import Example
from .tasks.rows import Row, fill

BESIDE = ("tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja", "generation_config.json")
TOP, AT_ONCE = 5, 64
ADAPTER = ("adapter_model.safetensors", "adapter_config.json")
ADDED = r"^(?=(row_)*(answer|abstained|confidence|probabilities)$)"  # what a row's answer is called
ALLOWED = {"float32": 1e-3, "bfloat16": 0.25, "float16": 0.1}  # mean difference of a canary's log-probabilities


@dataclass
class Predictor:
    """The base model under one adapter (none: the base itself), with what it needs to answer rows."""

    subject: Subject
    adapter: Adapter | None
    theta: Tensor | None  # [1, M]
    spec: dict  # template, labels, max_tokens, stop, temperature, confidences, demonstrations, method, report, …
    report: dict = field(default_factory=dict)

    def __post_init__(self):
        self.chat = ChatTemplate(self.subject.folder, self.subject.tokenizer) if self.spec["chat"] else str

    def student(self, wanted: bool = True) -> AbstractContextManager:
        """The model under the adapter, if there is one and it is wanted."""
        model = self.subject.model
        return adapted(model, self.adapter, self.theta) if wanted and self.adapter else nullcontext(model)

    def predict(
        self, rows: Iterable[dict], icl: bool = False, coverage: float | None = None, wrong: Callable | None = None
    ) -> Iterator[dict]:
        """Each row with its answer added: `answer`, `confidence` and, of labels, `probabilities`; lazily, in order.

        A column of the row's own that is called so becomes `row_answer` and so on.
        `icl`: the base with demonstrations instead. `coverage`: the least certain rows get the answer None, by the
        threshold above which that share of the held-out rows was. A row without its columns is a UsageError, which
        `wrong`, where given, is called with instead.
        """
        threshold, shown = self.threshold(coverage), self.shown() if icl else []
        every = (row if isinstance(row, Row) else Row(f"row {i}", row) for i, row in enumerate(rows, 1))
        while some := list(islice(every, AT_ONCE)):
            prompts = {}
            for i, row in enumerate(some):
                try:
                    prompts[i] = self.prompt(row, shown)
                except UsageError as error:
                    if wrong is None:
                        raise
                    wrong(error)
            for i, found in zip(prompts, self.answer(list(prompts.values()), shown) if prompts else ()):
                if found["confidence"] < threshold:
                    found = {"answer": None, "abstained": found.pop("answer")} | found
                yield {re.sub(ADDED, "row_", name): value for name, value in some[i].items()} | found

    def shown(self) -> list[Example]:
        """The demonstrations, or the context, that stand before every row where the base is to answer."""
        spec = self.spec
        if not spec["demonstrations"]:
            raise UsageError("--icl: this adapter keeps no demonstrations")
        asked = str if spec["context"] else self.chat
        return [Example(asked(e["prompt"]), e["answer"]) for e in spec["demonstrations"]]

    def prompt(self, row: Row, shown: list[Example]) -> str:
        """The prompt of a row. Raises UsageError for a missing column, or where it is longer than the model reads."""
        prompt = self.chat(fill(self.spec["template"], row))
        tokens = len(self.subject.tokenizer.encode(with_demonstrations(shown, prompt)))
        most = self.subject.reads
        if not 0 < tokens <= most:
            behind = " with demonstrations" * bool(shown)
            raise UsageError(f"{row.where}: its prompt{behind} has {tokens} tokens; the model reads 1 to {most}")
        return prompt

    def threshold(self, coverage: float | None) -> float:
        """The confidence that the share `coverage` of held-out rows reaches (split conformal: of n + 1 rows)."""
        if coverage is None:
            return 0.0
        if not 0 < coverage <= 1:
            raise UsageError(f"--coverage {coverage:g}: a share of the rows, above 0 and at most 1")
        held = sorted(self.spec["confidences"])
        if not held:
            raise UsageError("--coverage needs the held-out confidences of `ia2mini fit`; this adapter has none")
        below = int(np.floor((len(held) + 1) * (1 - coverage) + 1e-9))
        return held[below - 1] if below else 0.0

    def answer(self, prompts: list[str], shown: list[Example]) -> list[dict]:
        """Answers to prompts: the adapted model's, or the base's where demonstrations are shown."""
        spec, tokenizer = self.spec, self.subject.tokenizer
        model, ids = self.subject.model, tokenizer.encode_all(prompts)
        if shown:
            model, ids = share_prefix(model, tokenizer, [shown], prompts)
        with nullcontext(model) if shown else self.student() as student:
            if spec["labels"]:
                found = self.answer_labels(student, prompts, ids)
            else:
                texts = answer_texts(student, tokenizer, ids, Decoding(spec["max_tokens"], spec["stop"]))
                found = [{"answer": text, "confidence": sure} for text, sure in zip(*texts)]
        if any(np.isnan(answer["confidence"]) for answer in found):
            raise UsageError("the model computes NaN: weights of model or adapter are too large; try --dtype float32")
        return found

    def answer_labels(self, student, prompts: list[str], ids: list[list[int]]) -> list[dict]:
        labels = self.spec["labels"]
        tokens = self.subject.tokenizer.label_tokens(self.chat(self.spec.get("example", prompts[0])), labels)
        if (longest := max(map(len, tokens))) > (most := self.subject.reads):
            raise UsageError(f"a label has {longest} tokens; the model reads at most {most}")
        scores = label_scores(student, ids, tokens).logarithms[0]
        found = []
        for row in (scores / self.spec["temperature"]).softmax(-1).tolist():
            best = max(range(len(labels)), key=row.__getitem__)
            found.append({"answer": labels[best], "confidence": row[best], "probabilities": dict(zip(labels, row))})
        return found

    def canary(self, kept: dict | None = None) -> dict:
        """Next tokens of a prompt (the likeliest, or as `kept`) and their log-probabilities, with and without it."""
        example = self.chat(self.spec["example"])
        tokens = self.subject.tokenizer.encode(example)
        self.subject.check_room(example, len(tokens), "fit the adapter again")
        ids = torch.tensor([tokens])
        found: dict = {"dtype": str(next(self.subject.model.parameters()).dtype).removeprefix("torch.")}
        for name, wanted in (("base", False), ("adapted", True)):
            with torch.no_grad(), self.student(wanted) as student:
                logits = student(ids.to(device_of(self.subject.model)))[0, -1].float().cpu().log_softmax(-1)
            tokens = kept[name]["tokens"] if kept else logits.topk(TOP).indices.tolist()
            there = [t for t in tokens if 0 <= t < len(logits)]
            found[name] = {"tokens": tokens, "log_probabilities": logits[there].tolist()}
        return found

    def merge(self, out: Path) -> float:
        """Write a whole checkpoint with the adapter in its matrices; the largest difference of a logit on a prompt."""
        subject = self.subject
        if self.adapter is None:
            raise UsageError(f"there is no adapter to merge; what answers is {subject.base}, a whole model already")
        save_merged(subject.model, self.adapter, self.theta[0], out, subject.tokenizer)
        self.beside(out)
        ids = torch.tensor([subject.tokenizer.encode(self.chat(self.spec.get("example", "Once upon a time")))])
        merged, _ = load(out, next(subject.model.parameters()).dtype, str(device_of(subject.model)))
        with torch.no_grad(), self.student() as student:
            return (merged(ids.to(device_of(merged))) - student(ids.to(device_of(merged)))).abs().max().item()

    def beside(self, out: Path) -> None:
        """Copy the small files of the base's checkpoint beside a whole one."""
        for name in BESIDE:
            if (self.subject.folder / name).is_file():
                write(out / name, partial(shutil.copyfile, self.subject.folder / name))

    def check(self, folder: Path) -> None:
        """Compare the canary with what was saved. Raises UsageError for another base or a damaged adapter."""
        kept, about = self.spec["canary"], f"fitted on {self.spec['base']['name']}, loaded on {self.subject.base}"
        now = self.canary(kept)
        allowed = max(ALLOWED.get(c["dtype"], 0) for c in (kept, now))
        blames = {"base": "the base model is not the one it was fitted on", "adapted": "the adapter is damaged"}
        if whole(folder):
            del blames["base"]
        for name, blame in blames.items():
            then, found = (c[name]["log_probabilities"] for c in (kept, now))
            if len(then) != len(found) or not np.abs(np.subtract(then, found)).mean() <= allowed:
                raise UsageError(f"{folder}: {blame} ({about}): its test prompt gives other probabilities")
        if self.adapter and self.spec["adapter_digest"] != digest(folder / ADAPTER[0]):
            raise UsageError(f"{folder}: the adapter is damaged: {ADAPTER[0]} is not the file that was saved")

    def save(self, folder: Path) -> None:
        """Write the adapter in peft's format, `ia2mini.json` and a model card. Raises UsageError."""
        subject = self.subject
        for name in ADAPTER if parallel.writes() else ():  # of an earlier fit
            (folder / name).unlink(missing_ok=True)
        if self.adapter:
            about = subject.base, subject.tokenizer, subject.revision
            save_adapter(subject.model, self.adapter, self.theta[0], folder, *about)
        if whole(folder):
            self.beside(folder)
        base = {"name": subject.base, "revision": subject.revision, "digest": checkpoint_digest(subject.folder)}
        self.spec |= {"base": base, "versions": versions(), "report": self.report, "canary": self.canary()}
        self.spec["adapter_digest"] = digest(folder / ADAPTER[0])
        write_text(folder / SPEC, json.dumps(finite(self.spec), indent=1, ensure_ascii=False) + "\n")


def answer_texts(student, tokenizer, ids: list[list[int]], how: Decoding, watch: Watch = None) -> tuple[list, list]:
    """What a model answers to prompts, greedily, and the geometric mean of its tokens' (and EOS's) probabilities."""
    responses = generate(student, tokenizer, ids, how, watch)
    ended = [IdsRow(prompt, response + list(tokenizer.eos_ids[:1])) for prompt, response in zip(ids, responses)]
    return list(map(tokenizer.decode, responses)), answer_scores(student, ended)[0].exp().tolist()


def whole(folder: Path) -> bool:
    """Whether a folder holds a checkpoint of its own: full fine-tuning."""
    return (folder / "config.json").is_file()


def digest(path: Path) -> str | None:
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None


def load_adapter(folder: str | Path, subject: Subject | None = None, **spec) -> Predictor:
    """A saved adapter on its base model (None: loaded as the adapter names it), or any that peft wrote.

    Of the latter, `spec` says how prompts and answers are written (`template`, `labels`, …). Raises UsageError where
    the base is another one, or a file is damaged.

        predictor = load_adapter("tickets")
        next(predictor.predict([{"text": "My invoice is wrong"}]))["answer"]
    """
    folder, adapter, theta = Path(folder), None, None
    check_given(spec)
    if subject is None:
        name, revision = base_of(folder)
        subject = open_subject(name, revision=revision)
    kept = read_spec(folder)
    if not whole(folder) and (kept is None or kept["method"] != "base"):
        adapter, theta = read_adapter(folder, subject.model)
    predictor = Predictor(subject, adapter, theta, FOREIGN | (kept or {}) | spec, (kept or {}).get("report", {}))
    if kept:
        predictor.check(folder)
    return predictor


def base_of(folder: Path) -> tuple[str, str | None]:
    """The base that a saved adapter names, and its commit on the hub; of a whole folder itself. Raises UsageError."""
    if whole(folder):
        return str(folder), None
    if kept := read_spec(folder):
        return kept["base"]["name"], kept["base"].get("revision")
    config = read_json(folder / "adapter_config.json")
    if not (name := config.get("base_model_name_or_path")):
        raise UsageError(f"{folder}: names no base model; give --model")
    return name, config.get("revision")
