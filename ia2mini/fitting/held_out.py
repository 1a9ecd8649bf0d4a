"""How every candidate answers held-out rows. What answers a row has never trained on it.

n rows, F folds, S settings of a candidate, M weights of an adapter, C labels.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import compress

import torch
from torch import Tensor

from ..adapters import adapted
from ..batch import TokenRow, truth_row
from ..engine.experiment import count_steps, warn_of_failed
from ..labels import Scoring, label_scores
from ..methods import METHODS, WITH_DEMONSTRATIONS
from ..prefix import share_prefix
from ..scale import ranks
from ..scale.decode import decoding_for
from ..tasks import same_answer
from ..teacher import TeacherSettings, record_targets
from ..train import Trained
from .answers import answer_scores, answer_texts
from .crossval import CrossValidation, candidate_names
from .probe import PENALTIES, Probe, fit_probe, held_out_scores, last_states
from .selection import Candidate, HeldOut
from .training import SOFT_K


def answer_held_out(cv: CrossValidation, trained: dict[str, Trained]) -> dict[str, HeldOut]:
    """Each candidate's scores of held-out rows. Warns of failed runs; raises UsageError if no learning rate is left."""
    held_out = {}
    for name in candidate_names(cv.task, cv.options):
        weights = None
        if name in METHODS:
            weights = trained[name].theta.unflatten(0, (len(cv.folds), -1))  # [F, S, M]
        one = HeldOut(name, score_held_out(cv, name, weights))
        if name in METHODS:
            one.troubles = warn_of_failed_folds(cv, one)
        if not cv.task.labels:
            add_texts(cv, one, weights)
        held_out[name] = one
    cv.true_answers.clear()  # the teacher's distributions are large
    return held_out


def score_held_out(cv: CrossValidation, name: str, weights: Tensor | None) -> Tensor:
    """Log-probabilities [S, n, C] of a candidate. They are kept, so that an interrupted fit resumes.

    Of every label or, for texts, of the true answer (`score_fold`). Each row is scored by its own fold's weights.
    """

    def make() -> dict[str, Tensor]:
        if name == "probe":
            return {"scores": score_by_probes(cv)}
        return {"scores": score_by_model(cv, name, weights)}

    return cv.store.once(f"held-out-{name}", make)["scores"]


def score_by_model(cv: CrossValidation, name: str, weights: Tensor | None) -> Tensor:
    with cv.bar(f"scoring {name}", len(cv.rows)) as bar:

        def score(number: int) -> Tensor:
            bar.update(len(cv.folds[number].test))
            one_fold = None if weights is None else weights[number]
            return score_fold(cv, name, number, one_fold)

        parts = ranks.spread(score, range(len(cv.folds)))
    joined = torch.cat(parts, 1)
    scores = torch.empty_like(joined)
    scores[:, sum(cv.test_rows, [])] = joined
    if name in METHODS:
        scores[~scores.isfinite().all(-1)] = -torch.inf
    return scores


def score_fold(cv: CrossValidation, name: str, number: int, weights: Tensor | None) -> Tensor:
    """Log-probabilities [S, rows, C] of the labels of a fold's held-out rows, or of their true answers [S, rows, 1].

    With a context: minus the KL from the teacher, which sees it, [S, rows, 1].
    """
    runs = 1 if weights is None else len(weights)
    if name in WITH_DEMONSTRATIONS and runs > 1:  # the demonstrations are read once a run
        parts = []
        for run in weights:
            parts.append(score_fold(cv, name, number, run[None]))
        return torch.cat(parts)
    with answering(cv, name, number, weights) as (model, prompts):
        if cv.label_tokens:
            scoring = Scoring(runs, ends=cv.subject.tokenizer.eos_ids)
            return label_scores(model, prompts, cv.label_tokens, scoring).log_probabilities
        rows = []
        for row, prompt in zip(true_answers(cv, number), prompts):
            rows.append(replace(row, prompt=prompt))
        return answer_scores(model, rows, runs)[..., None]


@contextmanager
def answering(
    cv: CrossValidation, name: str, number: int, weights: Tensor | None = None
) -> Iterator[tuple[Callable, list[list[int]]]]:
    """The model that answers what fold `number` held out, and its prompts.

    `weights` [runs, M] of adapters; None: the base. Methods that answer with demonstrations get those of the fold.
    """
    tokenizer = cv.subject.tokenizer
    fold = cv.folds[number]
    queries = [cv.rows[i].prompt for i in fold.test]
    demonstrations = fold.icl if name in WITH_DEMONSTRATIONS else [[]]
    with adapted(cv.subject.model, cv.adapter, weights) as model:
        if weights is None or name in WITH_DEMONSTRATIONS:
            yield share_prefix(model, tokenizer, demonstrations, queries)
        else:
            yield model, tokenizer.encode_all(queries)


