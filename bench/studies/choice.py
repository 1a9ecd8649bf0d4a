"""`choice`: by which rule is a learning rate best chosen without evaluation rows?

It judges the runs that `effect --select both` has trained. Every rule sees a set's own rows alone; the evaluation rows
judge what it chose.
"""

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from statistics import fmean

import torch
from torch import Tensor

from ia2mini.cli.group import progress
from ia2mini.engine.intervals import paired_test
from ia2mini.engine.options import FitOptions, Options
from ia2mini.engine.select import chosen
from ia2mini.engine.store import Store
from ia2mini.engine.subject import Subject
from ia2mini.fitting.crossval import make_cross_validation
from ia2mini.fitting.held_out import fold_weights, score_held_out
from ia2mini.fitting.selection import HeldOut
from ia2mini.fitting.training import train_folds
from ia2mini.report.summary import interval
from ia2mini.study.study import compare

from ..report import Line, Result
from .effect import about, tasks_of
from .reopened import RUNS, Reopened, reopen

METHODS = ("sft", "ia2", "ia2-sft")
POOLED = "dev loss, mean over sets"  # what `run` takes
OWN = "dev loss, each set's own"
FIRST_PHASE = "dev loss of IA2's phase"
FOLDS = "cross-validation"
AFTERWARDS = "best afterwards, one for all sets"


def choice(
    subject: Subject, options: Options, part: str, data: Path | None = None, folds: bool = False
) -> Result:
    """Rules for the learning rate against each other, on the runs that `effect --select both` has trained.

    Dev loss of each set by itself, its mean over sets, that of IA2's phase (for IA2 → SFT) and, with --folds,
    cross-validation within each set; beside them the best rate afterwards.
    """
    tasks = tasks_of(part, data)
    document, _ = compare(tasks, subject, options, RUNS, bar=progress)
    result = Result("choice", about(subject, options, part), [])
    # accuracies of each rule, a value a task and set
    right: dict[tuple[int, str], dict[str, list[float]]] = {}
    for one in reopen(tasks, subject, options):
        scored = [record for record in document["runs"] if of_cell(record, one)]
        for method in METHODS:
            found = right.setdefault((one.cell.n, method), {})
            for rule, values in judged(one, scored, method, folds).items():
                found.setdefault(rule, []).extend(values)
    for (n, method), rules in right.items():
        for rule, values in rules.items():
            rates = {"% accuracy": 100 * fmean(values)}
            note = against(values, rules[POOLED])
            result.lines.append(Line(f"{part}, N = {n}, {method}", rule, rates=rates, note=note))
    return result


def of_cell(record: dict, one: Reopened) -> bool:
    """Whether a record is of a cell's own evaluation."""
    cell = one.cell
    return (record["task"], record["n"], record["eval"]) == (cell.task.name, cell.n, cell.task.name)


def against(values: list[float], pooled: list[float]) -> str:
    """What a rule gains over that of `run`; nothing where it chooses the same."""
    if values == pooled:
        return ""
    gain = paired_test(values, pooled)
    return f"{100 * gain.mean:+.1f} points{interval(gain, 100, '.1f')}, {gain.pairs} pairs"


def judged(one: Reopened, scored: list[dict], method: str, folds: bool) -> dict[str, list[float]]:
    """Rule -> accuracy, for each set, of the rate that it chooses for `method`."""
    sets = len(one.cell.episodes)
    mine = [record for record in scored if record["method"] == method]
    # without those that failed in some set
    rates = list(dict.fromkeys(record["rate"] for record in mine))
    right = table(mine, sets, "acc")
    dev = table(mine, sets, "dev_loss")
    costs = {POOLED: pooled(dev), OWN: dev}
    if method == "ia2-sft":
        first = [record for record in one.training["ia2"] if record["rate"] in rates]
        costs[FIRST_PHASE] = pooled(table(first, sets, "dev_loss"))
    if folds and one.cell.n > 2:
        held_out = [cross_validated(one, method, number, rates) for number in range(sets)]
        costs[FOLDS] = pooled(torch.stack(held_out))
    costs[AFTERWARDS] = pooled(-right)
    found = {}
    for rule, cost in costs.items():
        found[rule] = right.gather(1, cost.argmin(1, keepdim=True))[:, 0].tolist()
    return found


def table(records: list[dict], sets: int, field: str) -> Tensor:
    """A field of a method's records, [sets, rates]."""
    return torch.tensor([record[field] for record in records], dtype=torch.float64).view(sets, -1)


def pooled(costs: Tensor) -> Tensor:
    """The mean over sets for each set, [sets, rates]."""
    return costs.mean(0).expand(len(costs), -1)


def cross_validated(one: Reopened, method: str, number: int, rates: Sequence[float]) -> Tensor:
    """Held-out loss [rates] of `method` over folds of the training and dev rows of set `number`."""
    trained = one.cell.study.options
    episode = one.cell.episodes[number]
    options = FitOptions(
        rates=tuple(rates), methods=METHODS, epochs=trained.epochs, seed=trained.seed
    )
    rows = list(dict.fromkeys(episode.train + episode.dev))
    cv = make_cross_validation(one.experiment.subject, one.cell.task, rows, options)
    folder = one.experiment.store.path / one.experiment.name
    cv.store = Store(folder, f"folds-{number}", asdict(options))
    weights = fold_weights(cv, train_folds(cv)[method])
    scores = score_held_out(cv, method, weights)
    losses = cv.selection.losses(HeldOut(method, scores))  # [rates, n]
    return losses.mean(-1).double()


def race(subject: Subject, options: Options, part: str, data: Path | None = None) -> Result:
    """How often `run --race` chooses another rate than training every rate to its end does, and what it saves."""
    fast = replace(options, race=True, select="dev", methods=METHODS)
    tasks = tasks_of(part, data)
    whole, raced = (reopen(tasks, subject, each) for each in (options, fast))
    sizes = ", ".join(map(str, options.n))
    result = Result("race", f"{subject.name}, {part}: {options.sets} sets, N = {sizes}", [])
    others = []
    shares = []
    for one, other in zip(whole, raced):
        for method in ("sft", "ia2-sft"):  # IA2 goes on from every rate
            rate, _ = chosen(one.training[method], "dev")
            rate_in_race, _ = chosen(other.training[method], "dev")
            share = steps(other.training[method]) / steps(one.training[method])
            note = f"rate {rate:g}"
            if rate_in_race != rate:
                note += f", {rate_in_race:g} in the race"
            others.append(rate_in_race != rate)
            shares.append(share)
            result.lines.append(
                Line(one.experiment.name, method, rates={"share of the steps": share}, note=note)
            )
    result.ratios["share of choices that change"] = fmean(others)
    result.ratios["share of the steps, mean"] = fmean(shares)
    return result


def steps(records: list[dict]) -> int:
    return sum(record["steps"] for record in records)
