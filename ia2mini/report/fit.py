"""The report of `fit` and `score`: numbers of held-out rows with intervals, a table, a page."""

import math
from pathlib import Path

import torch

from .. import UsageError
from ..files import count, json_line, write_text
from ..fitting.measures import classes, commonest, measures
from ..fitting.sentence import NAMES, never_right, percent
from ..intervals import LEAST_ROWS, share_interval
from ..tasks.own import true_answer
from ..tasks.rows import Row
from ..tasks.turns import open_turns
from .card import card
from .page import lines, section, shown, table, whole

HEADS = {
    "acc": "right (%)",
    "macro_f1": "macro-F1",
    "ece": "ECE",
    "ece_null": "(null)",
    "brier": "Brier",
    "nll": "NLL",
}
AMONG_LABELS, AGREES = "right, among the labels (%)", "as with the context (%)"
INTERVALS = "95 % intervals: Clopper-Pearson for shares, Student's t for means"


def write_fit_table(report: dict) -> str:
    """The short report for the terminal."""
    rows = measured(report)
    widths = [max(map(len, column)) for column in zip(*rows)]
    table = []
    for row in rows:
        entries = [f"{row[0]:<{widths[0]}}"]
        entries += [f"{text:>{width}}" for text, width in zip(row[1:], widths[1:])]
        table.append("  ".join(entries).rstrip())
    return "\n".join(
        [about(report), *table, *notes(report), "", report["sentence"], *report["remarks"]]
    )


def notes(report: dict) -> list[str]:
    """What the table's signs mean."""
    said = [INTERVALS]
    if report["rows"] < LEAST_ROWS:
        said = [f"no intervals: below {LEAST_ROWS} rows"]
    if report["chosen"]:
        said.append("*: shipped")
        said.append("as shipped: each row by the choice that the other folds make")
    if "ece_null" in report["candidates"][next(iter(report["candidates"]))]:
        said.append("(null): the ECE that perfect calibration would show")
    return ["; ".join(said)]


def measured(report: dict) -> list[list[str]]:
    """The table of the candidates: its heads, then a line for each, the chosen one marked, and the whole choice."""
    lines = dict(report["candidates"])
    if report["chosen"]:
        lines["shipped"] = report["shipped"]
    known = [name for name in HEADS if any(name in one for one in lines.values())]
    heads = dict(HEADS)
    if "kl" in report:
        heads |= {"acc": AGREES, "nll": "KL"}
    elif "macro_f1" in known:
        heads["acc"] = AMONG_LABELS
    rows = [["", *map(heads.get, known)]]
    for name, one in lines.items():
        mark = " *" if name == report["chosen"] else ""
        rows.append(
            [NAMES.get(name, name) + mark, *(entry(one.get(column), column) for column in known)]
        )
    return rows


def entry(value, name: str) -> str:
    """A measure as the table shows it: with its interval, if it has one."""
    if value is None:
        return "–"
    if not isinstance(value, list):
        return f"{value + 0.0:.2f}"
    if name == "acc":
        return percent(value).replace(" %", "")
    mean, low, high = value
    if low is None or math.isnan(low):
        return f"{mean + 0.0:.2f}"
    return f"{mean + 0.0:.2f} ({low + 0.0:.2f} to {high + 0.0:.2f})"


def write_fit_report(fitted, folder: Path, command: str) -> None:
    """report.html, held_out.jsonl (every row with what was said of it before it was trained on), the model card."""
    report = fitted.report
    write_text(
        folder / "held_out.jsonl", "".join(json_line(row) + "\n" for row in report["held_out"])
    )
    write_text(folder / "report.html", fit_page(report, command))
    write_text(folder / "README.md", card(fitted, folder, command))


