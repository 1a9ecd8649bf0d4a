"""Intervals and tests for few rows: Student's t for means, Clopper and Pearson's for shares, the exact sign test.

Without scipy; the tests compare with it.
"""

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np

LEAST_ROWS = 5  # or pairs; fewer get no interval and no p-value


class PairedTest(NamedTuple):
    """The `mean` of paired differences and what a paired t-test says of it; NaN where there is nothing to test.

    `low` to `high` is Student's 95 % interval of the mean: it excludes 0 exactly if the two-sided `p` is below .05.
    `d` is the effect size of pairs (Cohen 1988): the mean in standard deviations of the differences.
    """

    mean: float
    low: float = math.nan
    high: float = math.nan
    t: float = math.nan
    p: float = math.nan
    pairs: int = 0
    d: float = math.nan


def bisect(rising: Callable[[float], float], wanted: float, low: float, high: float) -> float:
    """The point between `low` and `high` where a rising function reaches `wanted`."""
    for _ in range(60):
        middle = (low + high) / 2
        if rising(middle) < wanted:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def student_within(t: float, freedom: int) -> float:
    """P(|T| <= t) of Student's t with whole degrees of freedom (Abramowitz and Stegun 26.7.3 and 26.7.4)."""
    angle = math.atan(t / math.sqrt(freedom))
    sine = math.sin(angle)
    cosine = math.cos(angle)
    odd = freedom % 2 == 1
    first = 3 if odd else 2
    term = cosine if odd else 1.0
    total = 0.0
    for k in range(first, freedom + 1, 2):
        total += term
        term *= cosine**2 * (k - 1) / k
    if odd:
        return 2 / math.pi * (angle + sine * total)
    return sine * total


def student_p(t: float, freedom: int) -> float:
    """Two-sided p-value of `t`, to 1e-15; smaller values may be 0."""
    return max(0.0, 1 - student_within(abs(t), freedom))


@lru_cache
def student_quantile(share: float, freedom: int) -> float:
    """The t that Student's t does not exceed with probability `share`, of at least one half."""

    def below(t: float) -> float:
        return (1 + student_within(t, freedom)) / 2

    return bisect(below, share, low=0.0, high=1e4)


def mean_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean of `values` [n] with its 95 % Student t interval.

    The interval is NaN below five rows and where all are equal: their spread says nothing of chance.
    """
    values = np.asarray(values, dtype=np.float64)
    n = len(values)
    mean = float(values.mean())
    if n < LEAST_ROWS or np.ptp(values) < 1e-12:
        return mean, math.nan, math.nan
    spread = float(values.std(ddof=1))
    half = student_quantile(0.975, n - 1) * spread / math.sqrt(n)
    return mean, mean - half, mean + half


def paired_test(a, b) -> PairedTest:
    """Paired t-test of a against b (paper Table 8), both [pairs].

    Of fewer than five pairs and of equal differences only the mean is known: their spread says nothing of chance.
    Where a pair has no finite number (a run has failed) not even that: NaN.
    """
    a = np.asarray(a, dtype=np.float64)
    b = np.asarray(b, dtype=np.float64)
    assert a.shape == b.shape and a.ndim == 1, (a.shape, b.shape)
    pairs = len(a)
    if not pairs or not np.isfinite([a, b]).all():
        return PairedTest(math.nan, pairs=pairs)
    difference = a - b
    mean, low, high = mean_interval(difference)
    if math.isnan(low):
        return PairedTest(mean, pairs=pairs)
    spread = float(difference.std(ddof=1))
    error = spread / math.sqrt(pairs)
    t = mean / error
    p = student_p(t, pairs - 1)
    d = mean / spread
    return PairedTest(mean, low, high, t, p, pairs, d)


def surely_positive(differences: Sequence[float], level: float = 0.05) -> bool:
    """Whether the mean of paired `differences` [n] is above zero by a one-sided t test; not below five rows."""
    values = np.asarray(differences, dtype=np.float64)
    n = len(values)
    if n < LEAST_ROWS:
        return False
    mean = float(values.mean())
    error = float(values.std(ddof=1)) / math.sqrt(n)
    return mean > student_quantile(1 - level, n - 1) * error


def log_factorial(n: int) -> float:
    return math.lgamma(n + 1)


def binomial_tail(successes: int, n: int, share: float) -> float:
    """P(X >= successes) of n trials that succeed with probability `share`."""
    if successes <= 0 or share >= 1:
        return 1.0
    if share <= 0:
        return 0.0
    log_success = math.log(share)
    log_failure = math.log1p(-share)
    total = 0.0
    for k in range(successes, n + 1):
        failures = n - k
        log_ways = log_factorial(n) - log_factorial(k) - log_factorial(failures)
        total += math.exp(log_ways + k * log_success + failures * log_failure)
    return total


def share_interval(successes: int, n: int) -> tuple[float, float, float]:
    """Share of successes with its exact 95 % interval (Clopper and Pearson 1934), which is NaN below five rows."""
    if n < LEAST_ROWS:
        return successes / n, math.nan, math.nan

    def at_least(share: float) -> float:
        return binomial_tail(successes, n, share)

    def more(share: float) -> float:
        return binomial_tail(successes + 1, n, share)

    low = 0.0
    high = 1.0
    if successes > 0:
        low = bisect(at_least, 0.025, 0.0, 1.0)
    if successes < n:
        high = bisect(more, 0.975, 0.0, 1.0)
    return successes / n, low, high


def sign_test(more: int, less: int) -> float:
    """Two-sided p of `more` against `less` discordant pairs: the exact sign test of McNemar (1947); 1 without any."""
    one_sided = binomial_tail(max(more, less), more + less, 0.5)
    return min(1.0, 2 * one_sided)


def surely_more(more: int, less: int, level: float = 0.05) -> bool:
    """Whether `more` of the discordant pairs is significant by the one-sided sign test."""
    return binomial_tail(more, more + less, 0.5) < level
