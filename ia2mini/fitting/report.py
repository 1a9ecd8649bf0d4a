"""The report of a fit: the numbers that a person should know, the sentence, and every held-out row."""

from dataclasses import dataclass

from ..engine.intervals import sign_test
from .crossval import CrossValidation, mean_tokens
from .measures import classes, measures
from .selection import BASELINES, Candidate, HeldOut, right_alone
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
    rivals = {}
    for name in rivals_of(cv, choice):
        rivals[name] = compare_rows(choice.nested, candidates[name])
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
        "against": rivals,
        "nearest": nearest(candidates),
    }
    if task.labels:
        report.update(classes(chosen.scores, cv.gold, task.labels))
    if cv.options.context:
        report["kl"] = {name: one["nll"][0] for name, one in numbers.items()}
    report["sentence"] = sentence(report)
    if task.labels:
        report["held_out"] = labelled_rows(cv, chosen)
    else:
        report["held_out"] = text_rows(cv, held_out[chosen.name])
    return report


def measure_candidate(cv: CrossValidation, candidate: Candidate) -> dict:
    temperatures = 1.0 if candidate.temperatures is None else candidate.temperatures
    right = None if cv.task.labels else candidate.right
    return measures(candidate.scores, cv.gold, temperatures, right)


def rivals_of(cv: CrossValidation, choice: Choice) -> list[str]:
    """What the shipped one is compared with, row by row; with a context ICL is the teacher, and no rival."""
    names = ["base", "sft"] if cv.options.context else ["base", "icl", "sft"]
    return [name for name in names if name in choice.candidates and name != choice.chosen.name]


def compare_rows(one: Candidate, other: Candidate) -> tuple[int, int, float]:
    """On how many rows only one of two is right, and only the other; the sign test's p."""
    more, less = right_alone(one, other)
    return more, less, sign_test(more, less)


def nearest(candidates: dict[str, Candidate]) -> tuple | None:
    """The candidate with the lowest loss that is below the base's, compared with the base; None: there is none."""
    losses = {name: one.losses.mean().item() for name, one in candidates.items()}
    better = [name for name in candidates if losses[name] < losses["base"]]
    better = [name for name in better if name not in BASELINES]
    if not better:
        return None
    best = min(better, key=losses.__getitem__)
    return best, *compare_rows(candidates[best], candidates["base"])


def labelled_rows(cv: CrossValidation, chosen: Candidate) -> list[dict]:
    """Every row with the label that the chosen candidate's folds, which have not seen it, give it."""
    labels = cv.task.labels
    tempered = chosen.scores / chosen.temperatures[:, None]
    found = []
    for i, probabilities in enumerate(tempered.softmax(-1)):
        best = int(probabilities.argmax())
        about = about_row(cv, i, labels[best], probabilities[best].item(), bool(chosen.right[i]))
        about["probabilities"] = dict(zip(labels, probabilities.tolist()))
        found.append(about)
    return found


def text_rows(cv: CrossValidation, held_out: HeldOut) -> list[dict]:
    """Every row with the text that the chosen candidate's folds, which have not seen it, generate for it."""
    found = []
    for i, text in enumerate(held_out.texts):
        right = bool(held_out.right[i])
        found.append(about_row(cv, i, text, held_out.confidences[i], right))
    return found


def about_row(cv: CrossValidation, i: int, said: str, confidence: float, right: bool) -> dict:
    row = cv.rows[i]
    return {
        "prompt": question(row.prompt),
        "true": row.answer.removeprefix(cv.task.blank),
        "said": said,
        "confidence": confidence,
        "right": right,
    }


def question(prompt: str) -> str:
    """A prompt as its template filled it, before it became a turn of a chat."""
    return getattr(prompt, "question", prompt)
