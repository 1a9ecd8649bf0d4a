"""From one's own rows to an adapter that can be trusted: cross-validate, choose, train the choice on every row."""

import re
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from statistics import fmean, median
from typing import NamedTuple

import torch
from tqdm import tqdm

from . import UsageError, __version__
from .chat import ChatTemplate
from .crossval import Candidate, CrossValidation, choose
from .episode import seeded, with_demonstrations
from .evaluate import share_prefix
from .files import plain
from .generate import STOP, Decoding, generate
from .methods import METHODS
from .models.common import device_of
from .options import FitOptions
from .predictor import Predictor
from .report.fit import classes, measures, sentence
from .report.summary import count
from .runs import RunFolder, checkpoint_digest
from .subject import Subject
from .tasks import Example, Task, same_answer
from .tasks.own import keep_apart, near_labels, own_task, queries_task
from .tasks.rows import Row, as_rows, fill
from .teacher import answer_tokens_at_most

LONG, FAR = 500, 10  # tokens, and times the median: from both on a row is named


class Columns(NamedTuple):
    """Where rows hold what is asked and answered; None: guessed from the header."""

    prompt: str | None = None
    answer: str | None = None
    template: str | None = None  # of the prompt, columns in braces


def fit(
    rows: str | Path | list[dict],
    subject: Subject,
    options: FitOptions | None = None,
    columns: Columns | tuple = (),
    unlabelled: str | Path | Sequence[dict] = (),
    keep: Path | None = None,
    bar: Callable = lambda label, total: tqdm(disable=True),
) -> Predictor:
    """Cross-validate on `rows`, choose, train that on all: a Predictor (`.report`, `.predict(rows)`, `.save(dir)`).

    With `options.context` the rows need no answers: they are the queries that the model answers when it sees that text.
    `unlabelled` rows join IA2's queries: the teacher answers them. With `keep`, a folder, an interrupted fit goes on.
    Raises UsageError for whatever is wrong with rows, columns or options.

        fitted = fit("tickets.csv", open_subject("llama-3.2-1b"))
        print(fitted.report["sentence"])
    """
    options, columns = options or FitOptions(), Columns(*columns)
    rows, task = read_own(rows, columns, bool(options.context))
    chat: Callable = str
    if options.chat:
        chat = ChatTemplate(subject.folder, subject.tokenizer)
        subject = replace(subject, tokenizer=chat.tokenizer)
    if options.context:
        examples = answered([chat(fill(task.prompt, row)) for row in rows], subject, options)
        task = replace(task, max_tokens=options.max_tokens)
    else:
        if columns.template is None and not options.chat:
            task = keep_apart(task, rows, subject.tokenizer)
        examples = [replace(e, prompt=chat(e.prompt)) for e in map(task.example, rows)]
        if not task.labels:
            task = replace(task, max_tokens=answer_tokens_at_most(subject.tokenizer, examples))
    examples = list(dict.fromkeys(examples))
    more = [Example(chat(fill(task.prompt, row)), "") for row in as_rows(unlabelled)]
    cv = CrossValidation(subject, task, examples, options, more, bar=bar)
    if keep is not None:
        what: dict = {"ia2mini": __version__, "options": asdict(options)}
        what |= {"checkpoint": checkpoint_digest(subject.folder), "dtype": str(next(subject.model.parameters()).dtype)}
        what["rows"] = [(str(e.prompt), e.answer) for e in examples + more]
        cv.once = RunFolder(keep, "unfinished", what).once
    fitted = conclude(cv)
    fitted.report["remarks"] += remarks(rows, task, examples)
    fitted.report["remarks"] += far_longer(rows, subject.tokenizer.count([fill(task.prompt, row) for row in rows]))
    return fitted


def read_own(rows: str | Path | list[dict], columns: tuple = (), queries: bool = False) -> tuple[list[Row], Task]:
    """One's own rows, and the task that they describe; `queries` have no answers. Raises UsageError."""
    if not (rows := as_rows(rows)):
        raise UsageError("no rows to fit")
    name = plain(Path(re.split(r":| ?row ", rows[0].where)[0]).stem, "") or "rows"
    return rows, queries_task(rows, name, *columns) if queries else own_task(rows, name, *columns)


def answered(prompts: list[str], subject: Subject, options: FitOptions) -> list[Example]:
    """What the model answers to each prompt when it sees the context before it."""
    shown, tokenizer = [Example(options.context, "")], subject.tokenizer
    for prompt in prompts:
        tokens = len(tokenizer.encode(with_demonstrations(shown, prompt))) + options.max_tokens - 1
        subject.check_room(prompt, tokens, "behind the context: cut that, or use a smaller --max-tokens")
    model, ids = share_prefix(subject.model, tokenizer, [shown], prompts)
    how = Decoding(options.max_tokens, None if options.chat else STOP)  # a turn ends by its own token
    responses = map(tokenizer.decode, generate(model, tokenizer, ids, how))
    return [Example(prompt, response) for prompt, response in zip(prompts, responses)]


