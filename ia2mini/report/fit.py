"""The report of `fit` and `score`: a table for the terminal and an HTML page."""

import math
from collections.abc import Sequence
from operator import itemgetter
from pathlib import Path
from textwrap import fill

import torch

from .. import UsageError
from ..engine.intervals import LEAST_ROWS, share_interval
from ..files import count, json_line, write_text
from ..fitting.measures import classes, commonest, measures
from ..fitting.sentence import NAMES, never_right, outcome, with_interval
from ..tasks.own import true_answer
from ..tasks.rows import Row, missing_part, prompt_of
from ..tasks.turns import open_turns
from .card import card
from .charts import draw_candidates
from .drawing import png_of, styled
from .markup import details, escaped, figure, first_screen, html_page, lines, table

HEADS = {
    "acc": "right (%)",
    "macro_f1": "macro-F1",
    "ece": "ECE",
    "ece_null": "(null)",
    "brier": "Brier",
    "nll": "NLL",
}
WIDE = ("brier", "nll")  # their intervals do not fit into a terminal beside the others
COLUMNS = 80  # of a terminal
NO_BREAK = "\ue000"  # for a while in place of a blank at which no line breaks
AGREES = "as with the context (%)"
SUSPECTS = "suspects.jsonl"
MATRIX = 20  # up to this many labels the page shows the confusion matrix
INTERVALS = "95 % intervals: Clopper-Pearson for shares, Student's t for means"


def write_fit_table(report: dict, told: tuple[str, ...] = ()) -> str:
    """The report for a terminal of 80 columns, without remarks that have been `told` already."""
    rows = measured(report, brief=True)
    widths = [max(map(len, column)) for column in zip(*rows)]
    table = []
    for row in rows:
        entries = [f"{row[0]:<{widths[0]}}"]
        entries += [f"{text:>{width}}" for text, width in zip(row[1:], widths[1:])]
        table.append("  ".join(entries).rstrip())
    remarks = [remark for remark in report["remarks"] if remark not in told]
    said = wrapped(report["sentence"])
    return "\n".join([about(report), *table, *notes(report, brief=True), "", said, *remarks])


def wrapped(text: str) -> str:
    """A text in lines that a terminal does not break."""
    kept = text.replace(" %", f"{NO_BREAK}%")
    broken = fill(kept, COLUMNS, break_long_words=False, break_on_hyphens=False)
    return broken.replace(NO_BREAK, " ")


def notes(report: dict, brief: bool = False) -> list[str]:
    """The legend of the table; `brief`: of the table for the terminal."""
    measures = report["candidates"][next(iter(report["candidates"]))]
    said = [INTERVALS]
    if brief and "macro_f1" in measures:
        said = ["95 % intervals: Clopper-Pearson"]
        if report["chosen"]:
            said = ["95 % intervals: Clopper-Pearson; report.html has those of Brier and NLL"]
    if report["rows"] < LEAST_ROWS:
        said = [f"no intervals: below {LEAST_ROWS} rows"]
    if "macro_f1" in measures:
        said.append("right: the label with the highest probability is the row's own")
    if "ece_null" in measures:
        said.append("(null): the ECE that perfect calibration would show")
    if report["chosen"]:
        said.append("*: shipped; as shipped: each row by the choice that the other folds make")
    return said


def measured(report: dict, brief: bool = False) -> list[list[str]]:
    """The table of candidates: headings, one line for each with the chosen one marked, and "as shipped".

    `brief`: without the intervals of the measures in `WIDE`, where the table has all columns.
    """
    candidates = dict(report["candidates"])
    if report["chosen"]:
        candidates["shipped"] = report["shipped"]
    known = []
    for name in HEADS:
        if any(name in numbers for numbers in candidates.values()):
            known.append(name)
    heads = dict(HEADS)
    if "kl" in report:
        heads["acc"] = AGREES
        heads["nll"] = "KL"
    without_interval = WIDE if brief and "macro_f1" in known else ()
    rows = [["", *map(heads.get, known)]]
    for name, numbers in candidates.items():
        mark = " *" if name == report["chosen"] else ""
        entries = []
        for column in known:
            value = numbers.get(column)
            if column in without_interval and value is not None:
                value = value[0]
            entries.append(entry(value, column))
        rows.append([NAMES.get(name, name) + mark, *entries])
    return rows


