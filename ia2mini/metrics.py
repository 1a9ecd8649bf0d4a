"""How good, how calibrated and how alike: accuracy, ECE and its null, NLL, Brier, asim, overlap, the paired test.

Pure functions over arrays or tensors; scalars are computed in float64. No rows give NaN, as does a NaN among them.
"""

import math
from functools import cache
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from .intervals import LEAST_ROWS, student_p, student_quantile


class PairedTest(NamedTuple):
    """The `mean` of paired differences and what a paired t-test says of it; NaN where there is nothing to test.

    `low` to `high` is Student's 95 % interval of the mean: it leaves out 0 just where the two-sided `p` is below .05.
    `d` is the effect size of pairs (Cohen 1988): the mean in standard deviations of the differences.
    """

    mean: float
    low: float = float("nan")
    high: float = float("nan")
    t: float = float("nan")
    p: float = float("nan")
    pairs: int = 0
    d: float = float("nan")


def _float64(values) -> np.ndarray:
    if isinstance(values, torch.Tensor):
        values = values.detach().double().cpu().numpy()
    return np.asarray(values, dtype=np.float64)


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if values.size else float("nan")


def accuracy(correct) -> float:
    """Fraction of right rows; correct [Q] of 0 and 1."""
    return _mean(_float64(correct))


def macro_f1(said, gold) -> float:
    """Mean F1 of the labels that were given or are true; `said` and `gold` [Q] are indices of labels."""
    said, gold = np.asarray(said), np.asarray(gold)
    found = []
    for label in np.union1d(said, gold):
        both = np.sum((said == label) & (gold == label))
        found.append(2 * both / (np.sum(said == label) + np.sum(gold == label)))
    return _mean(np.array(found))


def reliability(confidence, correct, bins: int = 15, scheme: str = "width") -> np.ndarray:
    """Reliability diagram of Guo et al. 2017, of [Q] twice: each bin's rows, sum of confidences, right rows, [bins, 3].

    `width`: equal widths on [0, 1], each bin open on the left, closed on the right; a confidence of 0 belongs to the
    first. `mass`: rows sorted by confidence and cut into bins whose counts differ by at most one. Rows of equal
    confidence share their mean correctness, so the order of rows never matters. `scripts`: as the paper's released
    scripts cut sorted rows, Q // bins in each and the rest in the last; rows of equal confidence stay in their order.
    """
    confidence, correct = _float64(confidence), _float64(correct)
    assert confidence.shape == correct.shape and confidence.ndim == 1, (
        confidence.shape,
        correct.shape,
    )
    assert not ((confidence < 0) | (confidence > 1 + 1e-6)).any(), "a confidence is outside [0, 1]"
    if scheme == "width":
        index = np.searchsorted(np.linspace(0, 1, bins + 1)[1:-1], confidence, side="left")
    elif scheme == "mass":
        _, tie = np.unique(confidence, return_inverse=True)
        correct = (np.bincount(tie, correct) / np.bincount(tie))[tie]
        index = np.empty(len(confidence), dtype=np.int64)
        for i, rows in enumerate(np.array_split(np.argsort(confidence, kind="stable"), bins)):
            index[rows] = i
    elif scheme == "scripts":
        order = np.argsort(confidence, kind="stable")
        size = len(confidence) // bins
        index = np.full(len(confidence), bins - 1)
        index[order[: size * (bins - 1)]] = np.repeat(np.arange(bins - 1), size)
    else:
        raise ValueError(f"scheme {scheme!r}: use width, mass or scripts")
    return np.stack([np.bincount(index, values, bins) for values in (None, confidence, correct)], 1)


def ece(confidence, correct, bins: int = 15, scheme: str = "width") -> float:
    """Expected calibration error (Guo et al. 2017, equation 3) over the bins of `reliability`."""
    rows, confidences, right = reliability(confidence, correct, bins, scheme).T
    return float(np.abs(right - confidences).sum() / rows.sum()) if rows.any() else float("nan")