def fit_page(report: dict, command: str) -> str:
    """The report as one HTML page."""
    heads, *rows = measured(report)
    results = [table("Held-out rows", heads, rows, "means")]
    tokens = report["tokens"]
    said = [*notes(report), *calibration(report)]
    said.append(
        f"A query costs {tokens['query']:.0f} tokens; with demonstrations {tokens['icl']:.0f}."
    )
    results.append(lines([*said, f"{report['seconds']:.0f} s in all."]))
    answers = []
    if "classes" in report:
        labels = [c["label"] for c in report["classes"]]
        rows = [
            [c["label"], c["rows"], share(c["precision"]), share(c["recall"])]
            for c in report["classes"]
        ]
        answers.append(table("By answer", ["answer", "rows", "precision", "recall"], rows, "means"))
        rows = [[label, *row] for label, row in zip(labels, report["confusion"])]
        answers.append(table("Rows true, columns said", ["", *labels], rows, "means"))
    held = [
        [r["prompt"], r["true"], r["said"], f"{r['confidence']:.2f}"]
        for r in report["held_out"]
        if not r["right"]
    ]
    wrong, heads = (
        f"{count(len(held), 'held-out row')} answered wrong",
        ["prompt", "answer", "said", "confidence"],
    )
    answers.append(table(wrong, heads, held, "text") if held else lines([wrong]))
    sections = [section("Candidates", results), section("Answers", answers)]
    sections.append(
        section("How this was made", [f"<pre>{shown(command)}</pre>", lines([about(report)])])
    )
    return whole(
        f"{report['name']}: fitted", report["sentence"], lines(report["remarks"]), sections
    )


def calibration(report: dict) -> list[str]:
    """Which temperature is shipped, and why."""
    if not report.get("calibration"):
        return []
    before, after = report["calibration"]
    losses = f"the NLL would have been {after:.2f} instead of {before:.2f}"
    if report["temperature"] == 1:
        return [f"No temperature: with those that suit the other folds' rows {losses}."]
    losses = (
        f"with those that suit the other folds' rows the NLL is {after:.2f} instead of {before:.2f}"
    )
    chosen = report["candidates"][report["chosen"]]
    errors = f"ECE {chosen['ece_without_temperature']:.2f} without, {chosen['ece']:.2f} with it"
    return [f"One temperature, {report['temperature']:.2f}: {losses} ({errors})."]


def share(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.0f} %"


def about(report: dict) -> str:
    """Rows, model and folds in one line."""
    folds = [f"held out in {count(report['folds'], 'fold')}"] * bool(report["folds"])
    return " · ".join([report["name"], count(report["rows"], "row"), report["model"], *folds])


def score_rows(fitted, rows: list[Row], icl: bool, column: str | None = None) -> dict:
    """The report of an adapter (or of the base with demonstrations) on rows with answers."""
    spec = fitted.spec
    column = column or spec["answer_column"] or "label"
    labels = spec["labels"]
    true = []
    for row in [open_turns(row, spec["template"]) for row in rows]:
        if not str(row.get(column, "")).strip():
            there = ", ".join(map(repr, row))
            raise UsageError(
                f"{row.where}: no answer in column {column!r} (of {there}); see --answer-column"
            )
        true.append(true_answer(row, column, labels))
    name = "icl" if icl else spec["method"]
    found = [answer for _, answer in fitted.answers(rows, icl)]
    report = {
        "name": Path(rows[0].where.partition(":")[0]).stem,
        "model": fitted.subject.name,
        "rows": len(rows),
    }
    report |= {"folds": 0, "chosen": None, "remarks": []}
    if labels:
        gold = torch.tensor([labels.index(text) for text in true])
        scores = torch.tensor(
            [answer["log_probabilities"] for answer in found], dtype=torch.float64
        )
        numbers = {name: measures(scores, gold), "commonest": commonest(gold, len(labels))}
        report |= classes(scores, gold, labels)
    else:
        right = torch.tensor([fitted.is_right(f["answer"], text) for f, text in zip(found, true)])
        numbers = {name: {"acc": list(share_interval(int(right.sum()), len(right)))}}
    told = f"{NAMES.get(name, name)}: {percent(numbers[name]['acc'])} of {count(len(rows), 'row')} right."
    if len(rows) < LEAST_ROWS:
        told += " So few rows prove nothing."
    return report | {"candidates": numbers, "sentence": " ".join([told, *never_right(report)])}
