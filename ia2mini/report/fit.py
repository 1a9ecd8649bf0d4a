"""The report of `fit` and `score`: a table for the terminal and an HTML page."""

import math
from collections.abc import Sequence
from operator import itemgetter
from pathlib import Path
from textwrap import fill

from ..engine.intervals import LEAST_ROWS
from ..files import json_line, plural, write_text
from ..fitting.predictor import Predictor
from ..fitting.sentence import outcome, with_interval
from ..tasks.rows import Row, missing_part, prompt_of
from ..tasks.turns import open_turns
from .card import card
from .charts import candidates_of, draw_candidates
from .drawing import image_of, styled
from .markup import details, escaped, figure, first_screen, html_page, lines, table, table_of
from .tables import aligned

HEADS = {
    "acc": "accuracy (%)",
    "macro_f1": "macro-F1",
    "ece": "ECE",
    "ece_null": "(null)",
    "brier": "Brier",
    "nll": "NLL",
}
WIDE = ("brier", "nll")  # their intervals do not fit into a terminal beside the others
TERMINAL_WIDTH = 80  # characters
NO_BREAK = "\ue000"  # for a while in place of a blank at which no line breaks
AGREES = "as with the context (%)"
SUSPECTS = "suspects.jsonl"
MATRIX = 20  # up to this many labels the page shows the confusion matrix
SUSPECT_COLUMNS = {  # heading: field
    "row": "row",
    "prompt": "prompt",
    "answer": "true",
    "said when held out": "said",
    "confidence": "confidence",
    "probability of the answer": "probability",
}
WRONG_COLUMNS = {"prompt": "prompt", "answer": "true", "said": "said", "confidence": "confidence"}
INTERVALS = "95 % intervals: Clopper-Pearson for shares, Student's t for means"


def fit_table(report: dict, told: tuple[str, ...] = ()) -> str:
    """The report for a terminal of 80 columns, without remarks that have been `told` already."""
    points = WIDE if has_labels(report) else ()
    table = aligned(measured(report, points))
    remarks = [remark for remark in report["remarks"] if remark not in told]
    said = wrapped(report["sentence"])
    return "\n".join([about(report), *table, *notes(report), "", said, *remarks])


def wrapped(text: str) -> str:
    """A text in lines that a terminal does not break."""
    kept = text.replace(" %", f"{NO_BREAK}%")
    broken = fill(kept, TERMINAL_WIDTH, break_long_words=False, break_on_hyphens=False)
    return broken.replace(NO_BREAK, " ")


def has_labels(report: dict) -> bool:
    """Whether the answers are labels, not text."""
    return "macro_f1" in next(iter(report["candidates"].values()))


def notes(report: dict) -> list[str]:
    """The legend of the table."""
    said = [INTERVALS]
    if report["rows"] < LEAST_ROWS:
        said = [f"no intervals: below {LEAST_ROWS} rows"]
    if has_labels(report):
        said.append("accuracy: the label with the highest probability is the row's own")
        said.append("(null): the ECE that perfect calibration would show")
    if report["chosen"]:
        star = "nothing is shipped, the base stays" if report["chosen"] == "base" else "shipped"
        _, as_shipped, _ = candidates_of(report)[-1]
        choice = "chosen anew without each fold's rows; quote this number"
        said += [f"*: {star}", f"{as_shipped}: {choice}"]
    return said


def measured(report: dict, points: Sequence[str] = ()) -> list[list[str]]:
    """The table of candidates: headings, one line for each with the chosen one marked, and "as shipped".

    `points`: the measures that are shown without their intervals.
    """
    candidates = candidates_of(report)
    heads = dict(HEADS)
    if "kl" in report:
        heads["acc"] = AGREES
        heads["nll"] = "KL"
    known = []
    for name in HEADS:
        if any(name in numbers for _, _, numbers in candidates):
            known.append(name)
    rows = [["", *map(heads.get, known)]]
    for method, name, numbers in candidates:
        entries = []
        for column in known:
            value = numbers.get(column)
            if column in points and value is not None:
                value = value[0]
            entries.append(measure_with_interval(value, column))
        mark = " *" if method == report["chosen"] else ""
        rows.append([name + mark, *entries])
    return rows


def measure_with_interval(value, name: str) -> str:
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


