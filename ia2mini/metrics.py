"""How good, how calibrated and how alike: accuracy, ECE and its null, NLL, Brier, asim, overlap, the paired test.

Pure functions over arrays or tensors; scalars are computed in float64. No rows give NaN, as does a NaN among them.
"""

import math
import warnings
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F


class PairedTest(NamedTuple):
    """`mean` of the differences with its 95 % bootstrap interval `low` to `high`; Student's `t`, two-sided `p`."""

    mean: float
    low: float
    high: float
    t: float  # NaN without scipy
    p: float
    pairs: int


def _float64(values) -> np.ndarray:
    if isinstance(values, torch.Tensor):
        values = values.detach().double().cpu().numpy()
    return np.asarray(values, dtype=np.float64)


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if values.size else float("nan")


def accuracy(correct) -> float:
    """Fraction of right rows; correct [Q] of 0 and 1."""
    return _mean(_float64(correct))


def reliability(confidence, correct, bins: int = 15, scheme: str = "width") -> np.ndarray:
    """Reliability diagram of Guo et al. 2017, of [Q] twice: each bin's rows, sum of confidences, right rows, [bins, 3].

    `width`: equal widths on [0, 1], each bin open on the left, closed on the right; a confidence of 0 belongs to the
    first. `mass`: rows sorted by confidence and cut into bins whose counts differ by at most one. Rows of equal
    confidence share their mean correctness, so the order of rows never matters.
    """
    confidence, correct = _float64(confidence), _float64(correct)
    assert confidence.shape == correct.shape and confidence.ndim == 1, (confidence.shape, correct.shape)
    assert not ((confidence < 0) | (confidence > 1 + 1e-6)).any(), "a confidence is outside [0, 1]"
    if scheme == "width":
        index = np.searchsorted(np.linspace(0, 1, bins + 1)[1:-1], confidence, side="left")
    elif scheme == "mass":
        _, tie = np.unique(confidence, return_inverse=True)
        correct = (np.bincount(tie, correct) / np.bincount(tie))[tie]
        index = np.empty(len(confidence), dtype=np.int64)
        for i, rows in enumerate(np.array_split(np.argsort(confidence, kind="stable"), bins)):
            index[rows] = i
    else:
        raise ValueError(f"scheme {scheme!r}: use width or mass")
    return np.stack([np.bincount(index, values, bins) for values in (None, confidence, correct)], 1)


def ece(confidence, correct, bins: int = 15, scheme: str = "width") -> float:
    """Expected calibration error (Guo et al. 2017, equation 3) over the bins of `reliability`."""
    rows, confidences, right = reliability(confidence, correct, bins, scheme).T
    return float(np.abs(right - confidences).sum() / rows.sum()) if rows.any() else float("nan")


def ece_null(confidence, bins: int = 15, scheme: str = "width", draws: int = 1000, seed: int = 0) -> float:
    """The mean ECE that a perfectly calibrated predictor shows on rows of these confidences [Q], by simulation.

    Each of `draws` times a row is right with the probability that it was given; an ECE of this size is no evidence of
    miscalibration.
    """
    confidence = np.sort(np.clip(_float64(confidence), 0, 1))
    if not len(confidence):
        return float("nan")
    rows, confidences, _ = reliability(confidence, confidence, bins, scheme).T
    ends = np.cumsum(rows).astype(np.int64)  # sorted by confidence, a bin's rows stand together in both schemes
    right = np.random.default_rng(seed).random((draws, len(confidence))) < confidence
    _, first, tie, count = np.unique(confidence, return_index=True, return_inverse=True, return_counts=True)
    shared = (np.add.reduceat(right.astype(float), first, axis=1) / count)[:, tie]  # as `reliability` does
    until = np.concatenate([np.zeros((draws, 1)), shared.cumsum(1)], 1)[:, np.concatenate([[0], ends])]
    return float(np.abs(np.diff(until, axis=1) - confidences).sum(1).mean() / len(confidence))


def nll(p_label) -> float:
    """Mean negative log-likelihood in nats; p_label [Q], at least the smallest normal float32: the mean is finite."""
    return _mean(-np.log(np.maximum(_float64(p_label), np.finfo(np.float32).tiny)))


