"""Metrics against hand-worked numbers, naive loops, numpy and scipy."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from ia2mini import metrics
from ia2mini.engine import intervals
from ia2mini.study.overlap import subspace_overlap

ROWS = st.lists(st.tuples(st.floats(0, 1), st.booleans()), min_size=1, max_size=40)


def naive_ece(confidence, correct, edges):
    """Guo et al. 2017 as written: a loop over the bins (low, high], with 0 in the first."""
    total = 0.0
    for low, high in zip(edges[:-1], edges[1:], strict=True):
        rows = [i for i, c in enumerate(confidence) if low < c <= high or (c == 0 == low)]
        if rows:
            gap = sum(correct[i] for i in rows) / len(rows) - sum(
                confidence[i] for i in rows
            ) / len(rows)
            total += len(rows) / len(confidence) * abs(gap)
    return total


def test_ece_by_hand():
    confidence, correct = [0.1, 0.4, 0.55, 0.6, 0.9, 0.95], [0, 1, 1, 0, 1, 1]
    # two bins: (0, .5] mean .25, accuracy .5, gap .25, 2 rows; (.5, 1] mean .75, accuracy .75, gap 0, 4 rows
    assert metrics.ece(confidence, correct, bins=2) == pytest.approx(2 / 6 * 0.25)
    # equal mass, three bins of two: gaps |.25-.5|, |.575-.5|, |.925-1|
    assert metrics.ece(confidence, correct, bins=3, scheme="mass") == pytest.approx(
        (0.25 + 0.075 + 0.075) / 3
    )


def test_ece_bins_are_closed_on_the_right():
    curve = metrics.reliability([0.0, 0.5, 0.50001, 1.0], [0, 1, 0, 1], bins=2)
    assert curve == pytest.approx(np.array([[2, 0.5, 1], [2, 1.50001, 1]]))


@settings(max_examples=200, deadline=None)
@given(ROWS, st.integers(1, 20))
def test_ece_width_equals_a_naive_loop(rows, bins):
    confidence, correct = zip(*rows, strict=True)
    assert metrics.ece(confidence, correct, bins) == pytest.approx(
        naive_ece(confidence, correct, np.linspace(0, 1, bins + 1)), abs=1e-12
    )


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.tuples(st.floats(0, 1), st.booleans()), min_size=1, max_size=40, unique_by=lambda r: r[0]
    ),
    st.integers(1, 20),
)
def test_ece_mass_equals_a_naive_loop(rows, bins):
    ordered, q, total = sorted(rows), len(rows), 0.0
    for i in range(bins):
        size = q // bins + (i < q % bins)
        part, ordered = ordered[:size], ordered[size:]
        total += abs(sum(c - r for c, r in part)) / q
    confidence, correct = zip(*rows, strict=True)
    assert metrics.ece(confidence, correct, bins, "mass") == pytest.approx(total, abs=1e-12)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from([0.0, 0.2, 0.5, 1.0]), st.booleans()), min_size=1, max_size=30
    ),
    st.randoms(),
)
def test_scores_ignore_the_order_of_rows(rows, random):
    shuffled = random.sample(rows, len(rows))
    for scheme in ("width", "mass"):
        one, two = (
            metrics.ece(*zip(*r, strict=True), bins=4, scheme=scheme) for r in (rows, shuffled)
        )
        assert one == pytest.approx(two, abs=1e-12)
        assert 0 <= one <= 1


@pytest.mark.parametrize("scheme", ["width", "mass"])
def test_ece_edges(scheme):
    assert metrics.ece([1.0] * 7, [1] * 7, scheme=scheme) == 0
    assert metrics.ece([1.0] * 7, [0] * 7, scheme=scheme) == 1
    assert metrics.ece([0.2, 0.9], [1, 0], bins=1, scheme=scheme) == pytest.approx(0.05)
    assert math.isnan(metrics.ece([], [], scheme=scheme))
    assert math.isnan(metrics.ece([0.5, float("nan")], [1, 1], scheme=scheme))
    with pytest.raises(AssertionError, match="outside"):
        metrics.ece([1.5], [1], scheme=scheme)


def test_reliability_counts_and_empty_bins():
    curve = metrics.reliability(
        torch.tensor([0.9, 0.95], dtype=torch.bfloat16), torch.tensor([True, False]), bins=10
    )
    assert curve[:8].tolist() == [[0, 0, 0]] * 8
    assert curve[8:, [0, 2]].tolist() == [[1, 1], [1, 0]] and curve[8:, 1] == pytest.approx(
        [0.9, 0.95], abs=4e-3
    )
    with pytest.raises(ValueError, match="width, mass or scripts"):
        metrics.reliability([0.5], [1], scheme="height")


def test_accuracy_nll_brier():
    assert metrics.accuracy([True, False, True, True]) == 0.75
    assert metrics.accuracy(torch.tensor([1, 0])) == 0.5
    assert metrics.nll([-0.5, -300.0]) == pytest.approx(150.25), (
        "not cut off where a float32 probability is zero"
    )
    probs = torch.tensor([[0.7, 0.2, 0.1], [0.0, 0.0, 1.0]])
    assert metrics.brier(probs, torch.tensor([0, 1])) == pytest.approx(
        (0.09 + 0.04 + 0.01 + 1 + 1) / 2, abs=1e-6
    )
    assert all(
        math.isnan(x)
        for x in (metrics.accuracy([]), metrics.nll([]), metrics.brier(np.zeros((0, 2)), []))
    )


def test_asim_equals_a_naive_loop():
    a, b = torch.randn(2, 3, 5, 7, dtype=torch.bfloat16), torch.randn(2, 3, 5, 7)
    a[1, 2, 4] = 0
    got = metrics.asim(a, b)
    assert got.shape == (2, 3, 5) and got.dtype == torch.float32
    for index in np.ndindex(2, 3, 5):
        x, y = a[index].double().numpy(), b[index].double().numpy()
        size = np.linalg.norm(x) * np.linalg.norm(y)
        assert got[index].item() == pytest.approx(x @ y / size if size else 0.0, abs=1e-6)
    assert metrics.asim(b, 1000 * b).max() <= 1 and metrics.asim(
        b, -b
    ).sum().item() == pytest.approx(-30, abs=1e-4)


def test_subspace_overlap_equals_numpy_projections():
    b1, b2 = torch.randn(4, 20, 3), torch.randn(4, 20, 3)
    got = subspace_overlap(b1, b2, 3)
    for i in range(4):
        q1, q2 = np.linalg.qr(b1[i].double().numpy())[0], np.linalg.qr(b2[i].double().numpy())[0]
        assert got[i].item() == pytest.approx(np.trace(q1 @ q1.T @ q2 @ q2.T) / 3, abs=1e-10)
    assert subspace_overlap(b1, b1 @ torch.randn(4, 3, 3), 3) == pytest.approx(np.ones(4), abs=1e-4)
    first, second = torch.eye(20)[:, :3], torch.eye(20)[:, 2:5]
    assert subspace_overlap(first, second, 3).item() == pytest.approx(1 / 3)
    assert subspace_overlap(torch.zeros(20, 3), first, 3).item() == 0
    assert subspace_overlap(first.bfloat16(), first, 3).item() == pytest.approx(1)


def test_subspace_overlap_of_products_equals_that_of_b():
    b1, b2, a1, a2 = torch.randn(12, 3), torch.randn(12, 3), torch.randn(3, 9), torch.randn(3, 9)
    of_products = subspace_overlap(b1 @ a1, b2 @ a2, 3)
    assert of_products.item() == pytest.approx(subspace_overlap(b1, b2, 3).item(), abs=1e-5)
    u1, u2 = (np.linalg.svd((b @ a).double().numpy())[0][:, :2] for b, a in ((b1, a1), (b2, a2)))
    assert subspace_overlap(b1 @ a1, b2 @ a2, 2).item() == pytest.approx(
        np.sum((u1.T @ u2) ** 2) / 2, abs=1e-5
    )


@pytest.mark.parametrize("pairs", [5, 6, 20, 105, 600])
def test_paired_test_equals_scipy(pairs):
    rng = np.random.default_rng(3)
    a = rng.normal(0.8, 0.1, pairs)
    b = a - rng.normal(0.05, 0.1, pairs)
    got, want = intervals.paired_test(a, b), stats.ttest_rel(a, b)
    assert (got.t, got.p, got.mean) == pytest.approx(
        (want.statistic, want.pvalue, (a - b).mean()), rel=1e-9
    )
    interval = want.confidence_interval(0.95)
    assert (got.low, got.high) == pytest.approx((interval.low, interval.high), rel=1e-9)
    assert got.d == pytest.approx(want.statistic / math.sqrt(pairs)) and got.pairs == pairs


def test_interval_and_p_value_of_a_paired_test_agree():
    rng = np.random.default_rng(0)
    for _ in range(300):
        pairs = int(rng.integers(5, 12))
        got = intervals.paired_test(rng.normal(0.8, 1, pairs), rng.normal(0, 1, pairs))
        assert (got.low > 0 or got.high < 0) == (got.p < 0.05)


@pytest.mark.parametrize("pairs", [0, 1, 2, 3, 4])
def test_of_few_pairs_only_the_mean_is_known(pairs):
    got = intervals.paired_test(np.arange(pairs) ** 2, torch.zeros(pairs))
    assert got.pairs == pairs and (
        math.isnan(got.mean) if pairs == 0 else got.mean == np.mean(np.arange(pairs) ** 2)
    )
    assert all(math.isnan(x) for x in (got.low, got.high, got.t, got.p, got.d))
    with pytest.raises(AssertionError):
        intervals.paired_test([1, 2], [1])


@pytest.mark.parametrize("gain", [0.0, 0.25, 0.1])
def test_of_equal_differences_only_the_mean_is_known(gain):
    a = np.linspace(0, 1, 7)
    got = intervals.paired_test(a + gain, a)
    assert got.mean == pytest.approx(gain) and got.pairs == 7
    assert all(math.isnan(x) for x in (got.low, got.high, got.t, got.p, got.d))


@pytest.mark.parametrize("rows", [3, 14, 15, 16, 44, 500])
def test_bins_of_the_released_scripts_against_a_plain_loop(rows):
    """Sorted, ties in their order; rows // 15 in each bin, what is left in the last."""
    rng = np.random.default_rng(rows)
    confidence = np.round(rng.random(rows), 1)  # many alike
    right = rng.random(rows) < 0.5
    order = sorted(range(rows), key=lambda i: confidence[i])
    size, total = rows // 15, 0.0
    for i in range(15):
        mine = order[i * size : (i + 1) * size] if i < 14 else order[14 * size :]
        total += abs(sum(right[j] for j in mine) - sum(confidence[j] for j in mine))
    assert metrics.ece(confidence, right, scheme="scripts") == pytest.approx(total / rows)
    null = metrics.ece_null(confidence, scheme="scripts", draws=60, seed=2)
    assert null == pytest.approx(naive_null(np.sort(confidence), 15, "scripts", 60, 2))


