"""From one's own rows to an adapter that can be trusted: cross-validate, choose, train the choice on every row."""

import re
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from statistics import fmean, median
from typing import NamedTuple

from .. import UsageError, __version__
from ..engine.intervals import sign_test
from ..engine.options import FitOptions
from ..engine.store import Store, checkpoint_digest
from ..engine.subject import Subject
from ..episode import seeded, with_demonstrations
from ..files import count, plain
from ..generate import STOP, Decoding, generate
from ..methods import METHODS
from ..models.taps import device_of
from ..prefix import share_prefix
from ..scale.decode import fast_decoding
from ..tasks import Example, Task
from ..tasks.chat import ChatTemplate
from ..tasks.own import complete_rows, near_labels, own_task, queries_task
from ..tasks.rows import Row, as_rows, only_column
from ..tasks.turns import ALL_TURNS, ANSWER, holds_turns, open_turns
from ..teacher import answer_tokens_at_most
from .crossval import CrossValidation
from .measures import classes, measures
from .predictor import Predictor
from .selection import COMMONEST, UNSHIPPED, Candidate, choose
from .sentence import sentence

LONG, FAR = 500, 10  # tokens, and times the median: from both on a row is named


class Columns(NamedTuple):
    """Where rows hold what is asked and answered; None: guessed from the header."""

    prompt: str | None = None
    answer: str | None = None
    template: str | None = None  # of the prompt, columns in braces
    answers: str | None = None  # "labels" or "text"; None: as they repeat


def fit(
    rows,
    subject: Subject,
    options: FitOptions | None = None,
    columns: Columns | tuple = (),
    unlabelled=(),
    keep: Path | None = None,
    bar: Callable | None = None,
) -> Predictor:
    """Cross-validate on `rows`, choose, train that on all: a Predictor (`.report`, `.predict(rows)`, `.save(dir)`).

    `rows`: a file's name, dicts of columns, or a pandas DataFrame. `columns`: which hold prompt and answer, a template,
    and whether the answers are "labels" or "text"; what is None is seen from the rows.
    With `options.context` the rows need no answers: they are the queries that the model answers when it sees that text.
    `unlabelled` rows join IA2's queries: the teacher answers them. With `keep`, a folder, an interrupted fit goes on.
    Raises UsageError for whatever is wrong with rows, columns or options.

        fitted = fit("tickets.csv", open_subject("llama-3.2-1b"))
        print(fitted.report["sentence"])
    """
    cv, odd = cross_validation(
        rows, subject, options or FitOptions(), columns, unlabelled, keep, bar
    )
    fitted = conclude(cv)
    fitted.report["remarks"] += odd
    return fitted


def cross_validation(
    rows,
    subject: Subject,
    options: FitOptions,
    columns: tuple = (),
    unlabelled=(),
    keep=None,
    bar=None,
) -> tuple[CrossValidation, list[str]]:
    """The cross-validation that `fit` concludes, before anything is computed; what is odd about the rows."""
    columns = Columns(*columns)
    rows, task = read_own(rows, columns, bool(options.context), options.chat)
    chat: Callable = str
    if options.chat:
        chat = ChatTemplate(subject.folder, subject.tokenizer, task.prompt == ALL_TURNS)
        subject = replace(subject, tokenizer=chat.tokenizer)
        task = replace(task, prompt=task.prompt.rstrip(" "))  # an answer begins its turn
    if options.context:
        examples = answered([chat(task.asked(row)) for row in rows], subject, options)
        task = replace(task, max_tokens=options.max_tokens)
    else:
        examples = [replace(e, prompt=chat(e.prompt)) for e in map(task.example, rows)]
        if not task.labels:
            task = replace(task, max_tokens=answer_tokens_at_most(subject.tokenizer, examples))
    examples = list(dict.fromkeys(examples))
    queries = [
        open_turns(row, task.prompt) for row in as_rows(unlabelled, only_column(task.prompt))
    ]
    lacking: list[str] = []
    if queries:
        queries, lacking = complete_rows(queries, replace(task, answer=""))
    more = [Example(chat(task.asked(row)), "") for row in queries]
    cv = CrossValidation(subject, task, examples, options, more)
    if bar is not None:
        cv.bar = bar
    if keep is not None:
        what = {
            "ia2mini": __version__,
            "options": asdict(options),
            "checkpoint": checkpoint_digest(subject.folder),
            "dtype": subject.dtype,
            "rows": [(str(e.prompt), e.answer) for e in examples + more],
            "labels": task.labels,
        }
        cv.once = Store(keep, "unfinished", what).once
    odd = [*lacking, *remarks(rows, task, examples)]
    odd += far_longer(rows, subject.tokenizer.count([task.asked(row) for row in rows]))
    return cv, odd


