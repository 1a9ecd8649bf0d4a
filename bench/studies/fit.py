"""`fit`: does what `ia2mini fit` ships harm, and is it told what it is worth? On generated tasks and on real rows."""

import random
import re
from collections import Counter
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from pathlib import Path
from statistics import fmean

import click
import torch

from ia2mini import UsageError, metrics
from ia2mini.engine.intervals import paired_test
from ia2mini.engine.options import FitOptions
from ia2mini.engine.store import Store, checkpoint_digest
from ia2mini.engine.subject import Subject, open_subject
from ia2mini.fitting.crossval import CrossValidation
from ia2mini.fitting.fit import make_choice, prepare_fit, ship
from ia2mini.fitting.held_out import answer_held_out, fit_final_probe
from ia2mini.fitting.predictor import Predictor
from ia2mini.fitting.report import Choice, make_report
from ia2mini.fitting.rows import Columns
from ia2mini.fitting.selection import Candidate
from ia2mini.fitting.training import train_final, train_folds
from ia2mini.methods import METHODS
from ia2mini.report.summary import interval
from ia2mini.tasks import world
from ia2mini.tasks.rows import read_rows

from ..report import Line, Result
from .reopened import RUNS

TOYS = ("toy-mood", "toy-topic", "toy-mood-flip", "toy-mood-remap")
# what generated tasks are, in turn
KINDS = ("words", "words", "words", "digits", "digits", "pair", "length", "random")
# folder -> column of the text, file of fresh rows, words of the labels; the cheapest first
REAL = {
    "sst2": ("sentence", "validation", ("negative", "positive")),
    "poem_sentiment": ("verse_text", "test", ("negative", "positive", "neutral", "mixed")),
    "financial_phrasebank": ("sentence", "test", ("negative", "neutral", "positive")),
    "ag_news": ("text", "test", ("World", "Sports", "Business", "Technology")),
}
# how a person would call the two columns; `fit` makes its prompt from these names
CALLED = {
    "sst2": {"text": "review", "label": "sentiment"},
    "poem_sentiment": {"text": "verse", "label": "mood"},
    "financial_phrasebank": {"text": "news", "label": "sentiment"},
    "ag_news": {"text": "news", "label": "topic"},
}
FRESH = 500  # rows of a generated task that were neither trained on nor held out
SOME = 200  # the same of real rows, at most
RIVALS = ("base", "icl", "sft")
POINTS = 2.0  # that what is shipped may lose against the best of these


@dataclass
class Trial:
    """One fit: the accuracy (%) on fresh rows of what it ships and of every candidate, and what was known of it."""

    accuracy: dict[str, float]
    nll: dict[str, float]  # on the same fresh rows
    ece: dict[str, float]
    held_out: dict[str, float]  # accuracy (%) on its own rows, by cross-validation
    losses: dict[str, list[float]]  # of its own rows, held out
    right: dict[str, list[bool]]
    shipped: str
    choices: list[str]  # what the rule takes for each fold, without its rows
    stated: list[float]  # accuracy (%) of what is shipped, as the report says it: mean, low, high

    @property
    def lost(self) -> float:
        """Points of accuracy behind the best of base, ICL and SFT."""
        return max(self.accuracy[name] for name in RIVALS) - self.accuracy[self.shipped]

    @property
    def held(self) -> bool:
        """Whether the stated interval holds the accuracy on fresh rows."""
        _, low, high = self.stated
        return low <= self.accuracy[self.shipped] <= high


