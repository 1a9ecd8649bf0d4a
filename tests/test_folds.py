"""Folds of one's own rows: equal shares, nothing of a held-out prompt in training, odd rows."""

from collections import Counter

import numpy as np
import pytest
from sklearn.model_selection import StratifiedKFold

from ia2mini.episode import seeded
from ia2mini.fitting.crossval import (
    DEMONSTRATION_PARTS,
    alternate_labels,
    balanced,
    demonstrations_among,
    draw_folds,
)
from ia2mini.tasks import Example


def rows_of(*labels: int | None) -> list[Example]:
    return [Example(f"text {i}", str(label), label) for i, label in enumerate(labels)]


def choose(rows, rng):
    return balanced(rows, 8, rng)


def check(rows: list[Example], folds) -> None:
    """Every row is held out once, and no prompt of a fold's held-out rows is anywhere in its training."""
    assert sorted(i for fold in folds for i in fold.test) == list(range(len(rows)))
    assert len({len(fold.train) for fold in folds}) == 1
    for fold in folds:
        held = {rows[i].prompt for i in fold.test}
        seen = [*fold.train, *sum(fold.demonstrations, []), *sum(fold.icl, [])]
        assert fold.train and not fold.dev and not held & {row.prompt for row in seen}
        for row, shown in zip(fold.train, fold.demonstrations, strict=True):
            assert row.prompt not in {other.prompt for other in shown}
            assert shown or len({row.prompt for row in fold.train}) == 1
        prompts = len({row.prompt for row in fold.train})
        assert len(set(map(tuple, fold.demonstrations))) <= min(DEMONSTRATION_PARTS, prompts)


@pytest.mark.parametrize("sizes", [(20, 20), (7, 9, 13), (30, 5), (11, 11, 11, 11), (23, 4, 1)])
@pytest.mark.parametrize("folds", [3, 5])
def test_shares_are_those_of_scikit_learn(sizes, folds):
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(len(sizes)), sizes)).tolist()
    rows = rows_of(*labels)
    found = draw_folds(rows, folds, choose)
    check(rows, found)
    ours = [Counter(labels[i] for i in fold.test) for fold in found]
    with pytest.warns(UserWarning) if min(sizes) < folds else np.errstate():
        split = StratifiedKFold(folds, shuffle=True, random_state=0).split(labels, labels)
        theirs = [Counter(labels[i] for i in test) for _, test in split]
    for label, size in enumerate(sizes):
        for counts in (ours, theirs):
            assert {c[label] for c in counts} <= {size // folds, -(-size // folds)}
    assert max(map(Counter.total, ours)) - min(map(Counter.total, ours)) <= 1


def test_up_to_ten_rows_each_is_held_out_alone():
    rows = rows_of(0, 1, 0, 1, 0, 1, 0)
    folds = draw_folds(rows, len(rows), choose)
    check(rows, folds)
    assert sorted(fold.test for fold in folds) == [[i] for i in range(7)]


def test_rows_of_one_prompt_stay_together():
    rows = rows_of(*[0, 1] * 10)
    twice = [Example(row.prompt, str(1 - row.label), 1 - row.label) for row in rows[:6]]
    rows += twice + [Example("the same", str(i % 2), i % 2) for i in range(9)]
    check(rows, draw_folds(rows, 5, choose))


def test_a_labels_only_row_trains_wherever_it_is_not_held_out():
    for seed in range(5):
        rows = rows_of(*[0] * 8, *[1] * 7, 2)
        folds = draw_folds(rows, 5, choose, seed)
        check(rows, folds)
        for fold in folds:
            assert 15 in fold.test or 2 in {row.label for row in fold.train}


def test_rows_of_a_group_see_the_same_rows_of_the_other_groups():
    rows = rows_of(*[0] * 10, *[1] * 10)
    shown = demonstrations_among(rows, lambda some, rng: some, seeded(0, 0, "test"))
    groups = {}
    for row, others in zip(rows, shown):
        groups.setdefault(tuple(others), []).append(row)
    assert sorted(map(len, groups.values())) == [5] * DEMONSTRATION_PARTS
    for others, inside in groups.items():
        assert sorted([*others, *inside], key=str) == sorted(rows, key=str)


def test_text_rows_and_few_prompts():
    for n in (4, 5, 11):
        rows = [Example(f"q {i}", f"a {i}") for i in range(n)]
        check(rows, draw_folds(rows, min(n, 5), choose))
    rows = rows_of(0, 1, 0, 1) + [Example("text 0", str(i), i) for i in range(2, 30)]
    check(rows, draw_folds(rows, 4, choose))


def test_the_seed_decides():
    rows = rows_of(*[0, 1] * 12)
    draws = [draw_folds(rows, 5, choose, seed) for seed in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2]


class CountedRows(list):
    """A list that counts how often one of its rows is looked at."""

    looks = 0

    def __getitem__(self, place):
        self.looks += 1
        return super().__getitem__(place)


def test_ten_thousand_rows_are_looked_at_a_few_times_each():
    labels = np.random.default_rng(0).integers(4, size=10_000).tolist()
    rows = CountedRows(rows_of(*labels))
    folds = draw_folds(rows, 5, lambda rows, rng: [])
    assert all(len(fold.train) == 8000 for fold in folds)
    assert rows.looks < 20 * len(rows)


@pytest.mark.parametrize("labels", [[0] * 30 + [1] * 3 + [2], [0, 1] * 20, [None] * 9])
def test_balanced_takes_labels_as_equally_often_as_there_are_rows(labels):
    rows = rows_of(*labels)
    for count in (1, 4, 8, 100):
        shown = balanced(rows, count, seeded(0, count, "test"))
        assert len(shown) == min(count, len(rows)) == len({row.prompt for row in shown})
        counts = Counter(row.label for row in shown)
        there = Counter(row.label for row in rows)
        most = max(counts.values())
        assert all(counts[label] >= min(there[label], most - 1) for label in there)


def test_in_turn_takes_one_of_each_label():
    rows = rows_of(0, 0, 0, 1, 2, 1)
    assert [row.label for row in alternate_labels(rows)] == [0, 1, 2, 0, 1, 0]
    assert [row.prompt for row in alternate_labels(rows)][:4] == [
        "text 0",
        "text 3",
        "text 4",
        "text 1",
    ]