def naive_null(confidence, bins, scheme, draws, seed):
    """`ece_null` as it is said: who is right is drawn anew for all rows, `draws` times; the mean of their ECEs."""
    rng = np.random.default_rng(seed)
    right = [rng.random(len(confidence)) < confidence for _ in range(draws)]
    return sum(metrics.ece(confidence, drawn, bins, scheme) for drawn in right) / draws


@pytest.mark.parametrize("scheme", ["width", "mass"])
@pytest.mark.parametrize("bins", [1, 4, 15, 40])
def test_ece_null_equals_a_naive_loop(scheme, bins):
    rng = np.random.default_rng(bins)
    for size in (1, 7, 60):
        # sorted, no two alike: the same draws fall on the same rows
        confidence = np.sort(rng.beta(4, 1, size))
        want = naive_null(confidence, bins, scheme, 50, 3)
        assert metrics.ece_null(confidence, bins, scheme, draws=50, seed=3) == pytest.approx(
            want, abs=1e-12
        )
        shuffled = torch.tensor(rng.permutation(confidence))
        assert metrics.ece_null(shuffled, bins, scheme, draws=50, seed=3) == pytest.approx(
            want, abs=1e-12
        )


def test_ece_null_with_ties_and_at_the_ends_of_bins():
    """Confidences on the bins' edges, 0 and 1, and many alike, which share their mean correctness."""
    confidence = np.array([0.0, 0.2, 0.2, 0.4, 0.4, 0.4, 0.6, 0.8, 1.0, 1.0, 1.0])
    for scheme in ("width", "mass"):
        got = metrics.ece_null(confidence, 5, scheme, draws=50)
        assert got == pytest.approx(naive_null(confidence, 5, scheme, 50, 0), abs=1e-12)