def trial(
    subject: Subject,
    rows: list[dict],
    fresh: list[dict],
    options: FitOptions,
    store: Store | None = None,
) -> Trial:
    """Fit `rows`; what is shipped and each candidate, trained on all rows at its own rate, answer `fresh` ones."""
    cv = prepare_fit(rows, subject, options, columns_of(rows))
    if store is not None:
        cv.store = store
    fitted, choice = fit_folds(cv)
    found = choice.candidates
    gold = torch.tensor([cv.task.labels.index(row[cv.task.answer_column]) for row in fresh])
    accuracy = {}
    nll = {}
    ece = {}
    for name in cv.candidate_names:
        candidate = found[name]
        make = partial(fresh_scores, cv, fitted, candidate, fresh)
        scores = cv.store.once(f"fresh-{name}", make)["scores"] / candidate.temperature
        accuracy[name] = 100 * (scores.argmax(-1) == gold).double().mean().item()
        nll[name] = metrics.row_losses(scores, gold).mean().item()
        highest = scores.double().softmax(-1).max(-1)
        ece[name] = metrics.ece(highest.values, highest.indices == gold)
    report = fitted.report
    return Trial(
        accuracy=accuracy,
        nll=nll,
        ece=ece,
        held_out={name: 100 * one["acc"][0] for name, one in report["candidates"].items()},
        losses={name: one.losses.tolist() for name, one in found.items()},
        right={name: one.right.tolist() for name, one in found.items()},
        shipped=report["chosen"],
        choices=report["chosen_by_fold"],
        stated=[100 * share for share in report["shipped"]["acc"]],
    )


def fit_folds(cv: CrossValidation) -> tuple[Predictor, Choice]:
    """What `fit` does with rows in folds: what it ships, and of which candidates."""
    held_out = answer_held_out(cv, train_folds(cv))
    choice = make_choice(cv, held_out)
    return ship(cv, choice, make_report(cv, held_out, choice)), choice


def fresh_scores(
    cv: CrossValidation, fitted: Predictor, candidate: Candidate, fresh: list[dict]
) -> dict:
    """Log-probabilities [rows, C], "scores", of the labels of fresh rows by a candidate trained on every row."""
    answers = alone(cv, fitted, candidate).full_answers(fresh)
    return {"scores": torch.tensor([answer["log_probabilities"] for _, answer in answers])}


def alone(cv: CrossValidation, fitted: Predictor, candidate: Candidate) -> Predictor:
    """A candidate, trained on every row, as if it had been chosen; its temperature is 1."""
    name = candidate.name
    adapter = None
    theta = None
    if name in METHODS:
        adapter = cv.adapter
        theta = train_final(cv, candidate)
    probe = fit_final_probe(cv, candidate) if name == "probe" else None
    spec = {**fitted.spec, "method": name, "temperature": 1.0}
    return Predictor(cv.subject, adapter, theta, spec, probe=probe)


def generated(number: int, kinds: tuple[str, ...] = KINDS) -> tuple[str, list[dict], list[dict]]:
    """Toy task `number`: what it asks, 12 to 24 rows and `FRESH` more.

    Labels are random words or digits for the values of one attribute; for whether two of them agree in being the first
    of their values ("pair", which the model has never learned in context) or for long and short sentences ("length");
    or drawn anew for each row, so that nothing can be learned ("random").
    """
    rng = random.Random(f"fit {number}")
    kind = kinds[number % len(kinds)]
    attribute, other = rng.sample(list(world.ATTRIBUTES), 2)
    values = list(world.ATTRIBUTES[attribute])
    style = rng.choice(list(world.WORLD["styles"]))
    size = len(values) if kind in ("words", "digits") else 2
    names = label_names(rng, kind, size)

    def row(split: str) -> dict:
        shown, text = toy_sentence(rng, style, (attribute, other), split)
        first = [shown[name] == next(iter(world.ATTRIBUTES[name])) for name in (attribute, other)]
        known = {"pair": first[0] == first[1], "length": len(shown) > 3, "random": rng.randrange(2)}
        return {"text": text, "label": names[int(known.get(kind, values.index(shown[attribute])))]}

    while True:
        rows = [row("train") for _ in range(rng.randrange(12, 25))]
        if len({row["label"] for row in rows}) == size and 2 * size <= len(rows):
            return (
                f"{kind} {number}: {attribute}, {style}",
                rows,
                [row("eval") for _ in range(FRESH)],
            )


def label_names(rng: random.Random, kind: str, size: int) -> list[str]:
    """Different words of the world, or the first digits in any order."""
    vocabulary = {
        word for group in world.ATTRIBUTES.values() for words in group.values() for word in words
    }
    names = rng.sample([word for word in sorted(vocabulary) if re.fullmatch("[a-z]+", word)], size)
    if kind == "digits":
        names = rng.sample([str(i) for i in range(size)], size)
    return names


