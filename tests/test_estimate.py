"""A long `fit` says how long before it begins to train."""

import pytest

from ia2mini import FitOptions, open_subject
from ia2mini.fitting import crossval
from ia2mini.fitting.crossval import duration
from ia2mini.fitting.fit import cross_validation
from ia2mini.tasks import world

OPTIONS = FitOptions(rates=(1e-3, 1e-2), methods=("sft", "ia2-sft"), folds=4, epochs=20, patience=3)


def test_the_estimate_counts_rows_folds_rates_epochs_and_phases(monkeypatch):
    labels = []

    def bar(label, total):
        from tqdm import tqdm

        labels.append(label)
        return tqdm(disable=True)

    cv, _ = cross_validation(
        world.rows("toy-mood", "train")[:12], open_subject("tiny", "cpu"), OPTIONS, bar=bar
    )
    assert cv.estimate() == "", "nothing is known yet"
    cv.seconds = 10.0  # of one pass over all rows
    # three folds there and back and a look; two rates; SFT, IA2 and SFT after it
    epoch = 10.0 * (3 * 3 + 1) * 2 * 3
    expected = f"about {duration(4 * epoch)} to {duration(20 * epoch)}"
    monkeypatch.setattr(crossval, "METHODS", {"sft": lambda grid: None, "ia2": lambda grid: None})
    cv.train_phase(cv.whole_grid, "sft", None)
    cv.train_phase(cv.fold_grid, "ia2", None)
    assert labels == ["collecting", f"training sft (all training: {expected})", "training ia2"], (
        "said once"
    )


def test_short_work_has_none():
    cv, _ = cross_validation(
        world.rows("toy-mood", "train")[:12], open_subject("tiny", "cpu"), OPTIONS
    )
    cv.seconds = 0.01
    assert cv.estimate() == ""


@pytest.mark.parametrize("seconds, text", [(40, "40 s"), (720, "12 min"), (12600, "3.5 h")])
def test_durations_are_short(seconds, text):
    assert duration(seconds) == text
