"""How good, how calibrated and how alike: accuracy, ECE and its null, NLL, Brier, asim.

Pure functions over arrays or tensors; scalars are computed in float64. No rows give NaN, as does a NaN among them.
"""

import math
from functools import cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

BINS = 15  # of a reliability diagram
AT_ONCE = 100_000  # numbers, where rows are tried at many temperatures


def _float64(values) -> np.ndarray:
    if isinstance(values, Tensor):
        values = values.detach().double().cpu().numpy()
    return np.asarray(values, dtype=np.float64)


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if values.size else math.nan


def accuracy(correct) -> float:
    """Fraction of right rows; correct [Q] of 0 and 1."""
    return _mean(_float64(correct))


def share_ties(confidence: np.ndarray, correct: np.ndarray) -> np.ndarray:
    """`correct` [Q], with rows of equal confidence each given their mean."""
    _, tie = np.unique(confidence, return_inverse=True)
    means = np.bincount(tie, correct) / np.bincount(tie)
    return means[tie]


def reliability(confidence, correct, bins: int = BINS, scheme: str = "width") -> np.ndarray:
    """Reliability diagram of Guo et al. 2017, of [Q] twice: each bin's rows, sum of confidences, right rows, [bins, 3].

    - `width`: equal widths on [0, 1]. A bin is open on the left and closed on the right; 0 belongs to the first.
    - `mass`: rows sorted by confidence, cut into bins whose counts differ by at most one. Rows of equal confidence
      share their mean correctness, so that the order of rows never matters.
    - `scripts`: as in the paper's released scripts, sorted rows with Q // bins in a bin and the rest in the last. Rows
      of equal confidence stay in their order.
    """
    confidence = _float64(confidence)
    correct = _float64(correct)
    assert confidence.ndim == 1
    assert confidence.shape == correct.shape
    outside = (confidence < 0) | (confidence > 1 + 1e-6)
    assert not outside.any(), "a confidence is outside [0, 1]"
    order = np.argsort(confidence, kind="stable")
    index = np.full(len(confidence), bins - 1)  # the bin of each row
    if scheme == "width":
        edges = np.linspace(0, 1, bins + 1)
        index = np.searchsorted(edges[1:-1], confidence, side="left")
    elif scheme == "mass":
        correct = share_ties(confidence, correct)
        for number, rows in enumerate(np.array_split(order, bins)):
            index[rows] = number
    elif scheme == "scripts":
        size = len(confidence) // bins
        first_bins = np.repeat(np.arange(bins - 1), size)
        index[order[: len(first_bins)]] = first_bins
    else:
        raise ValueError(f"scheme {scheme!r}: use width, mass or scripts")
    sums = [np.bincount(index, values, bins) for values in (None, confidence, correct)]
    return np.stack(sums, 1)


def ece(confidence, correct, bins: int = BINS, scheme: str = "width") -> float:
    """Expected calibration error (Guo et al. 2017, equation 3) over the bins of `reliability`."""
    rows, confidences, right = reliability(confidence, correct, bins, scheme).T
    if not rows.any():
        return math.nan
    gaps = np.abs(right - confidences)
    return float(gaps.sum() / rows.sum())


def ece_null(
    confidence, bins: int = BINS, scheme: str = "width", draws: int = 1000, seed: int = 0
) -> float:
    """The mean ECE that a perfectly calibrated predictor shows on rows of these confidences [Q], by simulation.

    Each of `draws` times a row is right with the probability that it was given; an ECE of this size is no evidence of
    miscalibration.
    """
    confidence = np.sort(np.clip(_float64(confidence), 0, 1))
    if not len(confidence):
        return math.nan
    rows, confidences, _ = reliability(confidence, confidence, bins, scheme).T
    generator = np.random.default_rng(seed)
    correct = generator.random((draws, len(confidence))) < confidence
    shared = correct.astype(float)
    if scheme != "scripts":  # rows of equal confidence share their mean, as `reliability` has it
        _, first, tie, count = np.unique(
            confidence, return_index=True, return_inverse=True, return_counts=True
        )
        sums = np.add.reduceat(shared, first, axis=1)
        shared = (sums / count)[:, tie]
    # sorted by confidence, a bin's rows stand together: right rows in it are a difference of sums
    none_yet = np.zeros((draws, 1))
    so_far = np.concatenate([none_yet, shared.cumsum(1)], 1)
    ends = np.cumsum(rows).astype(np.int64)
    borders = np.concatenate([[0], ends])
    right = np.diff(so_far[:, borders], axis=1)  # [draws, bins]
    gaps = np.abs(right - confidences).sum(1)
    return float(gaps.mean() / len(confidence))