@pytest.mark.parametrize("rows, size", [(40, 0.09), (100, 0.06), (500, 0.03)])
def test_ece_null_has_its_known_sizes(rows, size):
    rng = np.random.default_rng(0)
    # right nine times in ten; less and less often in doubt
    for sure, unsure in ((9, 1), (4.5, 0.5), (1.8, 0.2)):
        drawn = [metrics.ece_null(rng.beta(sure, unsure, rows), draws=200) for _ in range(10)]
        assert sum(drawn) / 10 == pytest.approx(size, rel=0.2)


def test_ece_null_edges():
    # certain, and always what it says
    assert metrics.ece_null([1.0] * 9) == metrics.ece_null([0.0] * 9) == 0
    assert metrics.ece_null([0.5]) == 0.5
    assert math.isnan(metrics.ece_null([]))
    assert math.isnan(metrics.ece_null([0.5, float("nan")]))
    assert metrics.ece_null([0.3, 0.9], draws=20) == metrics.ece_null([0.9, 0.3], draws=20)
    assert metrics.ece_null(torch.tensor([1.0 + 1e-7] * 3)) == 0  # a rounded softmax


def test_measure_is_every_metric_of_one_run():
    # the rest goes to tokens that are no label
    probabilities = torch.tensor([[0.6, 0.1], [0.2, 0.3], [0.05, 0.45]])
    gold, confidence = torch.tensor([0, 0, 1]), [0.6, 0.5, 0.45]
    got = metrics.measure(confidence, [1, 0, 1], probabilities.log(), gold)
    assert got["acc"] == pytest.approx(2 / 3) and got["acc_labels"] == pytest.approx(2 / 3)
    assert got["nll"] == pytest.approx(-(math.log(0.6) + math.log(0.2) + math.log(0.45)) / 3)
    squared = (0.4**2 + 0.1**2) + (0.8**2 + 0.3**2) + (0.05**2 + 0.55**2)
    assert got["brier"] == pytest.approx(squared / 3)
    assert got["ece"] == metrics.ece(confidence, [1, 0, 1]) and got["ece_null"] == metrics.ece_null(
        confidence
    )
    assert got["ece_mass"] == metrics.ece(confidence, [1, 0, 1], scheme="mass")
    assert got["ece_labels"] == pytest.approx(metrics.ece([6 / 7, 0.6, 0.9], [1, 0, 1]))
    assert np.array(got["reliability"]).sum(0) == pytest.approx([3, 1.55, 2])
    mass = metrics.measure(confidence, [1, 0, 1], probabilities.log(), gold, "mass")
    assert mass["ece"] == mass["ece_mass"] == got["ece_mass"]
    assert mass["ece_null"] == metrics.ece_null(confidence, scheme="mass")


