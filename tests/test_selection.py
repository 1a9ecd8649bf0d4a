"""What `fit` ships, from held-out rows: every choice by the other folds' rows, by plain loops and by scipy."""

import math
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy import stats

from ia2mini.fitting.selection import (
    COMMONEST,
    LEAST_GAIN,
    SIGNIFICANCE,
    Candidate,
    HeldOut,
    Selection,
    choose,
)
from ia2mini.metrics import fit_temperature

FOLDS = [[0, 3, 6, 9], [1, 4, 7, 10], [2, 5, 8, 11]]
GOLD = torch.tensor([0, 1] * 6)


def selection(**changes) -> Selection:
    return replace(Selection(FOLDS, GOLD, calibrate=False), **changes)


def some_scores(
    seed: int, settings: int = 3, labels: int = 2, strength: float = 1.0
) -> torch.Tensor:
    """Random log-probabilities [settings, n, labels] that lean to the true label."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(settings, len(GOLD), labels, generator=generator)
    logits += strength * torch.nn.functional.one_hot(GOLD, labels)
    return (2 * logits).log_softmax(-1)


def picks_of(chooser: Selection, held_out: HeldOut) -> dict[int, int]:
    return chooser.picks(chooser.losses(held_out), [0, 1, 2])


def plain_pick(scores: torch.Tensor, rows: list[int]) -> int:
    """The setting with the lowest mean loss over rows."""
    means = []
    for setting in scores:
        means.append(-np.mean([float(setting[row, GOLD[row]]) for row in rows]))
    return int(np.argmin(means))


@pytest.mark.parametrize("seed", range(4))
def test_a_folds_rows_are_judged_by_what_the_others_choose(seed):
    scores = some_scores(seed)
    found = selection().judge(HeldOut("sft", scores), [0, 1, 2])
    picks = picks_of(selection(), HeldOut("sft", scores))
    for fold, rows in enumerate(FOLDS):
        others = [row for row in range(12) if row not in rows]
        setting = plain_pick(scores, others)
        assert picks[fold] == setting
        assert torch.equal(found.scores[rows], scores[setting, rows])
    assert found.setting == plain_pick(scores, list(range(12)))


@pytest.mark.parametrize("seed", range(6))
def test_what_is_shipped_is_judged_by_the_whole_rule_on_the_other_folds(seed):
    """Setting, temperature and method of a fold by a plain call of the same rule on the other folds alone."""
    strengths = {"base": 0.0, "icl": 1.0 + seed, "sft": 2.0, "ia2-sft": 0.5 * seed}
    held_out = {}
    for i, (name, strength) in enumerate(strengths.items()):
        scores = some_scores(i + 10 * seed, strength=strength)
        if name in ("base", "icl"):
            scores = scores[:1]
        held_out[name] = HeldOut(name, scores)
    whole, chosen = selection(calibrate=True).judge_the_choice(held_out)
    for fold, rows in enumerate(FOLDS):
        others = sorted(set(range(12)) - set(rows))
        places = {row: place for place, row in enumerate(others)}
        folds = [[places[row] for row in each] for each in FOLDS if each is not rows]
        alone = Selection(folds, GOLD[others], calibrate=True)
        cut = {}
        for name, one in held_out.items():
            cut[name] = HeldOut(name, one.scores[:, others])
        found = alone.candidates(cut, [0, 1])
        name = choose(found)
        best = found[name]
        assert chosen[fold] == name
        said = held_out[name].scores[best.setting, rows]
        assert torch.allclose(whole.scores[rows], said / best.temperature)


@pytest.mark.parametrize("calibrate", [False, True])
def test_a_held_out_answer_changes_nothing_that_is_said_of_its_row(calibrate):
    held_out = {
        "base": HeldOut("base", some_scores(0, 1)),
        "icl": HeldOut("icl", some_scores(1, 1)),
        "sft": HeldOut("sft", some_scores(2)),
    }
    for fold, rows in enumerate(FOLDS):
        other = GOLD.clone()
        other[rows] = 1 - other[rows]
        kinds = [selection(gold=gold, calibrate=calibrate) for gold in (GOLD, other)]
        (whole, chosen), (again, chosen_again) = (kind.judge_the_choice(held_out) for kind in kinds)
        assert chosen[fold] == chosen_again[fold] and torch.equal(
            whole.scores[rows], again.scores[rows]
        )
        assert torch.equal(whole.right[rows], ~again.right[rows])
        for each in held_out.values():
            first, second = (kind.judge(each, [0, 1, 2]) for kind in kinds)
            assert torch.equal(first.scores[rows], second.scores[rows])
            assert picks_of(kinds[0], each)[fold] == picks_of(kinds[1], each)[fold]


def test_a_temperature_is_kept_only_where_it_helps_rows_that_did_not_fit_it():
    sharp = 30 * some_scores(3, 1, strength=0.5)
    kept, plain = selection(calibrate=True).judge(HeldOut("sft", sharp), [0, 1, 2]), sharp[0]
    for rows in FOLDS:
        others = [row for row in range(12) if row not in rows]
        heat = fit_temperature(plain[others], GOLD[others])
        assert torch.allclose(kept.temperatures[rows], torch.tensor(heat))
        expected = -(plain[rows] / heat).log_softmax(-1)[range(4), GOLD[rows]]
        assert torch.allclose(kept.losses[rows], expected)
    before, after = kept.calibration
    assert after < before and kept.temperature == fit_temperature(plain, GOLD) > 1
    fine = some_scores(4, 1, strength=4.0)
    left = selection(calibrate=True).judge(HeldOut("sft", fine), [0, 1, 2])
    before, after = left.calibration
    assert after >= before and left.temperature == 1 and (left.temperatures == 1).all()


def test_the_commonest_label_has_the_rows_frequencies():
    gold = torch.tensor([0, 1, 1, 1, 0, 2, 1, 0, 1, 1, 1, 1])
    found = selection(gold=gold).commonest(3, [0, 1, 2])
    counts = np.bincount(gold.numpy())
    assert found.losses.mean().item() == pytest.approx(stats.entropy(counts))
    assert found.right.sum() == counts.max()


def candidates(**losses) -> dict[str, Candidate]:
    """Candidates by their rows' losses, all right on every row; names with _ for -."""
    found = {}
    for argument, rows in losses.items():
        name = argument.replace("_", "-")
        right = torch.ones(len(rows), dtype=torch.bool)
        found[name] = Candidate(name, None, torch.tensor(rows), right)
    return found