@cache
def cosines() -> tuple[np.ndarray, np.ndarray]:
    """The cosines that `smooth_ece` adds: frequencies [W], enough for bandwidths from 0.001 on; values [1024, W]."""
    frequencies = np.pi * np.arange(1024)
    places = (np.arange(1024) + 0.5) / 1024
    return frequencies, np.cos(np.outer(places, frequencies))


def smooth_ece(confidence, correct, bandwidth: float | None = None) -> float:
    """SmoothECE (Błasiok and Nakkiran 2024) of [Q] twice: without bins; it finds its `bandwidth`, unless one is given.

    The mean absolute value over [0, 1] of the residuals after a Gaussian kernel that is reflected at both ends, at the
    bandwidth that equals it. Reflection makes a smoothed residual a sum of cosines, each damped by the kernel.
    """
    confidence = np.clip(_float64(confidence), 0, 1)
    if not len(confidence):
        return math.nan
    residuals = (_float64(correct) - confidence) / len(confidence)
    frequencies, values = cosines()
    at_rows = np.cos(np.outer(confidence, frequencies))
    weights = residuals @ at_rows
    weights[1:] *= 2

    def smoothed(sigma: float) -> float:
        damping = np.exp(-((frequencies * sigma) ** 2) / 2)
        damped = weights * damping
        return float(np.abs(damped @ values.T).mean())

    if bandwidth is not None:
        return smoothed(bandwidth)
    low = 0.001
    high = 1.0
    while high - low > 1e-4:  # the smoothed error falls as the bandwidth grows
        middle = (low + high) / 2
        if smoothed(middle) > middle:
            low = middle
        else:
            high = middle
    return smoothed(high)


def risk_coverage(confidence, correct) -> float:
    """Area under the risk-coverage curve (Geifman and El-Yaniv 2017): how well confidence ranks right above wrong.

    The mean, over the 1 to Q most certain rows, of the share of wrong ones; rows of equal confidence share theirs.
    """
    confidence = _float64(confidence)
    if not len(confidence) or np.isnan(confidence).any():
        return math.nan
    shared = share_ties(confidence, _float64(correct))
    most_certain_first = np.argsort(-confidence, kind="stable")
    wrong = 1 - shared[most_certain_first]
    answered = np.arange(1, len(wrong) + 1)
    return float((wrong.cumsum() / answered).mean())


def nll(log_probabilities) -> float:
    """Mean negative log-likelihood in nats, of the true labels' log-probabilities [Q]; infinite where one is -inf."""
    return _mean(-_float64(log_probabilities))


def row_losses(scores: Tensor, gold: Tensor, temperature: float | Tensor = 1.0) -> Tensor:
    """-log p(gold) [..., n] among log-probabilities [..., n, C] of labels, or of texts' true answers [..., n, 1].

    `temperature`: one for all, or [n, 1] of the rows.
    """
    if scores.shape[-1] == 1:
        return -scores[..., 0]
    log_shares = (scores / temperature).log_softmax(-1)
    true = gold.expand(scores.shape[:-1])[..., None]
    return -log_shares.gather(-1, true)[..., 0]


