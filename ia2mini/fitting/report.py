"""The report of a fit: the numbers that a person should know, the sentence, and every held-out row."""

from dataclasses import dataclass

from ..engine.intervals import sign_test
from .crossval import CrossValidation, mean_tokens
from .measures import classes, measures
from .selection import BASELINES, Candidate, HeldOut, has_lower_loss, right_alone
from .sentence import sentence


@dataclass
class Choice:
    """What is shipped, of which candidates, and what held-out rows say of the whole choice."""

    candidates: dict[str, Candidate]
    chosen: Candidate
    nested: Candidate  # nested cross-validation: each fold's rows by what the other folds choose
    chosen_by_fold: list[str]  # what the folds other than each choose


def make_report(cv: CrossValidation, held_out: dict[str, HeldOut], choice: Choice) -> dict:
    """The numbers, the sentence, and every held-out row with what the chosen candidate says of it."""
    task = cv.task
    candidates = choice.candidates
    chosen = choice.chosen
    numbers = {name: measure_candidate(cv, candidate) for name, candidate in candidates.items()}
    against = compare_rivals(cv, choice)
    troubles = []
    for one in held_out.values():
        troubles += one.troubles
    report = {
        "name": task.name,
        "model": cv.subject.name,
        "rows": len(cv.rows),
        "folds": len(cv.folds),
        "chosen": chosen.name,
        "chosen_by_fold": choice.chosen_by_fold,
        "wanted": bool(cv.options.ship),
        "tokens": mean_tokens(cv),
        "temperature": chosen.temperature,
        "calibration": chosen.calibration,
        "candidates": numbers,
        "shipped": measure_candidate(cv, choice.nested),
        "remarks": [*troubles, *cv.remarks],
        "all_differ": len({row.answer for row in cv.rows}) == len(cv.rows),
        "against": against,
        "lower_loss": [name for name in against if has_lower_loss(choice.nested, candidates[name])],
        "nearest": nearest(candidates),
    }
    if task.labels:
        report.update(classes(chosen.scores, cv.gold, task.labels))
    if cv.options.context:
        report["kl"] = {name: one["nll"][0] for name, one in numbers.items()}
    report["sentence"] = sentence(report)
    report["held_out"] = answered_rows(cv, chosen, held_out[chosen.name])
    return report


def measure_candidate(cv: CrossValidation, candidate: Candidate) -> dict:
    temperatures = 1.0 if candidate.temperatures is None else candidate.temperatures
    right = None if cv.task.labels else candidate.right
    return measures(candidate.scores, cv.gold, temperatures, right)


def compare_rivals(cv: CrossValidation, choice: Choice) -> dict[str, tuple]:
    """The shipped one against base, ICL and SFT, row by row; with a context ICL is the teacher, and no rival."""
    found = {}
    for name in ["base", "sft"] if cv.options.context else ["base", "icl", "sft"]:
        if name in choice.candidates and name != choice.chosen.name:
            found[name] = compare_rows(choice.nested, choice.candidates[name])
    return found


def compare_rows(one: Candidate, other: Candidate) -> tuple[int, int, float]:
    """On how many rows only one of two is right, and only the other; the sign test's p."""
    more, less = right_alone(one, other)
    return more, less, sign_test(more, less)


def nearest(candidates: dict[str, Candidate]) -> tuple | None:
    """The candidate with the lowest loss that is below the base's, compared with the base; None: there is none."""
    losses = {name: one.losses.mean().item() for name, one in candidates.items()}
    tried = [name for name in candidates if name not in BASELINES]
    best = min(tried, key=losses.__getitem__)
    if losses[best] >= losses["base"]:
        return None
    return best, *compare_rows(candidates[best], candidates["base"])


def answered_rows(cv: CrossValidation, chosen: Candidate, held_out: HeldOut) -> list[dict]:
    """Every row with what the chosen candidate's folds, which have not seen it, answer: a label or a text."""
    labels = cv.task.labels
    said = held_out.texts
    confidences = held_out.confidences
    if labels:
        shares = (chosen.scores / chosen.temperatures[:, None]).softmax(-1)
        said = [labels[best] for best in shares.argmax(-1)]
        confidences = shares.amax(-1).tolist()
    found = []
    for i, row in enumerate(cv.rows):
        about = {
            "prompt": question(row.prompt),
            "true": row.answer.removeprefix(cv.task.blank),
            "said": said[i],
            "confidence": confidences[i],
            "right": bool(chosen.right[i]),
        }
        if labels:
            about["probabilities"] = dict(zip(labels, shares[i].tolist()))
        found.append(about)
    return found


def question(prompt: str) -> str:
    """A prompt as its template filled it, before it became a turn of a chat."""
    return getattr(prompt, "question", prompt)