def ece_null(
    confidence, bins: int = 15, scheme: str = "width", draws: int = 1000, seed: int = 0
) -> float:
    """The mean ECE that a perfectly calibrated predictor shows on rows of these confidences [Q], by simulation.

    Each of `draws` times a row is right with the probability that it was given; an ECE of this size is no evidence of
    miscalibration.
    """
    confidence = np.sort(np.clip(_float64(confidence), 0, 1))
    if not len(confidence):
        return float("nan")
    rows, confidences, _ = reliability(confidence, confidence, bins, scheme).T
    # sorted by confidence, a bin's rows stand together in both schemes
    ends = np.cumsum(rows).astype(np.int64)
    right = np.random.default_rng(seed).random((draws, len(confidence))) < confidence
    shared = right.astype(float)
    if scheme != "scripts":  # rows of equal confidence share their mean, as `reliability` has it
        _, first, tie, count = np.unique(
            confidence, return_index=True, return_inverse=True, return_counts=True
        )
        shared = (np.add.reduceat(shared, first, axis=1) / count)[:, tie]
    until = np.concatenate([np.zeros((draws, 1)), shared.cumsum(1)], 1)[
        :, np.concatenate([[0], ends])
    ]
    return float(np.abs(np.diff(until, axis=1) - confidences).sum(1).mean() / len(confidence))


def smooth_ece(confidence, correct, bandwidth: float | None = None) -> float:
    """SmoothECE (Błasiok and Nakkiran 2024) of [Q] twice: without bins; it finds its `bandwidth`, unless one is given.

    The mean absolute value over [0, 1] of the residuals after a Gaussian kernel that is reflected at both ends, at the
    bandwidth that equals it.
    """
    confidence = np.clip(_float64(confidence), 0, 1)
    residuals = (_float64(correct) - confidence)[None] / max(1, len(confidence))
    return float(smoothed(confidence, residuals, bandwidth)[0]) if len(confidence) else float("nan")


@cache
def waves() -> tuple[np.ndarray, np.ndarray]:
    """Frequencies [W] of the cosines that `smoothed` adds, enough for bandwidths from 0.001, and these [places, W]."""
    found = np.pi * np.arange(1024)
    return found, np.cos(np.outer((np.arange(1024) + 0.5) / 1024, found))


def smoothed(
    confidence: np.ndarray, residuals: np.ndarray, bandwidth: float | None = None
) -> np.ndarray:
    """SmoothECE [B] of residuals [B, Q], a row's share of all rows times right minus confidence [Q].

    Reflection makes a smoothed residual a sum of cosines, each damped by the kernel.
    """
    frequencies, cosines = waves()
    weights = residuals @ np.cos(np.outer(confidence, frequencies))
    weights[:, 1:] *= 2

    def at(sigma: np.ndarray) -> np.ndarray:
        damped = weights * np.exp(-((frequencies * sigma[:, None]) ** 2) / 2)
        return np.abs(damped @ cosines.T).mean(1)

    low, high = (np.full(len(residuals), value) for value in (0.001, 1.0))
    if bandwidth is not None:
        return at(high * bandwidth)
    while (high - low).max() > 1e-4:  # the smoothed error falls as the bandwidth grows
        middle = (low + high) / 2
        above = at(middle) > middle
        low, high = np.where(above, middle, low), np.where(above, high, middle)
    return at(high)


def risk_coverage(confidence, correct) -> float:
    """Area under the risk-coverage curve (Geifman and El-Yaniv 2017): how well confidence ranks right above wrong.

    The mean, over the 1 to Q most certain rows, of the share of wrong ones; rows of equal confidence share theirs.
    """
    confidence, correct = _float64(confidence), _float64(correct)
    if not len(confidence) or np.isnan(confidence).any():
        return float("nan")
    _, tie = np.unique(-confidence, return_inverse=True)
    # the most certain first
    wrong = 1 - (np.bincount(tie, correct) / np.bincount(tie))[np.sort(tie)]
    return float((wrong.cumsum() / np.arange(1, len(wrong) + 1)).mean())


def nll(log_probabilities) -> float:
    """Mean negative log-likelihood in nats, of the true labels' log-probabilities [Q]; infinite where one is -inf."""
    return _mean(-_float64(log_probabilities))


def row_losses(
    scores: torch.Tensor, gold: torch.Tensor, temperature: float | torch.Tensor = 1.0
) -> torch.Tensor:
    """-log p(gold) [..., n] among log-probabilities [..., n, C] of labels, or of texts' true answers [..., n, 1].

    `temperature`: one for all, or [n, 1] of the rows.
    """
    if scores.shape[-1] == 1:
        return -scores[..., 0]
    return (
        -(scores / temperature)
        .log_softmax(-1)
        .gather(-1, gold.expand(scores.shape[:-1])[..., None])[..., 0]
    )


