"""`bayes`: does a Bayesian adapter, made from a trained one without training, beat one temperature?

TFB (arXiv 2412.05723) puts noise of one size around a trained LoRA, as much as its own rows bear, and averages the
probabilities of several draws. K draws, n rows, C labels, M weights.
"""

from pathlib import Path
from statistics import fmean

import torch
from torch import Generator, Tensor

from ia2mini.adapters import LoRA, adapted, unpack
from ia2mini.engine.intervals import paired_test
from ia2mini.engine.options import Options
from ia2mini.engine.subject import Subject
from ia2mini.labels import Scoring, label_scores
from ia2mini.metrics import ece, fit_temperature, row_losses
from ia2mini.tasks import Example

from ..report import Line, Result, difference
from .effect import about, studied
from .reopened import Reopened, reopen
from .tasks import tasks_of

METHODS = ("sft", "ia2-sft")
DRAWS = 10
TOLERANCE = 0.01  # nats that the mean loss on a set's own rows may rise by
WIDEST = 10.0  # the largest standard deviation that is tried; then half of it, and so on
HALVINGS = 16
WAYS = ("as it is", "one temperature", "TFB")
METRICS = {"NLL": ".3f", "ECE": ".3f", "% accuracy": ".1f"}


def bayes(subject: Subject, options: Options, part: str, data: Path | None = None) -> Result:
    """SFT and IA2→SFT as they are, with one temperature from the dev rows, and as TFB makes them; among the labels."""
    result = Result("bayes", f"{about(subject, options, part)}; {DRAWS} draws", [])
    tasks = tasks_of(part, data)
    studied(result, part, tasks, subject, options)
    cells = reopen(tasks, subject, options)
    for method in METHODS:
        judged: dict[str, list[dict]] = {way: [] for way in WAYS}
        for cell in cells:
            for number, run in enumerate(cell.scored_runs[method]):
                theta = cell.trained[method].theta[run]
                for way, metrics in judge(cell, number, theta).items():
                    judged[way].append(metrics)
        for way, metrics in judged.items():
            means = {name: fmean(one[name] for one in metrics) for name in METRICS}
            result.lines.append(Line(method, way, rates=means))
        for way in WAYS[:2]:
            for metric, digits in METRICS.items():
                ours = [one[metric] for one in judged["TFB"]]
                theirs = [one[metric] for one in judged[way]]
                said = difference(paired_test(ours, theirs), 1, digits)
                result.remarks.append(f"{method}: {metric}: TFB against {way}: {said}")
    return result


def judge(mine: Reopened, number: int, theta: Tensor) -> dict[str, dict]:
    """Each way's metrics on the evaluation rows, for the weights theta [M] of set `number`."""
    cell = mine.cell
    episode = cell.episodes[number]
    own_rows = episode.train + episode.dev
    rows = cell.evaluations[cell.task.name].rows
    gold = labels_of(rows)
    plain = scores_of(mine, theta[None], rows)[0]
    dev = scores_of(mine, theta[None], episode.dev)[0]
    temperature = fit_temperature(dev, labels_of(episode.dev))
    sigma = widest_noise(mine, theta, own_rows, number)
    drawn = drawn_weights(mine.experiment.adapter, theta, sigma, seeded_generator(number))
    averaged = average_scores(scores_of(mine, drawn, rows))
    found = {}
    for way, scores in zip(WAYS, (plain, plain / temperature, averaged)):
        best = scores.softmax(-1).max(-1)
        right = best.indices == gold
        found[way] = {
            "NLL": row_losses(scores, gold).mean().item(),
            "ECE": ece(best.values, right),
            "% accuracy": 100 * right.double().mean().item(),
        }
    return found


def labels_of(rows: list[Example]) -> Tensor:
    return torch.tensor([row.label for row in rows])


def seeded_generator(number: int) -> Generator:
    return torch.Generator().manual_seed(number)


def scores_of(mine: Reopened, thetas: Tensor, rows: list[Example]) -> Tensor:
    """Log-probabilities of the labels under each of the weights thetas [K, M], [K, n, C]."""
    subject = mine.experiment.subject
    cell = mine.cell
    prompts = subject.tokenizer.encode_all([row.prompt for row in rows])
    scoring = Scoring(len(thetas), ends=subject.tokenizer.eos_ids)
    with adapted(subject.model, mine.experiment.adapter, thetas) as student:
        scores = label_scores(student, prompts, cell.labels[cell.task.name], scoring)
    return scores.log_probabilities


def average_scores(scores: Tensor) -> Tensor:
    """Logs [n, C] of the mean over draws of the labels' shares, from log-probabilities [K, n, C]."""
    shares = scores.double().softmax(-1)
    return shares.mean(0).log()


def drawn_weights(adapter: LoRA, theta: Tensor, sigma: float, generator: Generator) -> Tensor:
    """K draws [K, M] around trained weights theta [M].

    The update B A becomes U (U^T B A + sigma E): U is an orthonormal basis of the columns of B, E standard normal.
    """
    weights = unpack(theta[None].cpu(), adapter.shapes)
    parts = []
    for name in adapter.linears:
        A = weights[f"{name}.A"][0]
        B = weights[f"{name}.B"][0]
        U, _, _ = torch.linalg.svd(B, full_matrices=False)  # [out, rank]
        mean = U.T @ B @ A  # [rank, in]
        noise = torch.randn(DRAWS, *mean.shape, generator=generator)
        parts.append((mean + sigma * noise).flatten(1))
        parts.append(U.flatten().expand(DRAWS, -1))
    return torch.cat(parts, 1).to(theta.device)


def widest_noise(mine: Reopened, theta: Tensor, rows: list[Example], number: int) -> float:
    """The largest standard deviation tried at which the mean loss of some rows rises by no more than `TOLERANCE`.

    0 where none does.
    """
    gold = labels_of(rows)

    def loss(sigma: float) -> float:
        drawn = drawn_weights(mine.experiment.adapter, theta, sigma, seeded_generator(number))
        averaged = average_scores(scores_of(mine, drawn, rows))
        return row_losses(averaged, gold).mean().item()

    allowed = loss(0.0) + TOLERANCE
    sigma = WIDEST
    for _ in range(HALVINGS + 1):
        if loss(sigma) <= allowed:
            return sigma
        sigma /= 2
    return 0.0