def write_fit_report(predictor: Predictor, folder: Path, command: str, rows: Sequence[Row]) -> None:
    """Write report.html, held_out.jsonl (every row with its held-out answer) and the model card.

    suspects.jsonl, if there are any, has the rows to check first; `rows` (the fitted ones) give their places.
    """
    report = predictor.report
    write_jsonl(folder / "held_out.jsonl", report["held_out"])
    odd = suspects(report, places_of(rows, predictor.spec["template"]))
    if odd:
        write_jsonl(folder / SUSPECTS, odd)
    else:
        (folder / SUSPECTS).unlink(missing_ok=True)  # of an earlier fit
    write_text(folder / "report.html", fit_page(report, command, odd))
    write_text(folder / "README.md", card(predictor, folder, command))


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
    found = []
    for row in held:
        if report["chosen"] == "base" or "probabilities" not in row or row["right"]:
            continue
        about = {"row": places.get(row["prompt"])}
        about.update({name: row[name] for name in ("prompt", "true", "said", "confidence")})
        about["probability"] = row["probabilities"][row["true"]]
        found.append(about)
    found.sort(key=itemgetter("probability"))
    return found[: math.ceil(len(held) / 10)]


def fit_page(report: dict, command: str, odd: Sequence[dict] = ()) -> str:
    """The report as one HTML page: a sentence, a table and a figure, the rest folded; `odd`: what `suspects` found."""
    heads, *rows = measured(report)
    tokens = report["tokens"]
    price = f"A query costs {tokens['query']:.0f} tokens; with demonstrations {tokens['icl']:.0f}."
    meaning = [*notes(report), *calibration(report), price]
    suspicious = []
    if odd:
        title = f"{plural(len(odd), 'row')} whose answer may be wrong, the likeliest mistake first"
        suspicious.append(table_of(title, odd, SUSPECT_COLUMNS))
    made = [
        f"<pre>{escaped(command)}</pre>",
        lines([f"{report['seconds']:.0f} s in all."]),
    ]
    body = [
        first_screen([table("Held-out rows", heads, rows, "means"), *candidates_figure(report)]),
        details("What the columns mean, calibration, tokens", [lines(meaning)]),
        details("How the rows were read, and warnings", [lines(report["remarks"])]),
        details("Rows whose answer may be wrong", suspicious),
        details(
            "Confusion matrix, and rows answered wrong", [*by_label(report), wrong_answers(report)]
        ),
        details("How this was made", made),
    ]
    return html_page(about(report), lines([report["sentence"]]), body)


def candidates_figure(report: dict) -> list[str]:
    """The candidates' held-out accuracy as a figure; nothing without matplotlib."""
    try:
        style = styled()
    except ImportError:
        return []
    with style:
        image = image_of(draw_candidates(report), "png")
    said = []
    for _, name, numbers in candidates_of(report):
        said.append(f"{name} {with_interval(numbers['acc'])}")
    caption = "Every row was answered by what was trained without it."
    return [figure(image, "png", f"{outcome(report)} Candidates: {', '.join(said)}.", caption)]


def by_label(report: dict) -> list[str]:
    """Precision and recall of each label, and the confusion matrix."""
    if "classes" not in report:
        return []
    labels = [one["label"] for one in report["classes"]]
    each = []
    for one in report["classes"]:
        shares = [percent_or_dash(one[name]) for name in ("precision", "recall")]
        each.append([one["label"], one["rows"], *shares])
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
    wrong = [row for row in report["held_out"] if not row["right"]]
    title = f"{plural(len(wrong), 'held-out row')} answered wrong"
    return table_of(title, wrong, WRONG_COLUMNS) if wrong else lines([title])


def calibration(report: dict) -> list[str]:
    """The shipped temperature and its effect."""
    if not report.get("calibration"):
        return []
    before, after = report["calibration"]
    verb = "would have been" if report["temperature"] == 1 else "is"
    losses = f"the NLL {verb} {after:.2f} instead of {before:.2f}"
    effect = f"with temperatures fitted on the other folds' rows {losses}"
    if report["temperature"] == 1:
        return [f"No temperature: {effect}."]
    chosen = report["candidates"][report["chosen"]]
    errors = f"ECE {chosen['ece_without_temperature']:.2f} without, {chosen['ece']:.2f} with it"
    return [f"One temperature, {report['temperature']:.2f}: {effect} ({errors})."]


def percent_or_dash(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.0f} %"


def about(report: dict) -> str:
    """Rows, model and folds in one line."""
    said = [report["name"], plural(report["rows"], "row"), report["model"]]
    if report["folds"]:
        said.append(f"held out in {plural(report['folds'], 'fold')}")
    return " · ".join(said)