@pytest.mark.parametrize("rows, bend", [(500, 1.0), (500, 2.5), (60, 0.4), (7, 1.0)])
def test_smooth_ece_is_that_of_its_authors(rows, bend):
    from relplot import smECE
    from relplot.metrics import smECE_sigma

    rng = np.random.default_rng(rows)
    confidence = rng.beta(4, 1.5, rows)
    right = (rng.random(rows) < confidence**bend).astype(float)
    for sigma in (0.02, 0.1, 0.5):
        assert metrics.smooth_ece(confidence, right, sigma) == pytest.approx(
            smECE_sigma(confidence, right, sigma), abs=4e-3
        )
    assert metrics.smooth_ece(confidence, right) == pytest.approx(
        smECE(confidence, right), abs=2e-3
    )


def test_the_left_out_temperature_never_saw_its_row():
    rng = np.random.default_rng(6)
    scores, gold = (
        torch.tensor(4 * rng.standard_normal((7, 3))),
        torch.tensor([0, 1, 2, 0, 1, 2, 0]),
    )
    losses = []
    for i in range(7):
        others = [j for j in range(7) if j != i]
        heat = metrics.fit_temperature(scores[others], gold[others])
        losses.append(-(scores[i] / heat).log_softmax(-1)[gold[i]].item())
    assert metrics.left_out_nll(scores, gold) == pytest.approx(np.mean(losses))
    assert math.isnan(metrics.left_out_nll(scores[:1], gold[:1]))