def conclude(cv: CrossValidation) -> Predictor:
    """The choice among all candidates, trained on every row, with its report."""
    begun, o, task = time.perf_counter(), cv.options, cv.task
    candidates = {name: cv.candidate(name) for name in ("base", "icl", *o.methods)}
    if task.labels and (probe := cv.probe()):
        candidates["probe"] = probe
    chosen = candidates[choose(candidates)]
    adapter, theta = None, None
    if chosen.name in METHODS:
        adapter = cv.adapter
        theta = cv.once("final", lambda: {"theta": cv.final(chosen)})["theta"].to(device_of(cv.subject.model))
    shown = cv.shown(cv.rows, seeded(o.seed, len(cv.folds), "icl"))
    spec: dict = {"template": task.prompt, "answer_column": task.label, "labels": list(task.labels)}
    spec |= {"max_tokens": cv.max_tokens, "stop": cv.stop, "method": chosen.name, "temperature": chosen.temperature}
    spec |= {"rate": cv.rates[chosen.rate] if adapter else None, "example": question(cv.rows[0].prompt)}
    spec["demonstrations"] = [{"prompt": question(e.prompt), "answer": e.answer} for e in shown]
    spec |= {"parser": task.parser, "chat": o.chat, "context": bool(o.context)}
    report = make_report(cv, candidates, chosen)
    spec["confidences"] = [row["confidence"] for row in report["held_out"]]
    return Predictor(cv.subject, adapter, theta, spec, report | {"seconds": time.perf_counter() - begun})


def question(prompt: str) -> str:
    """A prompt as its template filled it, before it became a turn of a chat."""
    return getattr(prompt, "question", prompt)


def make_report(cv: CrossValidation, candidates: dict[str, Candidate], chosen: Candidate) -> dict:
    """The numbers that a person should know, the sentence, and every held-out row with what was said of it."""
    task, gold, found = cv.task, cv.gold, {}
    held: list[dict] = [{"prompt": question(row.prompt), "true": row.answer} for row in cv.rows]
    for name, candidate in candidates.items():
        if task.labels:
            shares, best = (candidate.scores / candidate.temperature).softmax(-1), candidate.scores.argmax(-1)
            said, sure, right = [task.labels[i] for i in best], shares.max(-1).values.tolist(), best == gold
        else:
            said, sure = cv.texts(candidate)
            right = torch.tensor([same_answer(task.parser, t, row.answer) for t, row in zip(said, cv.rows)])
        found[name] = measures(candidate.scores, gold, candidate.temperature, None if task.labels else right)
        if candidate is chosen:
            for row, answer, p, hit in zip(held, said, sure, right.tolist()):
                row |= {"said": answer, "confidence": p, "right": hit}
            for row, p in zip(held, shares.tolist() if task.labels else ()):
                row["probabilities"] = dict(zip(task.labels, p))
    query = fmean(cv.tokens(row.prompt) for row in cv.rows)
    shown = fmean(sum(cv.tokens(f"{e.prompt}{e.answer}\n\n") for e in fold.icl[0]) for fold in cv.folds)
    about = {"name": task.name, "model": cv.subject.name, "rows": len(cv.rows), "folds": len(cv.folds)}
    about |= {"chosen": chosen.name, "tokens": {"query": query, "icl": query + shown}}
    about |= {"candidates": found, "remarks": list(cv.troubles)}
    if "sft" in candidates and not cv.options.context:
        behind = candidates["icl"].losses - candidates["sft"].losses
        about["icl_behind"] = bool(behind.mean() > 1.96 * behind.std() / len(behind) ** 0.5)
    if task.labels:
        about |= classes(chosen.scores, gold, task.labels)
    if cv.options.context:
        about["kl"] = {name: one["nll"][0] for name, one in found.items()}
    return about | {"sentence": sentence(about), "held_out": held}


def remarks(rows: list[Row], task: Task, examples: list[Example]) -> list[str]:
    """What is odd about the rows, in sentences."""
    said = near_labels(task.labels)
    if repeats := len(rows) - len(examples):
        said.append(f"{count(repeats, 'row')} repeated another and counted once")
    if contrary := len(examples) - len({e.prompt for e in examples}):
        said.append(f"{count(contrary, 'row')} had the prompt of another row but a different answer")
    if rare := [label for i, label in enumerate(task.labels) if sum(e.label == i for e in examples) == 1]:
        named = ", ".join(map(repr, rare))
        said.append(f"only one row has the answer {named}: held out, nothing like it was trained on")
    return said


def far_longer(rows: list[Row], lengths: list[int]) -> list[str]:
    """A sentence for each row that is far longer than the others, of `lengths` in tokens."""
    usual = median(lengths)
    said = []
    for row, tokens in zip(rows, lengths):
        if tokens > max(LONG, FAR * usual):
            costs = "it takes most of the time; cut it, or leave it out"
            said.append(f"{row.where} has {tokens} tokens, half of the rows have at most {usual:.0f}: {costs}")
    return said
