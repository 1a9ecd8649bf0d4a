"""From the records of runs to the cells of the tables: the choice of a rate, means and deviations, the gain."""

import math
import re
from statistics import fmean

from ..engine.intervals import LEAST_ROWS, PairedTest, paired_test
from ..engine.options import METHOD_NAMES, method_name
from ..engine.select import grouped
from ..files import plural
from ..study.table import METRICS, deviation

CHOICES = {
    "dev": "rate by lowest dev loss",
    "eval": "rate by accuracy on the evaluation rows, as in the paper",
}


def parts(document: dict) -> list[dict]:
    """What one table shows: each model, N, adapter and choice of the rate, its `cells` below those of base and ICL.

    Base and ICL are left out on the evaluations that only another adapter or choice has.
    """
    places = {method: place for place, method in enumerate(METHOD_NAMES)}  # unknown ones: last
    cells = sorted(document["cells"], key=lambda cell: places.get(cell["method"], len(places)))
    trained = [cell for cell in cells if cell["selected_by"]]
    untrained = grouped([cell for cell in cells if not cell["selected_by"]], "model", "n")
    by_size = grouped(trained, "model", "n")
    found = []
    for about, own in grouped(trained or cells, "model", "n", "adapter", "selected_by").items():
        model, n, kind, by = about
        elsewhere = evaluations(by_size.get((model, n), [])) - evaluations(own)
        mine = []
        for cell in untrained.get((model, n), []):
            if (cell["task"], cell["eval"]) not in elsewhere:
                mine.append(cell)
        if trained:
            mine += own
        part = {"model": model, "n": n, "adapter": kind, "by": by}
        found.append({**part, "cells": mine, "title": title(mine, n, by)})
    return found


def views(document: dict):
    """The data of the figures for each model, adapter and choice of the learning rate.

    They are its parts, and the cells and overlaps at the largest N.
    """
    found = grouped(parts(document), "by", "adapter", "model")
    choices, kinds, models = (list(dict.fromkeys(values)) for values in zip(*found))
    for (by, kind, model), mine in found.items():
        mine = sorted(mine, key=lambda part: part["n"])
        cells = mine[-1]["cells"]
        saved = []
        for record in document.get("overlap") or []:
            about = record["n"], record.get("adapter", kind), record.get("model", model)
            if by == choices[0] and about == (mine[-1]["n"], kind, model):
                saved.append(record)
        suffix = ""
        if len(models) > 1:
            suffix += f"-{dashed(model)}"
        if len(kinds) > 1:
            suffix += f"-{dashed(kind or '')}"
        if len(choices) > 1:
            suffix += f"-{by}"
        sizes = ", ".join(str(part["n"]) for part in mine)
        heading = title(cells, sizes, by)
        yield {"suffix": suffix, "parts": mine, "cells": cells, "overlap": saved, "title": heading}


def evaluations(cells: list[dict]) -> set[tuple[str, str]]:
    return {(c["task"], c["eval"]) for c in cells}


def title(cells: list[dict], n: int | str, by: str | None) -> str:
    """Model, task, N, adapter, sets and the choice of the rate of a part, in one line."""
    tasks = list(dict.fromkeys(cell["task"] for cell in cells))
    adapters = [cell["adapter"] for cell in cells if cell["adapter"]]
    about = [cells[0]["model"]]
    about.append(", ".join(tasks) if len(tasks) < 3 else f"{len(tasks)} tasks")
    about.append(f"N = {n}")
    about += adapters[:1]
    about.append(plural(cells[0]["sets"], "set"))
    if by in CHOICES:
        about.append(CHOICES[by])
    return " · ".join(about)


def dashed(name: str) -> str:
    """A model's or an adapter's name for file names."""
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
        row = {"method": method, "evaluations": count_of_evaluations, "rate": None, "beta": None}
        rates = list(grouped(mine, "rate", "beta"))
        if len(rates) == 1:
            row["rate"], row["beta"] = rates[0]
        for metric in METRICS:
            known = [cell for cell in mine if cell.get(f"{metric}_mean") is not None]
            means = [cell[f"{metric}_mean"] for cell in known]
            row[f"{metric}_mean"] = fmean(means) if means else None
            row[f"{metric}_std"] = deviation(set_means(known, metric) or [])
        rows.append(row)
    return rows