def read_own(
    rows, columns: tuple = (), queries: bool = False, chat: bool = False
) -> tuple[list[Row], Task]:
    """One's own rows that have all that is needed, and the task that they describe; `queries` have no answers.

    `task.remarks` says how they were read, and which were left out. Raises UsageError.
    """
    rows = as_rows(rows)
    columns = Columns(*columns)
    if not rows:
        raise UsageError("no rows to fit")
    if any(holds_turns(row) for row in rows):
        columns = columns_of_turns(columns, rows[0].where, chat)
        rows = [open_turns(row, columns.template) for row in rows]
    name = plain(Path(re.split(r":| ?row ", rows[0].where)[0]).stem, "") or "rows"
    if queries:
        task = queries_task(rows, name, columns.prompt, columns.template)
    else:
        task = own_task(rows, name, *columns)
    return complete_rows(rows, task)[0], task


def columns_of_turns(columns: Columns, where: str, chat: bool) -> Columns:
    """The columns of rows that hold conversations. Raises UsageError where nothing says how they are asked."""
    template = columns.template
    if template is None and chat:
        template = ALL_TURNS
    if template in (None, ALL_TURNS) and not chat:
        mend = "give --chat, or a template of its system's and user's turn: --template '{user}\\nLabel:'"
        raise UsageError(f"{where}: a conversation (messages): {mend}")
    return columns._replace(template=template, answer=columns.answer or ANSWER)


def answered(prompts: list[str], subject: Subject, options: FitOptions) -> list[Example]:
    """What the model answers to each prompt when it sees the context before it."""
    shown, tokenizer = [Example(options.context, "")], subject.tokenizer
    for prompt in prompts:
        tokens = len(tokenizer.encode(with_demonstrations(shown, prompt))) + options.max_tokens - 1
        subject.check_room(
            prompt, tokens, "behind the context: cut that, or use a smaller --max-tokens"
        )
    model, ids = share_prefix(subject.model, tokenizer, [shown], prompts)
    stop = None if options.chat else STOP  # a turn ends by its own token
    hooks = fast_decoding(device_of(subject.model), options.max_tokens)
    how = Decoding(options.max_tokens, stop, hooks=hooks)
    responses = map(tokenizer.decode, generate(model, tokenizer, ids, how))
    return [Example(prompt, response) for prompt, response in zip(prompts, responses)]


def conclude(cv: CrossValidation) -> Predictor:
    """The choice among all candidates, trained on every row, with its report."""
    begun = time.perf_counter()
    options, task = cv.options, cv.task
    tried = [cv.tried(name) for name in cv.names]
    found = cv.selection.judged(tried, range(len(cv.folds)))
    # with a context ICL is the teacher itself
    may_ship = [each for each in tried if not (options.context and each.name == "icl")]
    names = {each.name for each in may_ship} | {COMMONEST}
    if options.ship:
        chosen = found[options.ship]
        shipped = chosen, [options.ship] * len(cv.folds)
    else:
        chosen = found[choose({name: one for name, one in found.items() if name in names})]
        shipped = cv.selection.shipped(may_ship)
    report = make_report(cv, found, chosen, shipped)
    adapter, theta, probe = None, None, None
    if chosen.name in METHODS:
        adapter = cv.adapter
        kept = cv.once(f"final-{chosen.name}", lambda: {"theta": cv.final(chosen)})
        theta = kept["theta"].to(device_of(cv.subject.model))
    if chosen.name == "probe":
        probe = cv.final_probe(chosen)
    shown = cv.shown(cv.rows, seeded(options.seed, len(cv.folds), "icl"))
    spec = {
        "template": task.prompt,
        "answer_column": task.label,
        "labels": list(task.labels),
        "max_tokens": cv.max_tokens,
        "stop": cv.stop,
        "method": chosen.name,
        "temperature": chosen.temperature,
        "rate": cv.rates[chosen.setting] if adapter else None,
        "epochs": options.epochs if adapter else None,
        "example": question(cv.rows[0].prompt),
        "demonstrations": [{"prompt": question(e.prompt), "answer": e.answer} for e in shown],
        "parser": task.parser,
        "chat": options.chat,
        "context": bool(options.context),
        "confidences": [row["confidence"] for row in report["held_out"]],
    }
    report["seconds"] = time.perf_counter() - begun
    return Predictor(cv.subject, adapter, theta, spec, report, probe)


def question(prompt: str) -> str:
    """A prompt as its template filled it, before it became a turn of a chat."""
    return getattr(prompt, "question", prompt)


