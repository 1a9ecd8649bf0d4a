"""`choice`: by which rule is a learning rate best chosen without evaluation rows?

It judges the runs that `effect --select both` has trained. Every rule sees a set's own rows alone (training, dev,
unlabelled ones); the evaluation rows judge what it chose.
"""

from dataclasses import replace
from pathlib import Path
from statistics import fmean

import torch
from torch import Tensor

from ia2mini.cli.main import progress
from ia2mini.fitting.crossval import CrossValidation
from ia2mini.experiment import Experiment
from ia2mini.metrics import paired_test
from ia2mini.engine.options import FitOptions, Options
from ia2mini.report.summary import chosen, interval
from ia2mini.study.study import open_study
from ia2mini.engine.subject import Subject

from .effect import tasks_of
from .report import Line, Result

METHODS = "sft", "ia2", "ia2-sft"
POOLED = "dev loss, mean over sets"  # what `run` takes


def choice(subject: Subject, options: Options, part: str, data: Path | None = None, folds: bool = False) -> Result:
    """Rules for the learning rate against each other, on the runs that `effect --select both` has trained.

    Dev loss of each set by itself, its mean over sets, that of IA2's phase (for IA2 → SFT), the KL to the teacher on
    further queries and, with --folds, cross-validation within each set; beside them the best rate afterwards.
    """
    experiments, _ = open_study(tasks_of(part, data), subject, options, Path("runs"), None, None, progress)
    result = Result("choice", f"{subject.name}, {part}: {options.sets} sets, {options.eval_rows} evaluation rows", [])
    right: dict[tuple[int, str], dict[str, list[float]]] = {}  # accuracies of each rule, a value a task and set
    for experiment in experiments:
        for method in METHODS:
            found = right.setdefault((len(experiment.episodes[0].train), method), {})
            for rule, values in judged(experiment, method, folds).items():
                found.setdefault(rule, []).extend(values)
    for (n, method), rules in right.items():
        for rule, values in rules.items():
            gain, note = paired_test(values, rules[POOLED]), ""
            if rule != POOLED and any(a != b for a, b in zip(values, rules[POOLED])):
                note = f"{100 * gain.mean:+.1f} points{interval(gain, 100, '.1f')}, {gain.pairs} pairs"
            rates = {"% accuracy": 100 * fmean(values)}
            result.lines.append(Line(f"{part}, N = {n}, {method}", rule, rates=rates, note=note))
    return result


def judged(experiment: Experiment, method: str, folds: bool) -> dict[str, list[float]]:
    """Rule -> accuracy, for each set, of the rate that it chooses for `method`."""
    sets, rates = len(experiment.episodes), len(experiment.rates)

    def table(values) -> Tensor:
        return torch.as_tensor(values, dtype=torch.float64).view(sets, rates)

    right = table(experiment.score(method, experiment.task.name)["correct"].double().mean(1))
    dev = table(experiment.trained(method).dev_loss)
    costs = {POOLED: dev.mean(0).expand(sets, -1), "dev loss, each set's own": dev}
    if method == "ia2-sft":
        costs["dev loss of IA2's phase"] = table(experiment.trained("ia2").dev_loss).mean(0).expand(sets, -1)
    costs["KL to the teacher, further queries"] = table(experiment.divergences(method)).mean(0).expand(sets, -1)
    if folds and len(experiment.episodes[0].train) > 2:
        held_out = torch.stack([cross_validated(experiment, method, number) for number in range(sets)])
        costs["cross-validation"] = held_out.mean(0).expand(sets, -1)
    costs["best afterwards, one for all sets"] = -right.mean(0).expand(sets, -1)
    return {rule: right.gather(1, cost.argmin(1, keepdim=True))[:, 0].tolist() for rule, cost in costs.items()}


def cross_validated(experiment: Experiment, method: str, number: int) -> Tensor:
    """Held-out loss [rates] of `method` over folds of the training and dev rows of set `number`."""
    o, episode, folder = experiment.setting.options, experiment.episodes[number], experiment.setting.folder
    options = FitOptions(rates=experiment.rates, methods=METHODS, epochs=o.epochs, seed=o.seed)
    rows = list(dict.fromkeys(episode.train + episode.dev))
    cv = CrossValidation(experiment.setting.subject, experiment.task, rows, options)
    cv.once = lambda name, make: folder.once(f"{experiment.name}/folds-{number}-{name}", make)
    losses = cv.selection.losses(cv.tried(method))  # [epochs, rates, n]
    return losses.mean(-1).amin(0).double()


def race(subject: Subject, options: Options, part: str, data: Path | None = None) -> Result:
    """How often `run --race` chooses another rate than training every rate to its end does, and what it saves."""
    fast = replace(options, race=True, select="dev", methods=METHODS)
    where = Path("runs"), None, None, progress
    studies = [open_study(tasks_of(part, data), subject, setting, *where)[0] for setting in (options, fast)]
    result = Result("race", f"{subject.name}, {part}: {options.sets} sets, N = {', '.join(map(str, options.n))}", [])
    others, steps = [], []
    for pair in zip(*studies):
        for method in ("sft", "ia2-sft"):  # IA2 goes on from every rate
            whole, raced = (experiment.training_records(method) for experiment in pair)
            rates = [chosen(records, "dev")[0] for records in (whole, raced)]
            spent = [sum(record["steps"] for record in records) for records in (whole, raced)]
            others.append(rates[0] != rates[1])
            steps.append(spent[1] / spent[0])
            note = f"rate {rates[0]:g}" + f", {rates[1]:g} in the race" * others[-1]
            result.lines.append(Line(pair[0].name, method, rates={"share of the steps": steps[-1]}, note=note))
    result.ratios["share of choices that change"] = fmean(others)
    result.ratios["share of the steps, mean"] = fmean(steps)
    return result