def test_only_what_knows_more_than_the_commonest_and_is_better_than_the_base_is_shipped():
    base, good = [2.0, 2.1, 1.9, 2.0, 2.2, 1.8], [0.9, 1.0, 1.1, 1.0, 0.8, 1.2]
    assert choose(candidates(base=base, commonest=base, icl=base, sft=good)) == "sft"
    assert choose(candidates(base=base, commonest=good, icl=base, sft=good)) == "base"
    assert choose(candidates(base=good, commonest=base, icl=base, sft=good)) == "base"
    barely = [loss - LEAST_GAIN / 2 for loss in good]
    assert choose(candidates(base=good, commonest=base, icl=base, sft=barely)) == "base", (
        "no difference that matters"
    )
    little = [loss - 2 * LEAST_GAIN for loss in good]
    assert choose(candidates(base=good, commonest=base, icl=base, sft=little)) == "sft"
    assert (
        choose(candidates(base=base[:4], commonest=base[:4], icl=base[:4], sft=good[:4])) == "base"
    ), "four rows"


@pytest.mark.parametrize("shift", [0.2, 0.5, 0.8, 1.1, 1.4])
def test_surely_is_students_one_sided_test(shift):
    rng = np.random.default_rng(0)
    commonest = rng.normal(2, 1, 9)
    sft = commonest - shift - rng.normal(0, 1.2, 9)
    sure = stats.ttest_rel(commonest - LEAST_GAIN, sft, alternative="greater").pvalue < SIGNIFICANCE
    base = (commonest + 9).tolist()
    found = candidates(base=base, commonest=commonest.tolist(), sft=sft.tolist())
    assert choose(found) == ("sft" if sure else "base")


@pytest.mark.parametrize("gained, lost", [(3, 0), (4, 0), (5, 0), (7, 1), (8, 1), (9, 3), (9, 5)])
def test_of_labels_rows_that_only_one_has_right_can_make_it_sure(gained, lost):
    """As a sign test of scipy says; of texts, and where the loss is no lower, only the losses count."""
    n = gained + lost + 6
    other = [1.0] * n
    # one row is wrong and sure of it; the mean is still lower by .1
    wild = [0.5 + 0.4 * n] + [0.5] * (n - 1)
    assert np.mean(wild) < 0.98 and stats.ttest_rel(other, wild, alternative="greater").pvalue > 0.1
    found = candidates(base=[9.0] * n, commonest=other, sft=wild)
    found["sft"].right = torch.tensor([True] * gained + [False] * lost + [True] * 6)
    found[COMMONEST].right = torch.tensor([False] * gained + [True] * lost + [True] * 6)
    found["base"].right = torch.zeros(n, dtype=torch.bool)
    sure = stats.binomtest(gained, gained + lost, 0.5, "greater").pvalue < SIGNIFICANCE
    assert choose(found) == ("sft" if sure else "base")
    found["sft"].losses = found["sft"].losses + 1
    assert choose(found) == "base"
    found["sft"].losses = torch.tensor(wild)
    found["base"] = replace(found[COMMONEST])
    del found[COMMONEST]
    assert choose(found) == "base"


