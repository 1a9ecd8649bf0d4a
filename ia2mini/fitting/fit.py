"""From a user's rows to an adapter: cross-validate, choose, and train the choice on every row."""

import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

from .. import UsageError, __version__
from ..engine.options import FitOptions
from ..engine.progress import progress
from ..engine.store import Store, checkpoint_digest
from ..engine.subject import Subject, max_answer_tokens
from ..episode import seeded, with_demonstrations
from ..files import plural
from ..generate import generate
from ..methods import METHODS
from ..prefix import share_prefix
from ..scale.decode import decoding_for
from ..tasks import Example, Task
from ..tasks.own import complete_rows
from ..tasks.rows import Row, as_rows, only_column
from ..tasks.turns import open_turns
from .crossval import (
    CrossValidation,
    check_number,
    check_options,
    choose_demonstrations,
    stop_text,
)
from .held_out import answer_held_out, fit_final_probe
from .predictor import Predictor
from .report import Choice, make_report, question
from .rows import Columns, read_own, remarks
from .selection import HeldOut, choose
from .training import train_final, train_folds


def fit(
    rows,
    subject: Subject,
    options: FitOptions | None = None,
    columns: Columns | tuple = (),
    unlabelled=(),
    keep: Path | None = None,
    bar: Callable = progress,
) -> Predictor:
    """Cross-validate on `rows`, choose, train that on all: a Predictor (`.report`, `.predict(rows)`, `.save(dir)`).

    `rows`: a file's name, dicts of columns, or a pandas DataFrame. `columns`: which hold prompt and answer, a template,
    and whether the answers are "labels" or "text"; what is None is seen from the rows.
    With `options.context` the rows need no answers: they are the queries that the model answers when it sees that text.
    `unlabelled` rows join IA2's queries: the teacher answers them. With `keep`, a folder, an interrupted fit goes on.
    `bar` shows on stderr how far it is; `engine.progress.silent` shows nothing.
    Raises UsageError for whatever is wrong with rows, columns or options.

        fitted = fit("tickets.csv", open_subject("llama-3.2-1b"))
        print(fitted.report["sentence"])
    """
    begun = time.perf_counter()
    cv = prepare_fit(rows, subject, options or FitOptions(), columns, unlabelled)
    cv.bar = bar
    if keep is not None:
        cv.store = open_store(cv, keep)
    trained = train_folds(cv)
    held_out = answer_held_out(cv, trained)
    choice = make_choice(cv, held_out)
    report = make_report(cv, held_out, choice)
    predictor = ship(cv, choice, report)
    predictor.report["seconds"] = time.perf_counter() - begun
    return predictor


def prepare_fit(
    rows, subject: Subject, options: FitOptions, columns: Columns | tuple = (), unlabelled=()
) -> CrossValidation:
    """Rows in folds, before anything is trained. Raises UsageError.

    With a context this is a pass of the model: it answers every prompt.
    """
    rows, task = read_own(rows, columns, bool(options.context), options.chat)
    check_options(options, task)
    as_turn: Callable = str
    if options.chat:
        subject, as_turn = subject.in_turns(task.prompt)
        task = replace(task, prompt=task.prompt.rstrip(" "))  # an answer begins its turn
    prompts = [render_turn(as_turn, task, row) for row in rows]
    check_number(prompts)
    queries = as_rows(unlabelled, only_column(task.prompt))
    queries = [open_turns(row, task.prompt) for row in queries]
    queries, remarks_on_queries = complete_rows(queries, task.prompt, None)
    unlabelled_examples = [Example(render_turn(as_turn, task, row), "") for row in queries]
    if options.context:
        task = replace(task, max_tokens=options.max_tokens)
        more_prompts = [example.prompt for example in unlabelled_examples]
        check_context(prompts + more_prompts, subject, options)
        examples = answer_with_context(prompts, subject, options)
    else:
        examples = [replace(task.example(row), prompt=prompt) for row, prompt in zip(rows, prompts)]
        if not task.labels:
            task = replace(task, max_tokens=max_answer_tokens(subject.tokenizer, examples))
    examples = list(dict.fromkeys(examples))  # a repeated row counts once
    cv = CrossValidation(subject, task, examples, options, unlabelled_examples)
    if queries:
        more = plural(len(queries), "row")
        remarks_on_queries += [
            f"{more} without answers joined: the teacher answers them, IA2 learns from that"
        ]
    cv.remarks = remarks_on_queries + remarks(rows, task, examples, subject.tokenizer)
    return cv