def set_means(cells: list[dict], metric: str) -> list[float] | None:
    """Each set's mean over the evaluations of one method; None where a value is unknown, or not all have each set."""
    of_evaluations = [cell.get(metric, []) for cell in cells]
    if len({len(values) for values in of_evaluations}) > 1:
        return None
    means = []
    for values in zip(*of_evaluations):
        if None in values:
            return None
        means.append(fmean(values))
    return means


def paired(
    cells: list[dict], metric: str, method: str = "ia2-sft", against: str = "sft"
) -> PairedTest | None:
    """`method` minus `against`, paired over tasks and sets; None where they share none, or a value is unknown.

    A pair is a set of a task: of each method the mean over the task's evaluations that both methods have.
    """
    mine = [cell for cell in cells if cell["method"] == method]
    others = [cell for cell in cells if cell["method"] == against]
    shared = evaluations(mine) & evaluations(others)
    compared = [cell for cell in [*mine, *others] if (cell["task"], cell["eval"]) in shared]
    by_task = grouped(compared, "task", "method")
    first: list[float] = []
    second: list[float] = []
    for task in dict.fromkeys(cell["task"] for cell in compared):
        ours = set_means(by_task[task, method], metric)
        theirs = set_means(by_task[task, against], metric)
        if ours is None or theirs is None or len(ours) != len(theirs):
            return None
        first += ours
        second += theirs
    return paired_test(first, second) if first else None


def verdict(cells: list[dict]) -> list[str]:
    """Sentences on the gain of IA2→SFT with intervals, and on whether ICL is worse than SFT."""
    lines = gain_over(cells, "ia2-sft", "sft")
    if not lines:
        return []
    gain = paired(cells, "acc")
    if not gain.p < 0.05:  # also where there was nothing to test
        lines.append("The difference in accuracy may be chance; more --sets tell.")
    elif gain.mean < 0:
        lines.append("IA2→SFT is worse than SFT here: take SFT.")
    for method in dict.fromkeys(cell["method"] for cell in cells):
        is_function = method.removesuffix("-sft").isidentifier()
        if method not in METHOD_NAMES and is_function:  # with a loss of one's own
            lines += gain_over(cells, method, "ia2-sft" if method.endswith("-sft") else "ia2")
    lead = paired(cells, "acc", "icl", "sft")
    if lead is not None and lead.mean < 0:
        less = "Demonstrations teach this model less than SFT does"
        lines.append(f"{less} (ICL {100 * lead.mean:+.1f} points): IA2 has little to pass on.")
    return lines


def gain_over(cells: list[dict], method: str, rival: str) -> list[str]:
    """A sentence on a method beside a rival: the gain in accuracy and, of labels, in ECE, and the number of pairs."""
    gain = paired(cells, "acc", method, rival)
    if gain is None:
        return []
    points = f"{100 * gain.mean:+.1f} points{interval(gain, 100, '.1f')}"
    line = f"{method_name(method)} against {method_name(rival)}: accuracy {points}"
    calibration = paired(cells, "ece", method, rival)
    if calibration is not None:
        line += f"; ECE {calibration.mean:+.2f}{interval(calibration, 1, '.2f')}"
    pairs = f"{plural(gain.pairs, 'pair')} of task and set"
    if gain.pairs < LEAST_ROWS:
        return [f"{line}; {pairs}: too few for a p-value or an interval."]
    return [f"{line}; {pairs}, not independent: those of a task share their evaluation rows."]


def best(cells: list[dict]) -> str:
    """The most accurate method."""
    rows = [row for row in average(cells) if row["acc_mean"] is not None]
    if not rows:
        return "No method has a result on every evaluation."
    first = max(rows, key=lambda row: row["acc_mean"])
    accuracy = f"{100 * first['acc_mean']:.1f} %"
    seen = plural(first["evaluations"], "evaluation")
    return f"{method_name(first['method'])} is right most often: {accuracy}, mean of {seen}."


def interval(test: PairedTest, factor: float, form: str) -> str:
    """ " (95 % -1.0 to +3.0, p = 0.2, d = 0.4)"; nothing of too few pairs."""
    if test.pairs < LEAST_ROWS:
        return ""
    if math.isnan(test.p):
        return " (equal in all pairs: no test)"
    ends = f"95 % {factor * test.low:+{form}} to {factor * test.high:+{form}}"
    return f" ({ends}, p = {test.p:.2g}, d = {test.d:.2g})"
