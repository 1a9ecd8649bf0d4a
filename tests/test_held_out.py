"""Held-out rows are scored by weights and probes that never saw them."""

from dataclasses import replace

import pytest
import torch
from plain import Plain, joined, label_log_probability
from reference import peft_twin

from ia2mini import FitOptions, open_subject
from ia2mini.adapters import adapted
from ia2mini.engine.experiment import teach_all
from ia2mini.fitting.crossval import CrossValidation
from ia2mini.fitting.fit import prepare_fit
from ia2mini.fitting.held_out import answer_held_out, score_by_probes
from ia2mini.fitting.training import experiment_of_folds, train_final, train_folds
from ia2mini.labels import label_scores
from ia2mini.tasks import world


def test_held_out_rows_are_scored_by_weights_that_never_saw_them():
    """As a plain loop of `label_scores`; other answers of a fold's rows change no bit of what is said of them."""
    subject = open_subject("tiny", "cpu")
    options = FitOptions(epochs=3, rates=(3e-3, 1e-2), methods=("sft",), folds=3)
    cv = prepare_fit(world.rows("toy-mood-remap", "train")[4:19], subject, options)
    trained = train_folds(cv)
    scores = answer_held_out(cv, trained)["sft"].scores
    assert scores.shape == (2, 15, 2)
    theta = trained["sft"].theta
    for number, fold in enumerate(cv.folds):
        for rate in range(2):
            with adapted(subject.model, cv.adapter, theta[2 * number + rate][None]) as student:
                ids = [subject.tokenizer.encode(cv.rows[i].prompt) for i in fold.test]
                expected = label_scores(student, ids, cv.label_tokens).log_probabilities[0]
            assert torch.allclose(scores[rate, fold.test], expected, atol=1e-3)
    fold = cv.folds[0].test
    other = list(cv.rows)
    for i in fold:
        flipped = 1 - other[i].label
        other[i] = replace(other[i], label=flipped, answer=cv.task.labels[flipped])
    again = CrossValidation(subject, cv.task, other, cv.options)
    again.folds = cv.folds
    assert not torch.equal(again.gold, cv.gold)
    same = answer_held_out(again, train_folds(again))["sft"].scores
    assert torch.equal(same[:, fold], scores[:, fold])
    assert torch.equal(score_by_probes(again)[:, fold], score_by_probes(cv)[:, fold])


def test_with_demonstrations_they_are_scored_as_peft_scores_whole_prompts():
    subject = open_subject("tiny", "cpu")
    methods = ("icl-sft",)
    options = FitOptions(epochs=2, rates=(3e-3, 1e-2), methods=methods, folds=3, demonstrations=4)
    cv = prepare_fit(world.rows("toy-mood-remap", "train")[4:14], subject, options)
    trained = train_folds(cv)
    scores = answer_held_out(cv, trained)["icl-sft"].scores
    theta = trained["icl-sft"].theta.unflatten(0, (len(cv.folds), -1))
    encode = subject.tokenizer.encode
    for number, fold in enumerate(cv.folds):
        (demonstrations,) = fold.icl
        assert len(demonstrations) == 4
        for rate in range(2):
            net = peft_twin(subject.folder, cv.adapter, theta[number, rate])
            student = Plain(net, subject.tokenizer)
            for i in fold.test:
                prompt = encode(joined(demonstrations) + cv.rows[i].prompt)
                expected = []
                with torch.no_grad():
                    for label in cv.label_tokens:
                        expected.append(label_log_probability(student.following, prompt, label))
                assert scores[rate, i].tolist() == pytest.approx(expected, abs=2e-3)


def test_its_training_rows_have_their_demonstrations_in_the_prompt():
    subject = open_subject("tiny", "cpu")
    options = FitOptions(methods=("icl-sft", "ia2"), folds=3, demonstrations=4)
    cv = prepare_fit(world.rows("toy-mood-remap", "train")[4:14], subject, options)
    encode = subject.tokenizer.encode
    taught_folds = teach_all(experiment_of_folds(cv))
    for fold, taught in zip(cv.folds, taught_folds, strict=True):
        shown = zip(fold.train, fold.demonstrations, taught.demonstrated_train, strict=True)
        for example, demonstrations, row in shown:
            assert example not in demonstrations and len(demonstrations) == 4
            assert row.prompt == encode(joined(demonstrations) + example.prompt)
            assert row.answer == encode(example.answer)


def test_sft_alone_asks_no_teacher_and_trains_to_the_same_weights(monkeypatch):
    subject = open_subject("tiny", "cpu")
    rows = world.rows("toy-mood-remap", "train")[4:16]
    options = FitOptions(epochs=2, rates=(1e-2,), methods=("sft",), folds=3)
    both = prepare_fit(rows, subject, replace(options, methods=("sft", "ia2")))
    taught, whole = train_sft(both)
    monkeypatch.setattr("ia2mini.engine.experiment.teach", None)
    alone = prepare_fit(rows, subject, options)
    weights, final = train_sft(alone)
    assert torch.equal(weights, taught)
    assert torch.equal(final, whole)


def train_sft(cv) -> tuple[torch.Tensor, torch.Tensor]:
    """SFT's weights of every fold, and of the training on every row."""
    trained = train_folds(cv)
    held_out = answer_held_out(cv, trained)
    candidate = cv.selection.judge(held_out["sft"], range(3))
    return trained["sft"].theta, train_final(cv, candidate)