def test_smooth_ece_by_hand():
    assert metrics.smooth_ece([0.5] * 10, [1] * 5 + [0] * 5) < 0.002  # calibrated
    assert metrics.smooth_ece([1.0] * 10, [0] * 10) == pytest.approx(1, abs=0.01)
    assert metrics.smooth_ece([0.7] * 10, [1] * 10, bandwidth=0.2) == pytest.approx(0.3, abs=1e-3)
    assert math.isnan(metrics.smooth_ece([], [])) and math.isnan(
        metrics.smooth_ece([float("nan")], [1])
    )


@given(ROWS)
def test_area_under_the_risk_coverage_curve_is_the_mean_over_every_order_of_ties(rows):
    rows = [(round(c, 1), right) for c, right in rows]
    rng, areas = np.random.default_rng(0), []
    for _ in range(400):
        order = sorted(rng.permutation(len(rows)), key=lambda i: -rows[i][0])
        wrong = [1 - rows[i][1] for i in order]
        areas.append(np.mean([sum(wrong[: k + 1]) / (k + 1) for k in range(len(wrong))]))
    assert metrics.risk_coverage(*zip(*rows)) == pytest.approx(np.mean(areas), abs=0.05)


def test_area_under_the_risk_coverage_curve_by_hand():
    assert metrics.risk_coverage([0.9, 0.8, 0.3], [1, 1, 0]) == pytest.approx((0 + 0 + 1 / 3) / 3)
    assert metrics.risk_coverage([0.9, 0.8, 0.3], [0, 1, 1]) == pytest.approx(
        (1 + 1 / 2 + 1 / 3) / 3
    )
    # no order, so none to be praised for
    assert metrics.risk_coverage([0.5, 0.5], [0, 1]) == pytest.approx(0.5)
    assert math.isnan(metrics.risk_coverage([], [])) and math.isnan(
        metrics.risk_coverage([float("nan"), 0.5], [1, 0])
    )


def test_the_oracle_temperature_is_the_best_there_is():
    scores = torch.randn(300, 3, generator=torch.Generator().manual_seed(0)) * 3
    gold = (scores / 6).softmax(-1).multinomial(1, generator=torch.Generator().manual_seed(1))[:, 0]
    heat = metrics.fit_temperature(scores, gold, oracle=True)

    def loss(log_heat):
        return metrics.row_losses(scores.double(), gold, math.exp(log_heat)).mean().item()

    from scipy.optimize import minimize_scalar

    assert loss(math.log(heat)) == pytest.approx(minimize_scalar(loss, (-1, 2)).fun, abs=1e-3)
    found = metrics.measure(
        scores.softmax(-1).max(-1).values,
        scores.argmax(-1) == gold,
        scores.log_softmax(-1),
        gold,
        temperature=2.0,
    )
    assert found["nll_oracle"] == pytest.approx(loss(math.log(heat))) and found[
        "nll_dev"
    ] == pytest.approx(loss(math.log(2)), rel=1e-5)
    # here nothing but labels could be said
    assert found["nll_labels"] == pytest.approx(found["nll"], rel=1e-5)
