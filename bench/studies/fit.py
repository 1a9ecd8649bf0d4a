"""`fit`: does what `ia2mini fit` ships harm, and is it told what it is worth? On generated tasks.

Also the real rows on which `rivals` asks the same.
"""

import random
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import click
import torch

from ia2mini import metrics
from ia2mini.engine.options import FitOptions
from ia2mini.engine.subject import Subject
from ia2mini.fitting.crossval import CrossValidation, candidate_names
from ia2mini.fitting.fit import make_choice, prepare_fit, ship
from ia2mini.fitting.held_out import answer_held_out, fit_final_probe
from ia2mini.fitting.predictor import Predictor
from ia2mini.fitting.report import Choice, make_report
from ia2mini.fitting.rows import Columns
from ia2mini.fitting.selection import Candidate
from ia2mini.fitting.training import train_final, train_folds
from ia2mini.methods import METHODS
from ia2mini.tasks import world
from ia2mini.tasks.rows import read_rows

from ..report import Line, Result

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
    shipped: str
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


def trial(subject: Subject, rows: list[dict], fresh: list[dict], options: FitOptions) -> Trial:
    """Fit `rows`; what is shipped and each candidate, trained on all rows at its own rate, answer `fresh` ones."""
    cv = prepare_fit(rows, subject, options, columns_of(rows))
    fitted, choice = fit_folds(cv)
    found = choice.candidates
    gold = torch.tensor([cv.task.labels.index(row[cv.task.answer_column]) for row in fresh])
    accuracy = {}
    nll = {}
    ece = {}
    for name in candidate_names(cv.task, cv.options):
        candidate = found[name]
        answers = alone(cv, fitted, candidate).full_answers(fresh)
        scores = torch.tensor([answer["log_probabilities"] for _, answer in answers])
        scores /= candidate.temperature
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
        shipped=report["chosen"],
        stated=[100 * share for share in report["shipped"]["acc"]],
    )


def fit_folds(cv: CrossValidation) -> tuple[Predictor, Choice]:
    """What `fit` does with rows in folds: what it ships, and of which candidates."""
    held_out = answer_held_out(cv, train_folds(cv))
    choice = make_choice(cv, held_out)
    return ship(cv, choice, make_report(cv, held_out, choice)), choice


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