def row_losses(scores: torch.Tensor, gold: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """-log p(gold) [..., n] among log-probabilities [..., n, C] of labels, or of texts' true answers [..., n, 1]."""
    if scores.shape[-1] == 1:
        return -scores[..., 0]
    return -(scores / temperature).log_softmax(-1).gather(-1, gold.expand(scores.shape[:-1])[..., None])[..., 0]


def fit_temperature(scores: torch.Tensor, gold: torch.Tensor) -> float:
    """The temperature from 0.05 to 20 with the lowest mean loss of `scores` [n, C] (Guo et al. 2017); 1 for text.

    Targets are (n + 1) / (n + 2) instead of 1 (Platt 1999): n rows that are all right prove no certainty.
    """
    n, C = scores.shape
    if C == 1:
        return 1.0
    true = torch.full_like(scores, 1 / (n + 2) / (C - 1), dtype=torch.float64)
    true.scatter_(1, gold[:, None], (n + 1) / (n + 2))
    grid = torch.logspace(math.log10(0.05), math.log10(20), 241, dtype=torch.float64)
    losses = torch.stack([-(true * (scores.double() / t).log_softmax(-1)).sum(-1).mean() for t in grid])
    return grid[losses.argmin()].item()


def brier(probs, label) -> float:
    """Mean squared distance to the one-hot label, from 0 to 2 (Brier 1950); probs [Q, C], label [Q] of indices."""
    probs, label = _float64(probs), _float64(label).astype(np.int64)
    return _mean(((probs - np.eye(probs.shape[1])[label]) ** 2).sum(1))


def asim(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Cosine similarity of activations (paper section 2): [..., D] twice -> float32 [...]; 0 where a vector is zero."""
    return F.cosine_similarity(a.float(), b.float(), dim=-1).clamp(-1, 1)


def subspace_overlap(delta1: torch.Tensor, delta2: torch.Tensor, rank: int) -> torch.Tensor:
    """||U1^T U2||_F^2 / rank [...], from 0 to 1: what two updates' column spaces share (paper section 5.2, Figure 4).

    U is the basis of the first `rank` left singular vectors. delta [..., out, r] is LoRA's B, or [..., out, in] its
    product BA, which spans the same columns when A has full row rank. A zero update overlaps by 0.
    """
    bases = []
    for delta in (delta1, delta2):
        u, s, _ = torch.linalg.svd(delta.double(), full_matrices=False)
        kept = s > s[..., :1] * 1e-6  # float32's rounding is not a direction
        bases.append((u * kept.unsqueeze(-2))[..., :rank])
    return (bases[0].mT @ bases[1]).square().sum((-2, -1)) / rank


def paired_test(a, b, seed: int = 0) -> PairedTest:
    """Paired t-test of a against b (paper Table 8), both [pairs]; the interval resamples 10,000 times; of one: NaN."""
    a, b = _float64(a), _float64(b)
    assert a.shape == b.shape and a.ndim == 1, (a.shape, b.shape)
    difference, nan = a - b, float("nan")
    if len(a) < 2:
        return PairedTest(_mean(difference), nan, nan, nan, nan, len(a))
    resamples = np.random.default_rng(seed).integers(len(a), size=(10_000, len(a)))
    low, high = np.quantile(difference[resamples].mean(1), [0.025, 0.975])
    try:
        from scipy import stats

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of equal differences t is infinite, or NaN
            t, p = stats.ttest_rel(a, b)
    except ImportError:
        t = p = nan
    return PairedTest(_mean(difference), float(low), float(high), float(t), float(p), len(a))


def measure(confidence, correct, probabilities, gold, scheme: str = "width") -> dict:
    """All metrics of one run on Q labelled rows (protocol section 5).

    `confidence` [Q] of the greedy answer, `correct` [Q], `probabilities` [Q, C] of the labels among all that could be
    said, `gold` [Q] indices of the true labels. `scheme`: bins of `ece`, of equal "width" or "mass".
    """
    best = (probabilities / probabilities.sum(-1, keepdim=True)).max(-1)
    return {
        "acc": accuracy(correct),
        "ece": ece(confidence, correct, scheme=scheme),
        "ece_null": ece_null(confidence, scheme=scheme),
        "ece_mass": ece(confidence, correct, scheme="mass"),
        "nll": nll(probabilities.gather(1, gold[:, None])[:, 0]),
        "brier": brier(probabilities, gold),
        "acc_labels": accuracy(best.indices == gold),
        "ece_labels": ece(best.values, best.indices == gold),
        "reliability": reliability(confidence, correct).tolist(),
    }
