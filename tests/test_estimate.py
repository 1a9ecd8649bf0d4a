"""A `fit` says how long it will train before it begins, from one timed step."""

from itertools import chain, repeat

import pytest
from tqdm import tqdm

from ia2mini import FitOptions, open_subject
from ia2mini.fitting import training
from ia2mini.fitting.fit import prepare_fit
from ia2mini.fitting.training import duration, train_folds
from ia2mini.tasks import world

OPTIONS = FitOptions(rates=(1e-3, 1e-2), methods=("sft", "ia2-sft"), folds=4, epochs=5)


def test_the_estimate_counts_steps_of_every_phase(monkeypatch):
    subject = open_subject("tiny", "cpu")
    rows = world.rows("toy-mood", "train")[:12]
    cv = prepare_fit(rows, subject, OPTIONS)
    ticks = chain([100.0, 104.0], repeat(0.0))  # the timed step took four seconds
    monkeypatch.setattr(training.time, "perf_counter", lambda: next(ticks))
    # nine rows in steps of four, five epochs, for SFT, IA2 and SFT after it; then one of eight runs twice
    seconds = 4 * (3 * 5) * 3 * (1 + 2 / 8)
    labels = []

    def bar(label, total):
        labels.append(label)
        return tqdm(disable=True)

    cv.bar = bar
    train_folds(cv)
    said = f"training sft (all training: about {duration(seconds)})"
    assert labels == ["collecting", said, "training ia2", "training ia2-sft"], "said once"


@pytest.mark.parametrize("seconds, text", [(40, "40 s"), (720, "12 min"), (12600, "3.5 h")])
def test_durations_are_short(seconds, text):
    assert duration(seconds) == text
