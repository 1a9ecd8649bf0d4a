"""Measures of held-out scores with intervals, and a confusion matrix."""

import math

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import one_hot

from .. import UsageError
from ..engine.intervals import mean_interval, share_interval
from ..metrics import ece, ece_null, row_losses, smooth_ece


def measures(scores: Tensor, gold: Tensor, temperatures=1.0, right: Tensor | None = None) -> dict:
    """Measures of `scores` (`selection.Candidate`) on their rows.

    Accuracy, NLL and Brier with their 95 % intervals, [mean, low, high]. The rest are points: macro-F1, ECE, its null
    (ECE is biased upwards: an interval by resampling would lie above it). `temperatures`: a number, or [n] of the rows.
    Of text, `right` [n] says which answers were right, and only accuracy and NLL (a token) are known.
    """
    scores = scores.double()
    temperatures = torch.as_tensor(temperatures).expand(len(scores))[:, None]
    losses = row_losses(scores, gold, temperatures)
    nll = mean_of_losses(losses.tolist())
    if right is not None:
        return {"acc": accuracy_with_interval(right), "nll": nll}
    probabilities = (scores / temperatures).softmax(-1)
    highest = probabilities.max(-1)
    predicted = highest.indices
    confidence = highest.values.numpy()
    right = predicted == gold
    truth = one_hot(gold, scores.shape[1])
    brier = ((probabilities - truth) ** 2).sum(-1)
    untempered = scores.softmax(-1).max(-1).values
    return {
        "acc": accuracy_with_interval(right),
        "macro_f1": macro_f1(predicted.numpy(), gold.numpy()),
        "brier": mean_of_losses(brier.tolist()),
        "nll": nll,
        "ece": ece(confidence, right.numpy()),
        "ece_null": ece_null(confidence),
        "smooth_ece": smooth_ece(confidence, right.numpy()),
        "ece_without_temperature": ece(untempered.numpy(), right.numpy()),
    }


def macro_f1(predicted, gold) -> float:
    """Mean F1 of the labels that were predicted or are true; `predicted` and `gold` [Q] are indices of labels."""
    predicted = np.asarray(predicted)
    gold = np.asarray(gold)
    scores = []
    for label in np.union1d(predicted, gold):
        positive = predicted == label
        true = gold == label
        true_positive = np.sum(positive & true)
        scores.append(2 * true_positive / (np.sum(positive) + np.sum(true)))
    return float(np.mean(scores))


def accuracy_with_interval(right: Tensor) -> list[float]:
    """The share of right answers with its interval."""
    interval = share_interval(int(right.sum()), len(right))
    return list(interval)


def mean_of_losses(losses: list[float]) -> list[float]:
    """Mean and interval of losses, which are never negative: the interval is cut at zero."""
    mean, low, high = mean_interval(losses)
    if not math.isnan(low):
        low = max(0.0, low)
    return [mean, low, high]


def confidence_threshold(confidences: list[float], coverage: float | None) -> float:
    """The confidence that the share `coverage` of held-out rows reaches (split conformal: of n + 1 rows).

    Raises UsageError for no such share, and without `confidences` of held-out rows.
    """
    if coverage is None:
        return 0.0
    if not 0 < coverage <= 1:
        raise UsageError(f"--coverage {coverage:g}: a share of the rows, above 0 and at most 1")
    if not confidences:
        raise UsageError("--coverage: this adapter has no held-out confidences of `ia2mini fit`")
    rows = len(confidences)
    below = min(rows, math.floor((rows + 1) * (1 - coverage) + 1e-9))
    return sorted(confidences)[below - 1] if below else 0.0


def classes(scores: Tensor, gold: Tensor, labels: tuple[str, ...]) -> dict:
    """Confusion matrix [true][predicted] and, for each label, its rows, precision and recall (None where undefined)."""
    C = len(labels)
    predicted = scores.argmax(-1)
    matrix = torch.bincount(gold * C + predicted, minlength=C * C).view(C, C)
    rows = []
    for c, label in enumerate(labels):
        hits = int(matrix[c, c])
        true_rows = int(matrix[c].sum())
        predicted_rows = int(matrix[:, c].sum())
        about = {
            "label": label,
            "rows": true_rows,
            "precision": hits / predicted_rows if predicted_rows else None,
            "recall": hits / true_rows if true_rows else None,
        }
        rows.append(about)
    return {"confusion": matrix.tolist(), "classes": rows}


def commonest(gold: Tensor, labels: int) -> dict:
    """The measures of always giving the most frequent label, with the label frequencies as probabilities."""
    scores = log_frequencies(gold, labels)
    return measures(scores.expand(len(gold), -1), gold)


def log_frequencies(gold: Tensor, labels: int) -> Tensor:
    """The log of each label's frequency [C] among true labels [n]; -100 of a label that no row has."""
    frequencies = torch.bincount(gold, minlength=labels) / len(gold)
    return frequencies.log().clamp_min(-100)