def true_answers(cv: CrossValidation, number: int) -> list[TokenRow]:
    """A fold's held-out rows with their answers; with a context also the teacher's distributions there."""
    if number in cv.true_answers:
        return cv.true_answers[number]
    # a person's own answer is scored without its end of sequence
    with_end = bool(cv.options.context)
    rows = []
    for i in cv.folds[number].test:
        rows.append(truth_row(cv.rows[i], cv.subject.tokenizer, with_end))
    if cv.options.context:
        # with max_tokens=1 the pass would replace the answers
        settings = TeacherSettings(max_tokens=2, soft_k=SOFT_K)
        with answering(cv, "icl", number) as (teacher, prompts):
            record_targets(teacher, rows, prompts, settings)
        for row in rows:
            row.activations = None  # scoring needs the distributions alone
    cv.true_answers[number] = rows
    return rows


def warn_of_failed_folds(cv: CrossValidation, held_out: HeldOut) -> list[str]:
    """Warn of failed runs, and return the sentences. Raises UsageError if no learning rate is left."""
    failed_rows = (held_out.scores == -torch.inf).any(-1)  # [S, n]
    steps = count_steps(cv.settings, cv.folds[0], held_out.name)
    told = []
    for fold, test in enumerate(cv.test_rows):
        failed = failed_rows[:, test].any(1)
        for rate in compress(cv.rates, failed.tolist()):
            name = f"fold {fold} at rate {rate:g}"
            told.append(f"{name} failed at step {steps}: no finite loss")
    rate_left = not failed_rows.any(1).all()
    return warn_of_failed(held_out.name, told, rate_left)


def add_texts(cv: CrossValidation, held_out: HeldOut, weights: Tensor | None) -> None:
    """Generate an answer to every held-out row, at the learning rate that the other folds choose, and check it.

    `weights` [F, S, M].
    """
    if weights is not None:
        every = range(len(cv.folds))
        picks = cv.selection.picks(cv.selection.losses(held_out), every)
        weights = weights[every, [picks[fold] for fold in every]]  # [F, M]
    found = generate_held_out(cv, held_out.name, weights)
    right = []
    for i, row in enumerate(cv.rows):
        generated, confidence = found[i]
        text = generated.removeprefix(cv.task.blank)
        held_out.texts.append(text)
        held_out.confidences.append(confidence)
        right.append(same_answer(cv.task.parser, text, row.answer))
    held_out.right = torch.tensor(right)


def generate_held_out(
    cv: CrossValidation, name: str, weights: Tensor | None
) -> dict[int, tuple[str, float]]:
    """The greedy answer to every held-out row, and its confidence; `weights` [F, M] of the folds' adapters."""
    tokenizer = cv.subject.tokenizer
    decoding = decoding_for(cv.subject.model, cv.max_tokens, cv.stop)
    with cv.bar(f"answers of {name}", len(cv.rows)) as bar:

        def answer(number: int) -> list[tuple[str, float]]:
            one_fold = None if weights is None else weights[number][None]
            with answering(cv, name, number, one_fold) as (model, prompts):
                return answer_texts(model, tokenizer, prompts, decoding, bar.update)

        parts = ranks.spread(answer, range(len(cv.folds)))
    return dict(zip(sum(cv.test_rows, []), sum(parts, [])))


def score_by_probes(cv: CrossValidation) -> Tensor:
    """Log-probabilities [penalties, n, C] of held-out rows, from a probe of each fold."""
    return held_out_scores(base_states(cv), cv.gold, cv.test_rows, len(cv.task.labels))


def fit_final_probe(cv: CrossValidation, candidate: Candidate) -> Probe:
    """The probe that is fitted to every row."""
    penalty = PENALTIES[candidate.setting]
    return fit_probe(base_states(cv), cv.gold, len(cv.task.labels), penalty)


def base_states(cv: CrossValidation) -> Tensor:
    """The base's last hidden state at the end of every row's prompt, [n, D]; computed once."""
    if cv.states is None:
        prompts = cv.subject.tokenizer.encode_all([row.prompt for row in cv.rows])
        cv.states = last_states(cv.subject.model, prompts)
    return cv.states