def toy_sentence(
    rng: random.Random, style: str, asked: tuple[str, str], split: str
) -> tuple[dict[str, str], str]:
    """A sentence of a split that shows two attributes, and up to two others: the value of each, and the text."""
    rest = [name for name in world.ATTRIBUTES if name not in asked]
    while True:
        shown = {name: rng.choice(list(world.ATTRIBUTES[name])) for name in asked}
        for name in rng.sample(rest, rng.choice((0, 1, 2))):
            shown[name] = rng.choice(list(world.ATTRIBUTES[name]))
        text = world.write_sentence(rng, style, shown)
        if world.split_of(text) == split:
            return shown, text


def line(what: str, trial: Trial) -> Line:
    rates = {f"% {name}": right for name, right in trial.accuracy.items()}
    rates.update({f"NLL {name}": loss for name, loss in trial.nll.items()})
    rates.update({f"ECE {name}": error for name, error in trial.ece.items()})
    rates.update({f"held out % {name}": right for name, right in trial.held_out.items()})
    rates.update(zip(("stated %", "stated low", "stated high"), trial.stated))
    note = f"{-trial.lost:+.1f} points"
    if not trial.held:
        note += ", outside the stated interval"
    return Line(what, f"ships {trial.shipped}", rates=rates, note=note)


def promises(result: Result, trials: dict[str, list[Trial]]) -> None:
    """How often the two promises of `fit` held, by kind of task."""
    every = [trial for some in trials.values() for trial in some]
    for kind, some in {"all": every, **trials}.items():
        result.ratios[f"share without harm, {kind} ({len(some)})"] = fmean(
            t.lost <= POINTS for t in some
        )
        result.ratios[f"share within the stated interval, {kind} ({len(some)})"] = fmean(
            t.held for t in some
        )
    result.ratios["mean points against the best of base, ICL and SFT"] = -fmean(
        t.lost for t in every
    )
    shipped = Counter(t.shipped for t in every)
    result.remarks.append(
        "shipped: " + ", ".join(f"{name} {times}" for name, times in shipped.most_common())
    )


def against_sft(subject: Subject, seeds: int, rows: int, options: FitOptions) -> Result:
    """`fit` against SFT alone: accuracy on fresh rows of every classification toy task."""
    result = Result(
        "fit",
        f"{subject.name}: {rows} rows, {seeds} seeds, {FRESH} fresh rows, {about(options)}",
        [],
    )
    trials = []
    for name in TOYS:
        pool = [row | {"label": str(row["label"])} for row in world.rows(name, "train")]
        fresh = [row | {"label": str(row["label"])} for row in world.rows(name, "eval")[:FRESH]]
        for seed in range(seeds):
            trials.append(trial(subject, random.Random(seed).sample(pool, rows), fresh, options))
            result.lines.append(line(f"{name}, seed {seed}", trials[-1]))
            click.echo(f"  {name}, seed {seed}: {trials[-1].shipped}", err=True)
    gain = paired_test([t.accuracy[t.shipped] for t in trials], [t.accuracy["sft"] for t in trials])
    result.ratios["points of accuracy over SFT"] = gain.mean
    said = f"{gain.mean:+.1f}{interval(gain, 1, '.1f')} points, {gain.pairs} pairs"
    result.remarks.append(f"what fit ships against SFT alone: {said}")
    return result


def gate(subject: Subject, tasks: int, options: FitOptions) -> Result:
    """Generated tasks: how often what is shipped is at least the best of base, ICL and SFT, minus two points.

    Of random labels every predictor is right in half the cases; a difference there is chance, and counts apart.
    """
    result = Result("gate", f"{subject.name}: {tasks} generated tasks, {about(options)}", [])
    kinds: dict[str, list[Trial]] = {}
    for number in range(tasks):
        name, rows, fresh = generated(number)
        found = trial(subject, rows, fresh, options)
        result.lines.append(line(name, found))
        kinds.setdefault(name.partition(" ")[0], []).append(found)
        click.echo(f"  {name}: {result.lines[-1].stack}, {result.lines[-1].note}", err=True)
    by_chance = kinds.pop("random", [])
    promises(result, kinds)
    none = sum(t.shipped == "base" for t in by_chance)
    held = sum(t.held for t in by_chance)
    random_labels = (
        f"nothing shipped for {none} of {len(by_chance)}, {held} within the stated interval"
    )
    result.remarks.append(f"random labels, apart: {random_labels}")
    return result