def test_what_is_right_on_fewer_rows_is_not_shipped():
    base, good = [2.0] * 6, [1.0] * 6
    found = candidates(base=base, commonest=base, sft=good)
    for name in ("base", COMMONEST):
        found["sft"].right = torch.tensor([True] * 5 + [False])
        assert choose(found) == "base", name
        found["base"].right, found[COMMONEST].right = torch.zeros(2, 6, dtype=torch.bool)
        assert choose(found) == "sft"
        found[name].right = torch.ones(6, dtype=torch.bool)


def test_texts_must_be_right_on_more_rows_than_the_base():
    found = candidates(base=[2.0] * 6, sft=[1.0] * 6)
    assert choose(found) == "base", "right on as many"
    found["base"].right = torch.tensor([True] * 5 + [False])
    assert choose(found) == "sft"


def test_among_what_may_be_shipped():
    base, good, better = [2.0] * 6, [1.0, 1.1] * 3, [0.5, 0.6] * 3
    assert (
        choose(candidates(base=base, commonest=base, icl=good, sft=good, ia2_sft=better))
        == "ia2-sft"
    )
    assert choose(candidates(base=base, commonest=base, icl=better, sft=good)) == "icl", (
        "surely better than any adapter"
    )
    close = [0.5, 1.5] * 3
    assert choose(candidates(base=base, commonest=base, icl=close, sft=good)) == "sft", (
        "which costs fewer tokens"
    )
    assert choose(candidates(base=base, commonest=base, icl=good, sft=base)) == "icl"
    assert choose(candidates(base=base, commonest=base, icl=base, sft=base)) == "base"
    beside = candidates(base=base, commonest=base, probe=better, sft=good)
    assert choose(beside) == "probe", "surely better than any adapter"
    assert choose(candidates(base=base, commonest=base, probe=close, sft=good)) == "sft"
    assert choose(candidates(base=base, commonest=base, probe=good, icl=better)) == "icl"
    assert choose(candidates(base=base, commonest=base, probe=good, sft=base)) == "probe"
    assert choose(candidates(base=base, commonest=base, icl_sft=close, sft=good)) == "sft"
    near_base = [1.5, 2.4] * 3
    for second in ("icl", "probe", "icl_sft"):
        found = candidates(base=base, commonest=[3.0] * 6, **{second: near_base})
        assert choose(found) == "base", "better than the base, but it may be chance"
    found = candidates(base=base, commonest=[3.0] * 6, sft=near_base)
    assert choose(found) == "sft", "of an adapter that is enough"
    assert choose(candidates(base=base, commonest=base, icl_sft=better, sft=good)) == "icl-sft"


def test_of_adapters_that_few_rows_cannot_rank_the_preferred_one_is_taken():
    base, good, close = [2.0] * 6, [1.0, 1.1] * 3, [0.5, 1.5] * 3
    for first, second in pairwise(("hidden_sft", "ia2_sft", "sft")):
        found = candidates(base=base, commonest=base, **{second: close, first: good})
        assert choose(found) == first.replace("_", "-"), "though the other has a lower loss"
        better = candidates(base=base, commonest=base, **{second: [0.5, 0.6] * 3, first: good})
        assert choose(better) == second.replace("_", "-"), "significantly better"
    found = candidates(base=base, commonest=base, sft=good, ridge_sft=close)
    assert choose(found) == "ridge-sft", "of others the one with the lower loss"


def test_a_setting_that_failed_in_a_fold_is_never_chosen():
    scores = some_scores(5, settings=2, strength=3.0)
    assert selection().judge(HeldOut("sft", scores), [0, 1, 2]).setting == 0
    scores[0, FOLDS[1]] = -math.inf
    found = selection().judge(HeldOut("sft", scores), [0, 1, 2])
    picks = picks_of(selection(), HeldOut("sft", scores))
    assert set(picks.values()) == {1} and found.setting == 1