def entry(value, name: str) -> str:
    """A measure as text, with its interval if it has one."""
    if value is None:
        return "–"
    if not isinstance(value, list):
        return f"{value + 0.0:.2f}"
    if name == "acc":
        return with_interval(value).replace(" %", "")
    mean, low, high = value
    if low is None or math.isnan(low):
        return f"{mean + 0.0:.2f}"
    return f"{mean + 0.0:.2f} ({low + 0.0:.2f} to {high + 0.0:.2f})"


def write_fit_report(fitted, folder: Path, command: str, rows: Sequence[Row] = ()) -> None:
    """Write report.html, held_out.jsonl (every row with its held-out answer) and the model card.

    suspects.jsonl, if there are any, has the rows to check first; `rows` (the fitted ones) give their places.
    """
    report = fitted.report
    write_jsonl(folder / "held_out.jsonl", report["held_out"])
    odd = suspects(report, places_of(rows, fitted.spec["template"]))
    if odd:
        write_jsonl(folder / SUSPECTS, odd)
    else:
        (folder / SUSPECTS).unlink(missing_ok=True)  # of an earlier fit
    write_text(folder / "report.html", fit_page(report, command, odd))
    write_text(folder / "README.md", card(fitted, folder, command))


def write_jsonl(path: Path, rows: list[dict]) -> None:
    write_text(path, "".join(json_line(row) + "\n" for row in rows))


def places_of(rows: Sequence[Row], template: str) -> dict[str, str]:
    """The places of the rows with each prompt."""
    places: dict[str, list[str]] = {}
    for row in rows:
        row = open_turns(row, template)
        if missing_part(row, template, None) is None:
            places.setdefault(prompt_of(template, row), []).append(row.where)
    return {prompt: ", ".join(named) for prompt, named in places.items()}


def suspects(report: dict, places: dict[str, str]) -> list[dict]:
    """The rows whose own label may be wrong, the least likely first.

    They are wrong held-out rows, at most a tenth of all rows: those with the lowest probability of
    their own label. There are none for texts, and none if nothing is shipped.
    """
    held = report["held_out"]
    wrong = [row for row in held if "probabilities" in row and not row["right"]]
    if report["chosen"] == "base":
        wrong = []
    found = []
    for row in wrong:
        about = {"row": places.get(row["prompt"])}
        about.update({name: row[name] for name in ("prompt", "true", "said", "confidence")})
        about["probability"] = row["probabilities"][row["true"]]
        found.append(about)
    found.sort(key=itemgetter("probability"))
    return found[: math.ceil(len(held) / 10)]


def fit_page(report: dict, command: str, odd: Sequence[dict] = ()) -> str:
    """The report as one HTML page: a sentence, a table and a figure, the rest folded; `odd`: what `suspects` found."""
    heads, *rows = measured(report)
    first = outcome(report)
    others = report["sentence"].removeprefix(first).strip()
    tokens = report["tokens"]
    price = f"A query costs {tokens['query']:.0f} tokens; with demonstrations {tokens['icl']:.0f}."
    meaning = [*notes(report), *calibration(report), price]
    suspicious = [suspects_table(odd)] if odd else []
    made = [
        f"<pre>{escaped(command)}</pre>",
        lines([about(report), f"{report['seconds']:.0f} s in all."]),
    ]
    body = [
        first_screen([table("Held-out rows", heads, rows, "means"), *candidates_figure(report)]),
        details("Beside the other candidates", [lines([others])] if others else []),
        details("What the columns mean, calibration, tokens", [lines(meaning)]),
        details("How the rows were read", [lines(report["remarks"])]),
        details("Look at these", suspicious),
        details("Answers", [*by_label(report), wrong_answers(report)]),
        details("How this was made", made),
    ]
    return html_page(headline(report), lines([first]), body)


def headline(report: dict) -> str:
    """The title of the page: the name of the rows, and the shipped method."""
    if report["chosen"] == "base":
        return f"{report['name']}: nothing is shipped"
    return f"{report['name']}: {NAMES[report['chosen']]} is shipped"


