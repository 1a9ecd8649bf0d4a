"""How good held-out scores are: numbers with intervals, and what was said of each label."""

import math

import torch
from torch import Tensor

from ..engine.intervals import mean_interval, share_interval
from ..metrics import ece, ece_null, macro_f1, row_losses, smooth_ece


def measures(scores: Tensor, gold: Tensor, temperatures=1.0, right: Tensor | None = None) -> dict:
    """How good `scores` (`selection.Candidate`) are on their rows.

    Accuracy, NLL and Brier with their 95 % intervals, [mean, low, high]. The rest are points: macro-F1, ECE, its null
    (ECE is biased upwards: an interval by resampling would lie above it). `temperatures`: a number, or [n] of the rows.
    Of text, `right` [n] says which answers were right, and only accuracy and NLL (a token) are known.
    """
    heat = torch.as_tensor(temperatures).expand(len(scores))[:, None]
    losses = row_losses(scores.double(), gold, heat).tolist()
    if right is not None:
        return {"acc": list(share_interval(int(right.sum()), len(right))), "nll": positive(losses)}
    p = (scores.double() / heat).softmax(-1)
    confidence, said = (t.numpy() for t in p.max(-1))
    correct = said == gold.numpy()
    distances = ((p - torch.nn.functional.one_hot(gold, p.shape[1])) ** 2).sum(-1)
    raw = scores.double().softmax(-1).max(-1).values.numpy()
    return {
        "acc": list(share_interval(int(correct.sum()), len(correct))),
        "macro_f1": macro_f1(said, gold.numpy()),
        "brier": positive(distances.tolist()),
        "nll": positive(losses),
        "ece": ece(confidence, correct),
        "ece_null": ece_null(confidence),
        "smooth_ece": smooth_ece(confidence, correct),
        "ece_without_temperature": ece(raw, correct),
    }


def positive(values: list[float]) -> list[float]:
    """Mean and interval of what is never below zero, which is where the interval is cut."""
    mean, low, high = mean_interval(values)
    return [mean, low if math.isnan(low) else max(0.0, low), high]


def classes(scores: Tensor, gold: Tensor, labels: tuple[str, ...]) -> dict:
    """Confusion matrix [true][said] and, for each label, its rows, precision and recall (None where undefined)."""
    said, C = scores.argmax(-1), len(labels)
    matrix = torch.bincount(gold * C + said, minlength=C * C).view(C, C)
    rows = []
    for c, label in enumerate(labels):
        hit, true, named = (int(x) for x in (matrix[c, c], matrix[c].sum(), matrix[:, c].sum()))
        about = {"label": label, "rows": true}
        rows.append(
            about
            | {"precision": hit / named if named else None, "recall": hit / true if true else None}
        )
    return {"confusion": matrix.tolist(), "classes": rows}


def commonest(gold: Tensor, labels: int) -> dict:
    """The measures of always saying the most frequent label, with the frequencies among these rows."""
    shares = torch.bincount(gold, minlength=labels) / len(gold)
    return measures(shares.log().clamp_min(-100).expand(len(gold), -1), gold)