def render_turn(as_turn: Callable, task: Task, row: Row) -> str:
    """The prompt of a row as a turn. Raises UsageError, with the row's place, for one that the template refuses."""
    text = task.prompt_of(row)
    try:
        return as_turn(text)
    except UsageError as error:
        raise UsageError(f"{row.where}: {error}") from None


def check_context(prompts: list[str], subject: Subject, options: FitOptions) -> None:
    """Raises UsageError if the context leaves no room for a prompt and its answer."""
    context = [Example(options.context, "")]
    for prompt in prompts:
        tokens = len(subject.tokenizer.encode(with_demonstrations(context, prompt)))
        mend = "with the context: cut that, or use a smaller --max-tokens"
        subject.check_room(prompt, tokens + options.max_tokens - 1, mend)


def answer_with_context(prompts: list[str], subject: Subject, options: FitOptions) -> list[Example]:
    """The model's answers to prompts after the context."""
    tokenizer = subject.tokenizer
    context = [Example(options.context, "")]
    model, ids = share_prefix(subject.model, tokenizer, [context], prompts)
    decoding = decoding_for(subject.model, options.max_tokens, stop_text(options))
    responses = map(tokenizer.decode, generate(model, tokenizer, ids, decoding))
    return [Example(prompt, response) for prompt, response in zip(prompts, responses)]


def open_store(cv: CrossValidation, folder: Path) -> Store:
    """The store from which an interrupted fit resumes; another fit has another one.

    With a context the answers are part of what it is named by, so that a resumed fit generates them again.
    """
    rows = cv.rows + cv.unlabelled
    what = {
        "ia2mini": __version__,
        "options": asdict(cv.options),
        "checkpoint": checkpoint_digest(cv.subject.folder),
        "dtype": cv.subject.dtype,
        "rows": [(str(row.prompt), row.answer) for row in rows],
        "labels": cv.task.labels,
    }
    return Store(folder, "unfinished", what)


def make_choice(cv: CrossValidation, held_out: dict[str, HeldOut]) -> Choice:
    """The candidate to ship: the one that --ship names, else by `choose`."""
    every = range(len(cv.folds))
    candidates = cv.selection.candidates(held_out, every)
    wanted = cv.options.ship
    if wanted:
        chosen = candidates[wanted]
        return Choice(candidates, chosen, chosen, [wanted] * len(cv.folds))
    may_ship = dict(candidates)
    judged = dict(held_out)
    if cv.options.context:  # ICL is the teacher itself
        del may_ship["icl"]
        del judged["icl"]
    name = choose(may_ship)
    nested, chosen_by_fold = cv.selection.judge_the_choice(judged)
    return Choice(candidates, candidates[name], nested, chosen_by_fold)


def ship(cv: CrossValidation, choice: Choice, report: dict) -> Predictor:
    """Train the chosen candidate on every row, with everything that it needs to answer new rows."""
    chosen = choice.chosen
    options = cv.options
    adapter = None
    theta = None
    probe = None
    if chosen.name in METHODS:
        adapter = cv.adapter
        theta = train_final(cv, chosen)
    if chosen.name == "probe":
        probe = fit_final_probe(cv, chosen)
    rng = seeded(options.seed, len(cv.folds), "icl")  # draws that no fold has made
    demonstrations = []
    for example in choose_demonstrations(cv, cv.rows, rng):
        demonstrations.append({"prompt": question(example.prompt), "answer": example.answer})
    spec = {
        "template": cv.task.prompt,
        "answer_column": cv.task.answer_column,
        "labels": list(cv.task.labels),
        "max_tokens": cv.max_tokens,
        "stop": cv.stop,
        "method": chosen.name,
        "temperature": chosen.temperature,
        "rate": cv.rates[chosen.setting] if adapter else None,
        "epochs": options.epochs if adapter else None,
        "example": question(cv.rows[0].prompt),
        "demonstrations": demonstrations,
        "parser": cv.task.parser,
        "chat": options.chat,
        "context": bool(options.context),
        "confidences": [row["confidence"] for row in report["held_out"]],
    }
    return Predictor(cv.subject, adapter, theta, spec, report, probe)
