"""Score an adapter on labelled rows: `ia2mini score`."""

from pathlib import Path

import torch

from .. import UsageError
from ..engine.intervals import LEAST_ROWS, share_interval
from ..files import plural
from ..tasks.own import true_answer
from ..tasks.rows import Row, missing_part, prompt_of
from ..tasks.turns import open_turns
from .measures import classes, commonest, measures
from .predictor import Predictor
from .sentence import NAMES, never_right, with_interval
from .spec import misfit


def score_rows(predictor: Predictor, rows: list[Row], icl: bool, column: str | None = None) -> dict:
    """Score an adapter (with `icl` the base with demonstrations) on rows. UsageError for a row without answer."""
    spec = predictor.spec
    labels = spec["labels"]
    true = true_answers(rows, spec, column or spec["answer_column"] or "label")
    name = "icl" if icl else spec["method"]
    found = [answer for _, answer in predictor.full_answers(rows, icl)]
    report = {
        "name": Path(rows[0].where.partition(":")[0]).stem,
        "model": predictor.subject.name,
        "rows": len(rows),
        "folds": 0,
        "chosen": None,
        "remarks": [],
    }
    if labels:
        gold = torch.tensor([labels.index(text) for text in true])
        log_probabilities = [answer["log_probabilities"] for answer in found]
        scores = torch.tensor(log_probabilities, dtype=torch.float64)
        numbers = measures(scores, gold)
        report["candidates"] = {name: numbers, "commonest": commonest(gold, len(labels))}
        report.update(classes(scores, gold, labels))
    else:
        right = [predictor.is_right(one["answer"], text) for one, text in zip(found, true)]
        numbers = {"acc": list(share_interval(right.count(True), len(right)))}
        report["candidates"] = {name: numbers}
    share = f"{with_interval(numbers['acc'])} of {plural(len(rows), 'row')}"
    told = [f"{NAMES.get(name, name)}: {share} right."]
    if len(rows) < LEAST_ROWS:
        told.append("So few rows prove nothing.")
    fitted = count_fitted(predictor, rows)
    if fitted:
        among = "is among the rows" if fitted == 1 else "are among the rows"
        told.append(f"{fitted} of these {among} it was fitted on: new rows may come out worse.")
    report["sentence"] = " ".join([*told, *never_right(report)])
    return report


def count_fitted(predictor: Predictor, rows: list[Row]) -> int:
    """How many of these rows have a prompt of the rows that the adapter was fitted on."""
    fitted = predictor.report.get("held_out", [])
    if misfit(fitted, [{"prompt": str}], ""):
        return 0
    known = {row["prompt"] for row in fitted}
    template = predictor.spec["template"]
    prompts = [prompt_of(template, open_turns(row, template)) for row in rows]
    return sum(prompt in known for prompt in prompts)


def true_answers(rows: list[Row], spec: dict, column: str) -> list[str]:
    """The answer in a column of each row. Raises UsageError if one is missing."""
    labels = spec["labels"]
    true = []
    for row in rows:
        row = open_turns(row, spec["template"])
        is_missing = missing_part(row, spec["template"], column) == "answer"
        if is_missing and row.get(column) not in labels:
            missing = f"no answer in column {column!r} (of {', '.join(map(repr, row))})"
            raise UsageError(f"{row.where}: {missing}; see --answer-column")
        true.append(true_answer(row, column, labels))
    return true
