"""Intervals and tests for few rows, against scipy."""

import math

import numpy as np
import pytest
from scipy import stats

from ia2mini.engine.intervals import (
    mean_interval,
    paired_test,
    share_interval,
    sign_test,
    student_p,
    student_quantile,
    surely_positive,
)


@pytest.mark.parametrize("n", [5, 6, 24, 100, 999])
def test_a_shares_interval_is_clopper_and_pearsons(n):
    for successes in {0, 1, n // 3, n // 2, n - 1, n}:
        theirs = stats.binomtest(successes, n).proportion_ci(0.95, "exact")
        share, low, high = share_interval(successes, n)
        assert share == successes / n
        assert (low, high) == pytest.approx((theirs.low, theirs.high), abs=1e-9)


@pytest.mark.parametrize("freedom", [1, 2, 3, 4, 5, 8, 9, 30, 101, 9999])
def test_quantiles_are_those_of_students_t(freedom):
    for share in (0.5, 0.9, 0.95, 0.975, 0.999):
        assert student_quantile(share, freedom) == pytest.approx(
            stats.t.ppf(share, freedom), rel=1e-7, abs=1e-9
        )


@pytest.mark.parametrize("freedom", [4, 5, 19, 104, 2000])
def test_p_values_are_those_of_students_t(freedom):
    for t in (0.0, 0.1, 1.0, 2.3, 8.0, 40.0):
        assert student_p(-t, freedom) == student_p(t, freedom) >= 0
        assert student_p(t, freedom) == pytest.approx(
            2 * stats.t.sf(t, freedom), rel=1e-9, abs=1e-14
        )
    assert student_quantile(0.975, freedom) == pytest.approx(stats.t.ppf(0.975, freedom), rel=1e-10)


def test_a_means_interval_is_students_t():
    values = np.random.default_rng(0).normal(1, 2, 17)
    mean, low, high = mean_interval(values.tolist())
    theirs = stats.t.interval(0.95, 16, values.mean(), stats.sem(values))
    assert (mean, low, high) == pytest.approx((values.mean(), *theirs))


def test_surely_is_a_one_sided_paired_t_test():
    rng, seen = np.random.default_rng(1), set()
    for n in (5, 8, 24):
        for shift in (0.0, 0.3, 0.6, 1.0):
            values = rng.normal(shift, 1, n)
            sure = stats.ttest_1samp(values, 0, alternative="greater").pvalue < 0.05
            assert surely_positive(values) == sure
            seen.add(bool(sure))
    assert seen == {True, False}
    assert surely_positive([0.5] * 5) and not surely_positive([0.0] * 5)


def test_below_five_rows_nothing_has_an_interval_or_is_sure():
    for n in range(1, 5):
        assert all(
            math.isnan(end) for end in (*share_interval(n, n)[1:], *mean_interval([1.0] * n)[1:])
        )
        assert not surely_positive([9.0] * n)


@pytest.mark.parametrize("more", range(0, 12))
def test_the_sign_test_is_scipys(more):
    for less in range(12):
        theirs = stats.binomtest(more, more + less).pvalue if more + less else 1.0
        assert sign_test(more, less) == pytest.approx(theirs)
    assert sign_test(4, 0) == 0.125


def test_of_nothing_there_is_no_p_and_no_interval():
    """Where a run has failed its pair has no number; where all rows are equal they have no spread."""
    for broken in (math.nan, math.inf, None):
        test = paired_test([0.9, 0.8, broken, 0.9, 0.7, 0.6], [0.1, 0.2, 0.3, 0.2, 0.1, 0.1])
        told = (test.mean, test.low, test.high, test.t, test.p, test.d)
        assert all(map(math.isnan, told)) and test.pairs == 6
    assert math.isnan(paired_test([math.inf] * 6, [math.inf] * 6).p)
    mean, low, high = mean_interval([0.25] * 9)
    assert mean == 0.25 and math.isnan(low) and math.isnan(high)