def candidates_figure(report: dict) -> list[str]:
    """The candidates' held-out accuracy as a figure; nothing without matplotlib."""
    try:
        style = styled()
    except ImportError:
        return []
    with style:
        image = png_of(draw_candidates(report))
    said = []
    for name, numbers in report["candidates"].items():
        said.append(f"{NAMES.get(name, name)} {with_interval(numbers['acc'])}")
    caption = "Every row was answered by what was trained without it."
    return [figure(image, "png", f"{outcome(report)} Candidates: {', '.join(said)}.", caption)]


def suspects_table(odd: Sequence[dict]) -> str:
    """The rows whose own label may be wrong."""
    cells = []
    for row in odd:
        shares = [f"{row['confidence']:.2f}", f"{row['probability']:.2f}"]
        cells.append([row["row"] or "", row["prompt"], row["true"], row["said"], *shares])
    title = f"{count(len(odd), 'row')} whose answer may be wrong, the likeliest mistake first"
    heads = ["row", "prompt", "answer", "said when held out", "confidence", "of the answer"]
    return table(title, heads, cells, "text")


def by_label(report: dict) -> list[str]:
    """Precision and recall of each label, and the confusion matrix."""
    if "classes" not in report:
        return []
    labels = [one["label"] for one in report["classes"]]
    each = []
    for one in report["classes"]:
        each.append(
            [
                one["label"],
                one["rows"],
                percent_or_dash(one["precision"]),
                percent_or_dash(one["recall"]),
            ]
        )
    parts = [table("By answer", ["answer", "rows", "precision", "recall"], each, "means")]
    if len(labels) <= MATRIX:
        matrix = [[label, *row] for label, row in zip(labels, report["confusion"])]
        parts.append(table("Rows true, columns said", ["", *labels], matrix, "means"))
        return parts
    pairs = []
    for label, row in zip(labels, report["confusion"]):
        for said, rows in zip(labels, row):
            if rows and said != label:
                pairs.append([label, said, rows])
    pairs.sort(key=itemgetter(2), reverse=True)
    parts.append(table("Most often confused", ["answer", "said", "rows"], pairs[:MATRIX], "text"))
    return parts


def wrong_answers(report: dict) -> str:
    """The held-out rows that were answered wrongly."""
    held = []
    for row in report["held_out"]:
        if not row["right"]:
            held.append([row["prompt"], row["true"], row["said"], f"{row['confidence']:.2f}"])
    title = f"{count(len(held), 'held-out row')} answered wrong"
    if not held:
        return lines([title])
    return table(title, ["prompt", "answer", "said", "confidence"], held, "text")


def calibration(report: dict) -> list[str]:
    """The shipped temperature and its effect."""
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


def percent_or_dash(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.0f} %"


def about(report: dict) -> str:
    """Rows, model and folds in one line."""
    said = [report["name"], count(report["rows"], "row"), report["model"]]
    if report["folds"]:
        said.append(f"held out in {count(report['folds'], 'fold')}")
    return " · ".join(said)


def score_rows(fitted, rows: list[Row], icl: bool, column: str | None = None) -> dict:
    """Score an adapter (with `icl` the base with demonstrations) on rows. UsageError for a row without answer."""
    spec = fitted.spec
    labels = spec["labels"]
    true = true_answers(rows, spec, column or spec["answer_column"] or "label")
    name = "icl" if icl else spec["method"]
    found = [answer for _, answer in fitted.answers(rows, icl)]
    report = {
        "name": Path(rows[0].where.partition(":")[0]).stem,
        "model": fitted.subject.name,
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
        right = [fitted.is_right(one["answer"], text) for one, text in zip(found, true)]
        numbers = {"acc": list(share_interval(right.count(True), len(right)))}
        report["candidates"] = {name: numbers}
    told = [
        f"{NAMES.get(name, name)}: {with_interval(numbers['acc'])} of {count(len(rows), 'row')} right."
    ]
    if len(rows) < LEAST_ROWS:
        told.append("So few rows prove nothing.")
    report["sentence"] = " ".join([*told, *never_right(report)])
    return report


def true_answers(rows: list[Row], spec: dict, column: str) -> list[str]:
    """The answer in a column of each row. Raises UsageError if one is missing."""
    true = []
    for row in rows:
        row = open_turns(row, spec["template"])
        if not str(row.get(column, "")).strip():
            there = ", ".join(map(repr, row))
            missing = f"no answer in column {column!r} (of {there})"
            raise UsageError(f"{row.where}: {missing}; see --answer-column")
        true.append(true_answer(row, column, spec["labels"]))
    return true