def temperatures(
    scores: torch.Tensor, gold: torch.Tensor, doubt: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Temperatures [T] from 0.05 to 20, and each row's loss at each, [T, n], with targets of 1 - `doubt`."""
    C = scores.shape[1]
    true = torch.full_like(scores, doubt / (C - 1), dtype=torch.float64).scatter_(
        1, gold[:, None], 1 - doubt
    )
    grid = torch.logspace(math.log10(0.05), math.log10(20), 241, dtype=torch.float64)
    losses = []
    for temperature in grid:
        log_shares = (scores.double() / temperature).log_softmax(-1)
        # a label that cannot be said may be impossible
        expected = torch.where(true > 0, true * log_shares, 0.0)
        losses.append(-expected.sum(-1))
    return grid, torch.stack(losses)


def fit_temperature(scores: torch.Tensor, gold: torch.Tensor, oracle: bool = False) -> float:
    """The temperature from 0.05 to 20 with the lowest mean loss of `scores` [n, C] (Guo et al. 2017); 1 for text.

    Targets are (n + 1) / (n + 2) instead of 1 (Platt 1999): n rows that are all right prove no certainty. Not so for an
    `oracle`, which is fitted on the very rows it is judged by.
    """
    n, C = scores.shape
    if C == 1:
        return 1.0
    grid, losses = temperatures(scores, gold, 0.0 if oracle else 1 / (n + 2))
    return grid[losses.mean(1).argmin()].item()


def left_out_nll(scores: torch.Tensor, gold: torch.Tensor) -> float:
    """Mean loss of the rows of `scores` [n, C], each at the temperature that suits all the others (leave-one-out)."""
    n, C = scores.shape
    if C == 1 or n < 2:
        return float("nan")
    judged, losses = (temperatures(scores, gold, doubt)[1] for doubt in (0.0, 1 / (n + 1)))
    best = (losses.sum(1, keepdim=True) - losses).argmin(0)
    return judged[best, torch.arange(n)].mean().item()


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


def paired_test(a, b) -> PairedTest:
    """Paired t-test of a against b (paper Table 8), both [pairs].

    Of fewer than five pairs and of equal differences only the mean is known: their spread says nothing of chance.
    """
    a, b = _float64(a), _float64(b)
    assert a.shape == b.shape and a.ndim == 1, (a.shape, b.shape)
    difference = a - b
    pairs, mean = len(difference), _mean(difference)
    if pairs < LEAST_ROWS or np.ptp(difference) < 1e-12:
        return PairedTest(mean, pairs=pairs)
    spread = float(difference.std(ddof=1))
    error = spread / math.sqrt(pairs)
    t = mean / error
    reach = student_quantile(0.975, pairs - 1) * error
    p = student_p(t, pairs - 1)
    return PairedTest(mean, mean - reach, mean + reach, t, p, pairs, mean / spread)


def measure(
    confidence, correct, scores, gold, scheme: str = "width", temperature: float = 1.0
) -> dict:
    """All metrics of one run on Q labelled rows (protocol section 5).

    `confidence` [Q] of the greedy answer, `correct` [Q], `scores` [Q, C] log-probabilities of the labels among all that
    could be said, `gold` [Q] indices of the true labels. `scheme`: bins of `ece`, see `reliability`. Among the labels
    alone there are the NLL as it is, at a `temperature` from other rows, for each row at that of all others (left out),
    and at the best one for these rows (oracle).
    """
    best = scores.softmax(-1).max(-1)
    heats = {
        "nll_labels": 1.0,
        "nll_dev": temperature,
        "nll_oracle": fit_temperature(scores, gold, oracle=True),
    }
    calibrated = {
        name: row_losses(scores.double(), gold, heat).mean().item() for name, heat in heats.items()
    }
    return {
        **calibrated,
        "nll_left_out": left_out_nll(scores, gold),
        "acc": accuracy(correct),
        "smooth_ece": smooth_ece(confidence, correct),
        "overconfidence": confidence.mean().item() - accuracy(correct),
        "risk_coverage": risk_coverage(confidence, correct),
        "ece": ece(confidence, correct, scheme=scheme),
        "ece_null": ece_null(confidence, scheme=scheme),
        "ece_mass": ece(confidence, correct, scheme="mass"),
        "nll": nll(scores.gather(1, gold[:, None])[:, 0]),
        "brier": brier(scores.double().exp(), gold),
        "acc_labels": accuracy(best.indices == gold),
        "ece_labels": ece(best.values, best.indices == gold),
        "reliability": reliability(confidence, correct).tolist(),
    }