def temperatures(scores: Tensor, gold: Tensor, doubt: float = 0.0) -> tuple[Tensor, Tensor]:
    """Temperatures [T] from 0.05 to 20, and each row's loss at each, [T, n], with targets of 1 - `doubt`."""
    C = scores.shape[1]
    targets = torch.full_like(scores, doubt / (C - 1), dtype=torch.float64)
    targets.scatter_(1, gold[:, None], 1 - doubt)
    lowest = math.log10(0.05)
    highest = math.log10(20)
    grid = torch.logspace(lowest, highest, 241, dtype=torch.float64)
    losses = []
    for part in grid.split(1 + AT_ONCE // (1 + scores.numel())):
        log_shares = (scores.double() / part[:, None, None]).log_softmax(-1)  # [t, n, C]
        # a log-probability of -inf where the target is 0 adds 0, not NaN
        expected = torch.where(targets > 0, targets * log_shares, 0.0)
        losses.append(-expected.sum(-1))
    return grid, torch.cat(losses)


def fit_temperature(scores: Tensor, gold: Tensor, oracle: bool = False) -> float:
    """The temperature from 0.05 to 20 with the lowest mean loss of `scores` [n, C] (Guo et al. 2017); 1 for text.

    Targets are (n + 1) / (n + 2) instead of 1 (Platt 1999): n rows that are all right prove no certainty. An
    `oracle` is fitted on the very rows it is judged by, with targets of 1.
    """
    n, C = scores.shape
    if C == 1:
        return 1.0
    doubt = 0.0 if oracle else 1 / (n + 2)
    grid, losses = temperatures(scores, gold, doubt)
    return grid[losses.mean(1).argmin()].item()


def left_out_nll(scores: Tensor, gold: Tensor) -> float:
    """Mean loss of the rows of `scores` [n, C], each at the temperature that suits all the others (leave-one-out)."""
    n, C = scores.shape
    if C == 1 or n < 2:
        return math.nan
    _, judged = temperatures(scores, gold)
    _, losses = temperatures(scores, gold, doubt=1 / (n + 1))
    of_others = losses.sum(1, keepdim=True) - losses
    best = of_others.argmin(0)
    return judged[best, torch.arange(n)].mean().item()


def brier(probs, label) -> float:
    """Mean squared distance to the one-hot label, from 0 to 2 (Brier 1950); probs [Q, C], label [Q] of indices."""
    probs = _float64(probs)
    index = _float64(label).astype(np.int64)
    one_hot = np.eye(probs.shape[1])[index]
    squares = (probs - one_hot) ** 2
    return _mean(squares.sum(1))


def asim(a: Tensor, b: Tensor) -> Tensor:
    """Cosine similarity of activations (paper section 2): [..., D] twice -> float32 [...]; 0 where a vector is zero."""
    similarity = F.cosine_similarity(a.float(), b.float(), dim=-1)
    return similarity.clamp(-1, 1)  # rounding may go beyond


def measure(
    confidence, correct, scores, gold, scheme: str = "width", temperature: float = 1.0
) -> dict:
    """All metrics of one run on Q labelled rows (protocol section 5).

    `confidence` [Q] of the greedy answer, `correct` [Q], `scores` [Q, C] log-probabilities of the labels over the whole
    vocabulary, `gold` [Q] indices of the true labels. `scheme`: bins of `ece`, see `reliability`. Four NLLs renormalise
    over the labels: `nll_labels` as they are, `nll_dev` at `temperature`, which was fitted on other rows,
    `nll_left_out` for each row at the temperature fitted on all others, `nll_oracle` at the best one for these rows.
    """
    exact = scores.double()
    oracle = fit_temperature(scores, gold, oracle=True)
    of_gold = scores.gather(1, gold[:, None])[:, 0]
    likeliest = scores.softmax(-1).max(-1)
    likeliest_is_right = likeliest.indices == gold
    return {
        "nll_labels": row_losses(exact, gold).mean().item(),
        "nll_dev": row_losses(exact, gold, temperature).mean().item(),
        "nll_oracle": row_losses(exact, gold, oracle).mean().item(),
        "nll_left_out": left_out_nll(scores, gold),
        "acc": accuracy(correct),
        "smooth_ece": smooth_ece(confidence, correct),
        "overconfidence": _mean(_float64(confidence)) - accuracy(correct),
        "risk_coverage": risk_coverage(confidence, correct),
        "ece": ece(confidence, correct, scheme=scheme),
        "ece_null": ece_null(confidence, scheme=scheme),
        "ece_mass": ece(confidence, correct, scheme="mass"),
        "nll": nll(of_gold),
        "brier": brier(exact.exp(), gold),
        "acc_labels": accuracy(likeliest_is_right),
        "ece_labels": ece(likeliest.values, likeliest_is_right),
        "reliability": reliability(confidence, correct).tolist(),
    }
