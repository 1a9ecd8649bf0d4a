"""From the records of runs to the cells of the tables: the choice of a rate, means and deviations, the gain."""

import math
import re
from statistics import fmean

from ..engine.options import LABELS
from ..engine.select import grouped
from ..files import count
from ..intervals import LEAST_ROWS
from ..metrics import PairedTest, paired_test
from ..study.table import METRICS, deviation

CHOICES = {
    "dev": "rate by lowest dev loss",
    "eval": "rate by accuracy on the evaluation rows, as in the paper",
}


def parts(document: dict) -> list[dict]:
    """What one table shows: each model, N, adapter and choice of rate, its `cells`."""
    rank = {method: i for i, method in enumerate(LABELS)}
    cells = sorted(document["cells"], key=lambda cell: rank.get(cell["method"], len(rank)))
    trained = [c for c in cells if c["selected_by"]] or [c | {"selected_by": None} for c in cells]
    groups = grouped(cells, "model", "n")
    found = []
    for (model, n, kind, by), own in grouped(
        trained, "model", "n", "adapter", "selected_by"
    ).items():
        others = evaluations(
            [c for c in trained if (c["model"], c["n"]) == (model, n)]
        ) - evaluations(own)
        mine = []
        for c in groups[model, n]:
            belongs = c["selected_by"] in (by, None) and c["adapter"] in (kind, None)
            # the base and ICL of what this adapter has not
            if belongs and (c["task"], c["eval"]) not in others:
                mine.append(c)
        about = {"model": model, "n": n, "adapter": kind, "by": by}
        found.append(about | {"cells": mine, "title": title(mine, by)})
    return found


def evaluations(cells: list[dict]) -> set[tuple[str, str]]:
    return {(c["task"], c["eval"]) for c in cells}


def title(cells: list[dict], by: str | None) -> str:
    """Model, task, N, adapter, sets and the choice of the rate of a part, in one line."""
    tasks = list(dict.fromkeys(c["task"] for c in cells))
    adapter = next((c["adapter"] for c in cells if c["adapter"]), None)
    about = [
        cells[0]["model"],
        ", ".join(tasks) if len(tasks) < 3 else f"{len(tasks)} tasks",
        f"N = {cells[0]['n']}",
    ]
    return " · ".join(
        [*about, *filter(None, [adapter, count(cells[0]["sets"], "set"), CHOICES.get(by)])]
    )


def dashed(name: str) -> str:
    """A model's or an adapter's name in names of files."""
    return re.sub(r"[^\w.-]", "-", name)


def average(cells: list[dict]) -> list[dict]:
    """A row a method, averaged over the evaluations, of the methods that every evaluation has.

    The deviation is that of the sets: each set's mean over the evaluations is one value.
    """
    rows = []
    count_of_evaluations = len(evaluations(cells))
    for (method,), mine in grouped(cells, "method").items():
        if len(mine) != count_of_evaluations:
            continue
        row = {"method": method, "evaluations": count_of_evaluations}
        rates = list(grouped(mine, "rate", "beta"))
        row["rate"], row["beta"] = rates[0] if len(rates) == 1 else (None, None)
        for metric in METRICS:
            means = [
                cell[f"{metric}_mean"] for cell in mine if cell.get(f"{metric}_mean") is not None
            ]
            row[f"{metric}_mean"] = fmean(means) if means else None
            row[f"{metric}_std"] = deviation(over_evaluations(mine, metric))
        rows.append(row)
    return rows


def over_evaluations(cells: list[dict], metric: str) -> list[float]:
    """Each set's mean over the evaluations of one method; none where a set has no value, or not all have each set."""
    known = [cell.get(metric, []) for cell in cells if cell.get(f"{metric}_mean") is not None]
    if len({len(values) for values in known}) != 1:
        return []
    sets = list(zip(*known))
    return [] if any(None in values for values in sets) else [fmean(values) for values in sets]


def paired(
    cells: list[dict], metric: str, method: str = "ia2-sft", against: str = "sft"
) -> PairedTest | None:
    """`method` minus `against`, paired over tasks and sets, each averaged over its evaluations; None without both."""

    def values(name: str) -> list[float]:
        tasks = grouped([c for c in cells if c["method"] == name], "task").values()
        sets = [values for mine in tasks for values in zip(*(c[metric] for c in mine))]
        return [] if any(None in values for values in sets) else list(map(fmean, sets))

    ours, theirs = values(method), values(against)
    return paired_test(ours, theirs) if ours and len(ours) == len(theirs) else None


def verdict(cells: list[dict]) -> list[str]:
    """What IA2 before SFT brought, with intervals, and where demonstrations teach the model less than SFT: in words."""
    gain = paired(cells, "acc")
    if gain is None:
        return []
    line = (
        f"IA2→SFT against SFT: accuracy {100 * gain.mean:+.1f} points{interval(gain, 100, '.1f')}"
    )
    calibration = paired(cells, "ece")
    if calibration is not None:
        line += f"; ECE {calibration.mean:+.2f}{interval(calibration, 1, '.2f')}"
    lines = [f"{line}; {pairs_of(gain)}"]
    if not gain.p < 0.05:  # also where there was nothing to test
        lines.append("The difference in accuracy may be chance; more --sets tell.")
    elif gain.mean < 0:
        lines.append("IA2→SFT is worse than SFT here: take SFT.")
    lead = paired(cells, "acc", "icl", "sft")
    if lead is not None and lead.mean < 0:
        less = "Demonstrations teach this model less than SFT does"
        lines.append(f"{less} (ICL {100 * lead.mean:+.1f} points): IA2 has little to pass on.")
    return lines


def pairs_of(test: PairedTest) -> str:
    """ "20 pairs of task and set, not independent: …", or that they are too few for a test."""
    pairs = f"{count(test.pairs, 'pair')} of task and set"
    if test.pairs < LEAST_ROWS:
        return f"{pairs}: too few for a p-value or an interval"
    return f"{pairs}, not independent: those of a task share their evaluation rows"


def interval(test: PairedTest, factor: float, form: str) -> str:
    """ " (95 % -1.0 to +3.0, p = 0.2, d = 0.4)"; nothing of too few pairs."""
    if test.pairs < LEAST_ROWS:
        return ""
    if math.isnan(test.p):
        return " (equal in all pairs: no test)"
    ends = f"95 % {factor * test.low:+{form}} to {factor * test.high:+{form}}"
    return f" ({ends}, p = {test.p:.2g}, d = {test.d:.2g})"