def real(
    subject: Subject, data: Path | None, draws: int, sizes: tuple[int, ...], options: FitOptions
) -> Result:
    """Rows of real data sets with words as labels, so many of each: what is shipped, and every candidate.

    What was computed is kept in runs/, so that the same command goes on.
    """
    if data is None:
        raise UsageError(
            "real: name the folder that holds sst2/train.jsonl … with --data-dir or $IA2MINI_DATA"
        )
    sizes_said = " and ".join(map(str, sizes))
    about_rows = f"{subject.name}: {sizes_said} real rows a label, {SOME} fresh ones at most"
    result = Result("fit", f"{about_rows}, {about(options)}", [])
    found: dict[str, list[Trial]] = {}
    what = {
        "options": asdict(options),
        "checkpoint": checkpoint_digest(subject.folder),
        "fresh": f"{SOME}, balanced",
    }
    store = Store(RUNS, "fit-real", what)
    for size, draw, name in product(sizes, range(draws), REAL):
        drawn, fresh = [called(rows, name) for rows in real_rows(data, name, size, draw)]
        cell = f"{name}-{size}-{draw}"
        each = trial(subject, drawn, fresh, options, Store(store.path, cell, {}))
        store.keep_json(f"{cell}.json", asdict(each))
        result.lines.append(line(f"{name}, {size} a label, draw {draw}", each))
        found.setdefault(f"{name} {size}", []).append(each)
        click.echo(
            f"  {result.lines[-1].what}: {result.lines[-1].stack}, {result.lines[-1].note}",
            err=True,
        )
    promises(result, found)
    return result


def real_rows(data: Path, name: str, size: int, draw: int) -> tuple[list[dict], list[dict]]:
    """`size` rows of each label of a real data set, drawn anew for each number of a draw, and others as fresh ones.

    The fresh ones hold the labels equally often, too, as far as there are rows: what was held out can tell nothing of
    other shares.
    """
    column, file, words = REAL[name]
    pool = read_rows(data / name / "train.jsonl")
    others = read_rows(data / name / f"{file}.jsonl")
    random.Random(draw).shuffle(pool)
    drawn = []
    fresh = []
    for label in range(len(words)):
        mine = [row for row in pool if row["label"] == label]
        drawn += mine[:size]
        unseen = [row for row in others if row["label"] == label] + mine[size:]
        fresh += unseen[: SOME // len(words)]

    def named(row: dict) -> dict:
        return {"text": row[column].strip(), "label": words[row["label"]]}

    return list(map(named, drawn)), list(map(named, fresh))


def columns_of(rows: list[dict]) -> Columns:
    """Their two columns, the prompt's first."""
    prompt, answer = rows[0]
    return Columns(prompt, answer)


def called(rows: list[dict], name: str) -> list[dict]:
    """Rows of a real data set with columns called as a person would call them."""
    return [{CALLED[name][column]: value for column, value in row.items()} for row in rows]


def about(options: FitOptions) -> str:
    threads = f"{torch.get_num_threads()} threads"
    return f"{options.epochs} epochs, {options.folds} folds, {threads}"


def fit(part: str, counts: dict[str, int], methods: tuple[str, ...], on: dict) -> list[Result]:
    """Is what `ia2mini fit` ships better than SFT alone, and never worse than the best of base, ICL and SFT?"""
    options = FitOptions(epochs=counts["epochs"], methods=methods)
    if part == "real":
        subject = open_subject(on["model"], "cpu", on["dtype"])
        return [real(subject, on["data_dir"], counts["seeds"], on["sizes"], options)]
    subject = open_subject("tiny", "cpu")
    results = []
    if part != "gate":
        results.append(against_sft(subject, counts["seeds"], 16, options))
    if part != "sft":
        results.append(gate(subject, counts["tasks"], options))
    return results
