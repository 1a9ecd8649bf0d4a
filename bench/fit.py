"""`fit`: does what `ia2mini fit` ships harm? Against SFT alone, on generated tasks of every kind, on real rows."""

import random
import re
from collections import Counter
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from statistics import fmean

import click
import torch

from ia2mini import UsageError
from ia2mini.crossval import CrossValidation
from ia2mini.fitting import conclude, read_own
from ia2mini.methods import METHODS
from ia2mini.metrics import paired_test
from ia2mini.options import FitOptions
from ia2mini.predictor import Predictor
from ia2mini.report.summary import interval
from ia2mini.subject import Subject, open_subject
from ia2mini.tasks import world
from ia2mini.tasks.rows import read_rows

from .report import Line, Result, difference

TOYS = ("toy-mood", "toy-topic", "toy-mood-flip", "toy-mood-remap")
KINDS = ("words", "words", "words", "digits", "digits", "pair", "length", "random")  # what generated tasks are, in turn
RATES = 3e-3, 1e-2  # the upper two of the embedded model: the lowest never wins in so few epochs
REAL_RATES = 3e-4, 1e-3  # of others, likewise
REAL = {  # folder -> column of the text, file of fresh rows, words of the labels
    "ag_news": ("text", "test", ("World", "Sports", "Business", "Technology")),
    "financial_phrasebank": ("sentence", "test", ("negative", "neutral", "positive")),
    "poem_sentiment": ("verse_text", "test", ("negative", "positive", "neutral", "mixed")),
    "sst2": ("sentence", "validation", ("negative", "positive")),
}
FRESH, SOME, POINT = 500, 200, 1.0  # rows that were neither trained on nor held out; what a shipped adapter may lose


@dataclass
class Trial:
    """One fit: the accuracy (%) on fresh rows of what it ships and of every candidate, and what was known of it."""

    accuracy: dict[str, float]
    held_out: dict[str, float]  # of its own rows, by cross-validation
    shipped: str
    ahead: dict[str, float]  # of SFT in held-out loss, in standard errors of the rows' paired differences

    @property
    def lost(self) -> float:
        """Points of accuracy behind the best of base and SFT."""
        return max(self.accuracy["base"], self.accuracy["sft"]) - self.accuracy[self.shipped]


def trial(subject: Subject, rows: list[dict], fresh: list[dict], options: FitOptions) -> Trial:
    """Fit `rows`; what is shipped and each method alone, trained on all rows at its own rate, answer `fresh` ones."""
    rows, task = read_own(rows)
    cv, kept = CrossValidation(subject, task, list(dict.fromkeys(map(task.example, rows))), options), {}
    cv.once = lambda name, make: kept.setdefault(name, None) or kept.update({name: make()}) or kept[name]
    fitted = conclude(cv)
    candidates, accuracy = {name: cv.candidate(name) for name in ("base", "icl", *options.methods)}, {}
    for name, candidate in candidates.items():
        if name == fitted.spec["method"]:
            theta = fitted.theta
        else:
            theta = cv.final(candidate) if name in METHODS else None
        alone = Predictor(subject, None if theta is None else cv.adapter, theta, fitted.spec)
        answers = alone.predict(fresh, icl=name == "icl")
        accuracy[name] = 100 * fmean(found["answer"] == row["label"] for found, row in zip(answers, fresh))
    held_out = {name: 100 * one["acc"][0] for name, one in fitted.report["candidates"].items()}
    ahead = {name: candidates["sft"].losses - one.losses for name, one in candidates.items() if name != "sft"}
    ahead = {name: (a.mean() / a.std() * len(a) ** 0.5).item() for name, a in ahead.items()}
    return Trial(accuracy, held_out, fitted.spec["method"], ahead)


def generated(number: int, kinds: tuple[str, ...] = KINDS) -> tuple[str, list[dict], list[dict]]:
    """Toy task `number`: what it asks, 12 to 24 rows and `FRESH` more.

    Labels are random words or digits for the values of one attribute; for whether two of them agree in being the first
    of their values ("pair", which the model has never learned in context) or for long and short sentences ("length");
    or drawn anew for each row, so that nothing can be learned ("random").
    """
    rng, kind = random.Random(f"fit {number}"), kinds[number % len(kinds)]
    attribute, other = rng.sample(list(world.ATTRIBUTES), 2)
    values, style = list(world.ATTRIBUTES[attribute]), rng.choice(list(world.WORLD["styles"]))
    size = len(values) if kind in ("words", "digits") else 2
    vocabulary = sorted({word for group in world.ATTRIBUTES.values() for words in group.values() for word in words})
    names = rng.sample([word for word in vocabulary if re.fullmatch("[a-z]+", word)], size)
    names = rng.sample([str(i) for i in range(size)], size) if kind == "digits" else names

    def row(split: str) -> dict:
        while True:
            shown = {name: rng.choice(list(world.ATTRIBUTES[name])) for name in (attribute, other)}
            rest = [name for name in world.ATTRIBUTES if name not in shown]
            shown |= {
                name: rng.choice(list(world.ATTRIBUTES[name])) for name in rng.sample(rest, rng.choice((0, 1, 2)))
            }
            text = world.sentence(rng, style, shown)
            if world.split_of(text) == split:
                break
        first = [shown[name] == next(iter(world.ATTRIBUTES[name])) for name in (attribute, other)]
        known = {"pair": first[0] == first[1], "length": len(shown) > 3, "random": rng.randrange(2)}
        return {"text": text, "label": names[int(known.get(kind, values.index(shown[attribute])))]}

    while True:
        rows = [row("train") for _ in range(rng.randrange(12, 25))]
        if len({row["label"] for row in rows}) == size and 2 * size <= len(rows):
            return f"{kind} {number}: {attribute}, {style}", rows, [row("eval") for _ in range(FRESH)]


