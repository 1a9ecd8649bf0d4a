"""Intervals and tests for few rows: Student's t for means, Clopper and Pearson's for shares, the exact sign test.

Without scipy; the tests compare with it.
"""

import math
from collections.abc import Callable, Sequence
from functools import lru_cache

import numpy as np

LEAST_ROWS = 5  # or pairs: fewer have no interval and no p-value, and prove nothing


def bisect(rising: Callable[[float], float], wanted: float, low: float, high: float) -> float:
    """Where a function that rises from `low` to `high` reaches `wanted`."""
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
    cosine = math.cos(angle)
    odd = freedom % 2 == 1
    term = cosine if odd else 1.0
    total = 0.0
    for k in range(3 if odd else 2, freedom + 1, 2):
        total += term
        term *= cosine**2 * (k - 1) / k
    if odd:
        return 2 / math.pi * (angle + math.sin(angle) * total)
    return math.sin(angle) * total


def student_p(t: float, freedom: int) -> float:
    """Two-sided p-value of `t`, to 1e-15: what is less may be 0."""
    return max(0.0, 1 - student_within(abs(t), freedom))


@lru_cache
def student_quantile(share: float, freedom: int) -> float:
    """The t that Student's t does not exceed with probability `share`, of at least one half."""
    return bisect(lambda t: (1 + student_within(t, freedom)) / 2, share, 0.0, 1e4)


def mean_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean of `values` [n] with its 95 % Student t interval, which is NaN below five rows."""
    values = np.asarray(values, dtype=np.float64)
    n = len(values)
    mean = float(values.mean())
    if n < LEAST_ROWS:
        return mean, math.nan, math.nan
    half = student_quantile(0.975, n - 1) * float(values.std(ddof=1)) / math.sqrt(n)
    return mean, mean - half, mean + half


def surely_positive(differences: Sequence[float], level: float = 0.05) -> bool:
    """Whether the mean of paired `differences` [n] is above zero by a one-sided t test; not below five rows."""
    values = np.asarray(differences, dtype=np.float64)
    n = len(values)
    if n < LEAST_ROWS:
        return False
    error = float(values.std(ddof=1)) / math.sqrt(n)
    return float(values.mean()) > student_quantile(1 - level, n - 1) * error


def binomial_tail(successes: int, n: int, share: float) -> float:
    """P(X >= successes) of n trials that succeed with probability `share`."""
    if successes <= 0 or share >= 1:
        return 1.0
    if share <= 0:
        return 0.0
    total = 0.0
    for k in range(successes, n + 1):
        ways = math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)
        total += math.exp(ways + k * math.log(share) + (n - k) * math.log1p(-share))
    return total


def share_interval(successes: int, n: int) -> tuple[float, float, float]:
    """Share of successes with its exact 95 % interval (Clopper and Pearson 1934), which is NaN below five rows."""
    if n < LEAST_ROWS:
        return successes / n, math.nan, math.nan
    low, high = 0.0, 1.0
    if successes > 0:
        low = bisect(lambda share: binomial_tail(successes, n, share), 0.025, 0.0, 1.0)
    if successes < n:
        high = bisect(lambda share: binomial_tail(successes + 1, n, share), 0.975, 0.0, 1.0)
    return successes / n, low, high


def sign_test(more: int, less: int) -> float:
    """Two-sided p of `more` against `less` discordant pairs: the exact sign test of McNemar (1947); 1 without any."""
    n = more + less
    return min(1.0, 2 * binomial_tail(max(more, less), n, 0.5))


def surely_more(more: int, less: int, level: float = 0.05) -> bool:
    """Whether `more` of the discordant pairs is no chance, by the one-sided sign test."""
    return binomial_tail(more, more + less, 0.5) < level