def make_report(
    cv: CrossValidation, found: dict[str, Candidate], chosen: Candidate, shipped: tuple
) -> dict:
    """The numbers that a person should know, the sentence, and every held-out row with what was said of it.

    `shipped`: what the whole choice says of held-out rows, and which candidate it takes for each fold.
    """
    task = cv.task
    whole, choices = shipped
    numbers = {name: measured(cv, one) for name, one in found.items()}
    query = fmean(cv.tokens(row.prompt) for row in cv.rows)
    shown = fmean(
        sum(cv.tokens(f"{e.prompt}{e.answer}\n\n") for e in fold.icl[0]) for fold in cv.folds
    )
    about = {
        "name": task.name,
        "model": cv.subject.name,
        "rows": len(cv.rows),
        "folds": len(cv.folds),
        "chosen": chosen.name,
        "chosen_by_fold": choices,
        "wanted": bool(cv.options.ship),
        "tokens": {"query": query, "icl": query + shown},
        "temperature": chosen.temperature,
        "calibration": chosen.calibration,
        "candidates": numbers,
        "shipped": measured(cv, whole),
        "remarks": list(cv.troubles),
        "all_differ": len({row.answer for row in cv.rows}) == len(cv.rows),
        "against": {name: against(whole, found[name]) for name in rivals(found, chosen, cv)},
        "nearest": nearest(found),
    }
    if task.labels:
        about.update(classes(chosen.scores, cv.gold, task.labels))
    if cv.options.context:
        about["kl"] = {name: one["nll"][0] for name, one in numbers.items()}
    about["sentence"] = sentence(about)
    about["held_out"] = held_out(cv, chosen)
    return about


def nearest(found: dict[str, Candidate]) -> tuple | None:
    """The candidate with the lowest loss that is below the base's, and `against` the base; None: there is none."""
    losses = {name: one.losses.mean().item() for name, one in found.items()}
    able = [name for name in found if name not in UNSHIPPED and losses[name] < losses["base"]]
    if not able:
        return None
    best = min(able, key=losses.__getitem__)
    return best, *against(found[best], found["base"])


def rivals(found: dict[str, Candidate], chosen: Candidate, cv: CrossValidation) -> list[str]:
    """What the shipped one is compared with, row by row; with a context ICL is what it is compared with already."""
    names = ["base", "sft"] if cv.options.context else ["base", "icl", "sft"]
    return [name for name in names if name in found and name != chosen.name]


def measured(cv: CrossValidation, one: Candidate) -> dict:
    temperatures = 1.0 if one.temperatures is None else one.temperatures
    return measures(one.scores, cv.gold, temperatures, None if cv.task.labels else one.right)


def against(one: Candidate, other: Candidate) -> tuple[int, int, float]:
    """On how many rows only one of two is right, and only the other; the sign test's p."""
    more = int((one.right & ~other.right).sum())
    less = int((other.right & ~one.right).sum())
    return more, less, sign_test(more, less)


def held_out(cv: CrossValidation, chosen: Candidate) -> list[dict]:
    """Every row with what the chosen candidate's folds, which have not seen it, say of it."""
    labels, held = cv.task.labels, []
    if labels:
        shares = (chosen.scores / chosen.temperatures[:, None]).softmax(-1)
        texts, sure = [labels[i] for i in shares.argmax(-1)], shares.max(-1).values.tolist()
    else:
        texts, sure = cv.said[chosen.name]
    for i, row in enumerate(cv.rows):
        about = {
            "prompt": question(row.prompt),
            "true": row.answer.removeprefix(cv.task.blank),
            "said": texts[i],
            "confidence": sure[i],
        }
        about["right"] = bool(chosen.right[i])
        if labels:
            about["probabilities"] = dict(zip(labels, shares[i].tolist()))
        held.append(about)
    return held


def remarks(rows: list[Row], task: Task, examples: list[Example]) -> list[str]:
    """What is odd about the rows, and how they were read, in sentences."""
    said = near_labels(task.labels)
    if repeats := len(rows) - len(examples):
        said.append(f"{count(repeats, 'row')} repeated another and counted once")
    if contrary := len(examples) - len({e.prompt for e in examples}):
        said.append(
            f"{count(contrary, 'row')} had the prompt of another row but a different answer"
        )
    if not task.labels and len(examples) > 1 and len({e.answer for e in examples}) == len(examples):
        said.append("every row has another answer, so that answers are read as text")
    if rare := [
        label for i, label in enumerate(task.labels) if sum(e.label == i for e in examples) == 1
    ]:
        named = ", ".join(map(repr, rare))
        said.append(
            f"only one row has the answer {named}: held out, nothing like it was trained on"
        )
    return said + list(task.remarks)


def far_longer(rows: list[Row], lengths: list[int]) -> list[str]:
    """A sentence for each row that is far longer than the others, of `lengths` in tokens."""
    usual = median(lengths)
    said = []
    for row, tokens in zip(rows, lengths):
        if tokens > max(LONG, FAR * usual):
            costs = "it takes most of the time; cut it, or leave it out"
            said.append(
                f"{row.where} has {tokens} tokens, half of the rows have at most {usual:.0f}: {costs}"
            )
    return said
