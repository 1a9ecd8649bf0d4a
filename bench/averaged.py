"""`averaged`: one answer from several runs? Averaged probabilities and weights, and one adapter distilled from them."""

import math
from dataclasses import replace
from pathlib import Path
from statistics import fmean

import torch
from torch import Tensor

from ia2mini.adapters import adapted
from ia2mini.batch import Row, truth_row
from ia2mini.cli.main import progress
from ia2mini.scoring import Scoring, answer_scores, label_scores
from ia2mini.experiment import Experiment
from ia2mini.methods import METHODS, Grid
from ia2mini.metrics import paired_test, row_losses
from ia2mini.engine.options import Options
from ia2mini.study.study import open_study
from ia2mini.engine.subject import Subject
from ia2mini.teacher import Asked, Taught, observe
from ia2mini.train import Settings

from .effect import tasks_of
from .report import Line, Result, difference

JUDGED = ("sft", "ia2-sft")
CHOSEN, BEST = "chosen run", "best single rate, known afterwards"
KEPT = 1024  # likeliest tokens of an averaged distribution


def averaged(subject: Subject, options: Options, part: str, data: Path | None = None) -> Result:
    """NLL of one answer from all rates or all sets of a method, averaged or distilled, against that of single runs."""
    options = replace(options, methods=JUDGED, race=False)  # every rate is to be trained to its end
    experiments, _ = open_study(tasks_of(part, data), subject, options, Path("runs"), None, None, progress)
    result = Result("averaged", f"{subject.name}, {part}: {options.sets} sets, {options.eval_rows} evaluation rows", [])
    for n in options.n:
        for method in JUDGED:
            ways: dict[str, list[float]] = {}
            for experiment in experiments:
                if experiment.about["n"] == n:
                    for way, values in judged(experiment, method).items():
                        ways.setdefault(way, []).extend(values)
            for way, values in ways.items():
                what = f"{part}, N = {n}, {method}"
                result.lines.append(Line(what, way, rates={"NLL": fmean(values)}))
                for against in (CHOSEN, BEST) if way not in (CHOSEN, BEST) else ():
                    less = paired_test(values, ways[against])
                    result.remarks.append(f"{what}: NLL, {way} against {against}: {difference(less, 1, '.3f')}")
    return result


def judged(experiment: Experiment, method: str) -> dict[str, list[float]]:
    """Way to answer -> NLL for each set (what is one for all sets: as often)."""
    sets, rates = len(experiment.episodes), len(experiment.rates)
    theta = experiment.trained(method).theta
    every = scores(experiment, theta).view(sets, rates, -1)  # [sets, rates, Q] log-probability of the true answer
    losses = -every.mean(-1)
    picks = torch.tensor(experiment.reported(method)) % rates
    chosen = torch.arange(sets), picks
    of_sets = together(every[chosen])
    soup = scores(experiment, theta.view(sets, rates, -1).mean(1))
    one = distilled(experiment, theta.view(sets, rates, -1)[chosen])
    found = {CHOSEN: losses[chosen], BEST: losses.min(1).values}
    found |= {"rates averaged": -together(every.transpose(0, 1)).mean(-1), "rates' weights averaged": -soup.mean(-1)}
    found |= {"sets averaged": -of_sets.mean().expand(sets), "distilled from the sets": -one.mean().expand(sets)}
    return {way: values.tolist() for way, values in found.items()}


def together(scores: Tensor) -> Tensor:
    """Log of the mean probability over the first axis."""
    return scores.logsumexp(0) - math.log(len(scores))


@torch.no_grad()
def scores(experiment: Experiment, theta: Tensor) -> Tensor:
    """Log-probability [R, Q] of the true answer (among the labels, where there are any) under weights theta [R, M]."""
    subject, name = experiment.setting.subject, experiment.task.name
    rows, found = experiment.evals[name].rows, []
    prompts = subject.tokenizer.encode_all([row.prompt for row in rows])
    for some in theta.split(10):
        with adapted(subject.model, experiment.adapter, some) as student:
            if experiment.labelled:
                how = Scoring(len(some), ends=subject.tokenizer.eos_ids)
                every = label_scores(student, prompts, experiment.labels[name], how).log_probabilities
                found.append(-row_losses(every, torch.tensor([row.label for row in rows])))
            else:
                answers = [truth_row(row, subject.tokenizer, True) for row in rows]
                lengths = torch.tensor([len(row.answer) for row in answers])
                found.append(answer_scores(student, answers, len(some)) * lengths)
    return torch.cat(found)


def distilled(experiment: Experiment, theta: Tensor) -> Tensor:
    """`scores` [1, Q] of one adapter that has learned what runs theta [S, M] say on average to the rows of all sets."""
    subject, taught = experiment.setting.subject, experiment.teach()
    parts = [sum((getattr(one, name) for one in taught), []) for name in ("train", "dev")]
    with_targets = [mixture(experiment, theta, rows) for rows in parts]
    only = Taught(*with_targets, *with_targets)
    o = experiment.setting.options
    settings = Settings(o.batch_size, o.epochs, o.patience)
    grid = Grid(subject.model, experiment.adapter, [only], experiment.rates, seed=o.seed, settings=settings)
    trained = METHODS["soft"](grid)
    return scores(experiment, trained.theta[[int(trained.dev_loss.argmin())]])


@torch.no_grad()
def mixture(experiment: Experiment, theta: Tensor, rows: list[Row]) -> list[Row]:
    """The rows with the mean of the runs' distributions at every answer position."""
    subject, total = experiment.setting.subject, None
    size = subject.model.config.vocab_size
    for run in theta:
        with adapted(subject.model, experiment.adapter, run[None]) as student:
            told = [Row(row.prompt, row.answer) for row in rows]
            observe(student, told, [row.prompt for row in rows], Asked(max_tokens=2, soft_k=size))
        each = [torch.zeros(row.soft.shape).scatter_(1, row.soft_ids, row.soft.exp()) for row in told]
        total = each if total is None else [a + b for a, b in zip(total, each)]
    found = []
    for row, shares in zip(rows, total):
        likely, ids = (shares / len(theta)).topk(min(KEPT, size))
        found.append(replace(row, soft=likely.log(), soft_ids=ids))
    return found
