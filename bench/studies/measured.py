"""What a rival says of the evaluation rows, how good that is, how long it takes and how large it is."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median

import torch

from ia2mini import metrics
from ia2mini.fitting.measures import macro_f1

from ..timing import clock

ONE_BY_ONE = 20  # rows that are also answered one at a time
MB = 1e6


@dataclass
class Measured:
    """One rival in one cell."""

    log_probabilities: list[list[float]]  # [rows, C], of the labels in sorted order
    train_seconds: float  # models were loaded before
    ms_one: float  # a row that comes alone, the median of some
    ms_batch: float  # a row, where all rows come at once
    mb_shipped: float  # of the files that are written
    mb_needed: float  # of the model that these files need beside them
    note: str = ""
    # accuracy (%) that is promised for new rows: mean, low, high
    stated: list[float] | None = None


def measure(
    answer: Callable[[list[dict]], list[list[float]]],
    fresh: list[dict],
    train_seconds: float,
    mb: tuple[float, float],
    note: str = "",
) -> Measured:
    """Time `answer(rows)`, which gives log-probabilities [rows, C], on rows alone and on all `fresh` rows at once.

    `mb`: shipped and needed. The first call is not timed.
    """
    answer(fresh[:1])
    some = fresh[:: max(1, len(fresh) // ONE_BY_ONE)]
    one = median(clock(partial(answer, [row])) for row in some)
    found: list[list[float]] = []
    batch = clock(lambda: found.extend(answer(fresh))) / len(fresh)
    return Measured(found, train_seconds, 1e3 * one, 1e3 * batch, *mb, note)


def judged(log_probabilities: list[list[float]], gold: list[int]) -> dict[str, float]:
    """Accuracy, macro-F1, NLL, and ECE with what a calibrated predictor would show, of log-probabilities [rows, C]."""
    scores = torch.tensor(log_probabilities, dtype=torch.float64)
    truth = torch.tensor(gold)
    confidence, said = scores.log_softmax(-1).exp().max(-1)
    right = said == truth
    return {
        "% accuracy": 100 * metrics.accuracy(right),
        "% macro-F1": 100 * macro_f1(said, truth),
        "NLL": metrics.row_losses(scores, truth).mean().item(),
        "ECE": metrics.ece(confidence, right),
        "ECE null": metrics.ece_null(confidence),
    }


def costs(measured: Measured) -> dict[str, float]:
    return {
        "s training": measured.train_seconds,
        "ms a row alone": measured.ms_one,
        "ms a row in batch": measured.ms_batch,
        "MB shipped": measured.mb_shipped,
        "MB with its base": measured.mb_shipped + measured.mb_needed,
    }


def folder_mb(folder: Path) -> float:
    """Megabytes of all files of a folder."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) / MB
