"""Held-out rows are scored after every epoch, by weights that never saw them."""

from dataclasses import replace

import torch

from ia2mini import FitOptions, open_subject
from ia2mini.adapters import adapted
from ia2mini.fitting.crossval import CrossValidation
from ia2mini.fitting.fit import cross_validation
from ia2mini.labels import label_scores
from ia2mini.tasks import world


def test_held_out_rows_are_scored_after_every_epoch_by_weights_that_never_saw_them():
    """As a plain loop of `train_for` and `label_scores`; other answers of a fold's rows change no bit of its scores."""
    subject = open_subject("tiny", "cpu")
    options = FitOptions(epochs=3, rates=(3e-3, 1e-2), methods=("sft",), folds=3)
    cv, _ = cross_validation(world.rows("toy-mood-remap", "train")[4:19], subject, options)
    scores = cv.held_out("sft")
    assert scores.shape == (3, 2, 15, 2)
    for epoch in range(3):
        theta = cv.train_for("sft", torch.full((6,), epoch + 1)).theta
        for number, fold in enumerate(cv.folds):
            for rate in range(2):
                with adapted(subject.model, cv.adapter, theta[2 * number + rate][None]) as student:
                    ids = [subject.tokenizer.encode(cv.rows[i].prompt) for i in fold.test]
                    expected = label_scores(student, ids, cv.labels).log_probabilities[0]
                assert torch.allclose(scores[epoch, rate, fold.test], expected, atol=1e-3)
    fold = cv.folds[0].test
    other = list(cv.rows)
    for i in fold:
        flipped = 1 - other[i].label
        other[i] = replace(other[i], label=flipped, answer=cv.task.labels[flipped])
    again = CrossValidation(subject, cv.task, other, cv.options)
    again.folds, again.selection, again.places = (
        cv.folds,
        replace(cv.selection, gold=again.gold),
        cv.places,
    )
    assert torch.equal(again.held_out("sft")[:, :, fold], scores[:, :, fold])