def line(what: str, trial: Trial) -> Line:
    rates = {f"% {name}": right for name, right in trial.accuracy.items()}
    rates |= {f"held out % {name}": right for name, right in trial.held_out.items()}
    rates |= {f"errors ahead {name}": ahead for name, ahead in trial.ahead.items()}
    return Line(what, f"ships {trial.shipped}", rates=rates, note=f"{-trial.lost:+.1f} points")


def against_sft(subject: Subject, seeds: int, rows: int, options: FitOptions) -> Result:
    """`fit` against SFT alone: accuracy on fresh rows of every classification toy task."""
    result = Result("fit", f"{subject.name}: {rows} rows, {seeds} seeds, {FRESH} fresh rows, {about(options)}", [])
    trials = []
    for name in TOYS:
        pool, fresh = world.rows(name, "train"), world.rows(name, "eval")[:FRESH]
        pool, fresh = ([row | {"label": str(row["label"])} for row in part] for part in (pool, fresh))
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
    """Generated tasks: how often what is shipped is at least the best of base and SFT, minus a point of accuracy.

    Of random labels every predictor is right in half the cases; a difference there is chance, and counts apart.
    """
    result, kinds = Result("gate", f"{subject.name}: {tasks} generated tasks, {about(options)}", []), {}
    for number in range(tasks):
        name, rows, fresh = generated(number)
        found = trial(subject, rows, fresh, options)
        result.lines.append(line(name, found))
        kinds.setdefault(name.partition(" ")[0], []).append(found)
        click.echo(f"  {name}: {found.shipped}, {-found.lost:+.1f} points", err=True)
    by_chance = kinds.pop("random", [])
    every = sum(kinds.values(), [])
    for kind, some in {"all": every, **kinds}.items():
        result.ratios[f"share without harm, {kind} ({len(some)})"] = fmean(t.lost <= POINT for t in some)
    result.ratios["mean points against the best of base and SFT"] = -fmean(t.lost for t in every)
    shipped = Counter(t.shipped for t in every)
    result.remarks.append("shipped: " + ", ".join(f"{name} {times}" for name, times in shipped.most_common()))
    gain = paired_test([t.accuracy[t.shipped] for t in every], [t.accuracy["sft"] for t in every])
    said = f"{gain.mean:+.1f}{interval(gain, 1, '.1f')} points, {gain.pairs} tasks"
    result.remarks.append(f"what fit ships against SFT alone: {said}")
    none = sum(t.shipped == "base" for t in by_chance)
    result.remarks.append(f"random labels, apart: no adapter for {none} of {len(by_chance)}")
    return result


def real(subject: Subject, data: Path | None, draws: int, rows: int, options: FitOptions) -> Result:
    """Rows of real data sets with words as labels: what is shipped, and every method, on fresh rows."""
    if data is None:
        raise UsageError("real: name the folder that holds sst2/train.jsonl … with --data-dir or $IA2MINI_DATA")
    result = Result("fit", f"{subject.name}: {rows} real rows, {SOME} fresh ones at most, {about(options)}", [])
    trials = []
    for draw, name in product(range(draws), REAL):
        column, file, words = REAL[name]
        pool, fresh = (read_rows(data / name / f"{part}.jsonl") for part in ("train", file))
        parts = random.Random(draw).sample(pool, rows), fresh[:SOME]
        drawn, fresh = ([{"text": row[column], "label": words[row["label"]]} for row in part] for part in parts)
        trials.append(trial(subject, drawn, fresh, options))
        result.lines.append(line(f"{name}, draw {draw}", trials[-1]))
        click.echo(f"  {result.lines[-1].what}: {trials[-1]}", err=True)
    for name in ("ships", *options.methods):
        if name != "sft":
            ours = [t.accuracy[t.shipped if name == "ships" else name] for t in trials]
            gain = paired_test(ours, [t.accuracy["sft"] for t in trials])
            result.remarks.append(f"{name} against SFT: {difference(gain, 1, '.1f')}")
    return result


def about(options: FitOptions) -> str:
    threads = f"{torch.get_num_threads()} threads"
    return f"at most {options.epochs} epochs, rates {options.rates}, {options.folds} folds, {threads}"


def fit(part: str, counts: dict[str, int], methods: tuple[str, ...], on: dict) -> list[Result]:
    """Is what `ia2mini fit` ships better than SFT alone, and never worse than the best of the base model and SFT?"""
    options = FitOptions(epochs=counts["epochs"], rates=RATES, methods=methods)
    if part == "real":
        options = replace(options, rates=REAL_RATES, folds=3)
        subject = open_subject(on["model"], "cpu", on["dtype"])
        return [real(subject, on["data_dir"], counts["seeds"], counts["rows"], options)]
    subject = open_subject("tiny", "cpu")
    results = [against_sft(subject, counts["seeds"], 16, options)] if part != "gate" else []
    return results + ([gate(subject, counts["tasks"], options)] if part != "sft" else [])
