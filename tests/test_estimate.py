"""A `fit` says how long it will train before it begins, from one timed step."""

from io import StringIO
from itertools import chain, repeat

import pytest
from tqdm import tqdm

from ia2mini import FitOptions, open_subject
from ia2mini.engine.store import Store
from ia2mini.fitting import training
from ia2mini.fitting.fit import prepare_fit
from ia2mini.fitting.training import duration, estimate, train_folds
from ia2mini.tasks import world

OPTIONS = FitOptions(rates=(1e-3, 1e-2), methods=("sft", "ia2-sft"), folds=4, epochs=5)


def test_the_estimate_counts_steps_of_every_phase(monkeypatch, tmp_path):
    subject = open_subject("tiny", "cpu")
    rows = world.rows("toy-mood", "train")[:12]
    cv = prepare_fit(rows, subject, OPTIONS)
    ticks = chain([100.0, 104.0], repeat(0.0))  # the timed step took four seconds
    monkeypatch.setattr(training.time, "perf_counter", lambda: next(ticks))
    # nine rows in steps of four, five epochs, for SFT, IA2 and SFT after it; then one of eight runs twice
    seconds = 4 * (3 * 5) * 3 * (1 + 2 / 8)
    labels = []
    shown = StringIO()

    def bar(label, total):
        labels.append(label)
        return tqdm(desc=label, total=total, file=shown)

    cv.bar = bar
    train_folds(cv)
    phases = ["collecting", "training sft", "training ia2", "training ia2-sft"]
    assert labels == ["timing a step", *(f"folds: {phase}" for phase in phases)]
    assert shown.getvalue().count(f"all training: about {duration(seconds)}\n") == 1
    cv.store = Store(tmp_path, "unfinished", {})
    train_folds(cv)
    labels.clear()
    train_folds(cv)
    assert labels == [], "what is kept is trained or timed again"


def test_who_sees_no_bars_reads_no_estimate(capfd):
    """A process that is not the first, or who asked for silence."""
    cv = prepare_fit(world.rows("toy-mood", "train")[:12], open_subject("tiny", "cpu"), OPTIONS)
    train_folds(cv)
    assert capfd.readouterr() == ("", "")


def test_of_long_training_it_says_what_takes_less():
    rows = world.rows("toy-mood", "train")[:12]
    cv = prepare_fit(rows, open_subject("tiny", "cpu"), FitOptions(folds=4))
    methods = ["sft", "ia2", "ia2-sft", "hidden", "hidden-sft"]
    # fifteen steps each, and half as many again for all rows
    assert estimate(cv, methods, 1.0) == "all training: about 2 min"
    less = "with --methods hidden-sft alone 8 min"
    assert estimate(cv, methods, 10.0) == f"all training: about 19 min; {less}"
    assert estimate(cv, ["sft"], 10.0) == "all training: about 4 min", "which tries less"
    only = prepare_fit(rows, open_subject("tiny", "cpu"), FitOptions(methods=("hidden-sft",)))
    assert ";" not in estimate(only, methods[3:], 100.0)


@pytest.mark.parametrize("seconds, text", [(40, "40 s"), (720, "12 min"), (12600, "3.5 h")])
def test_durations_are_short(seconds, text):
    assert duration(seconds) == text
