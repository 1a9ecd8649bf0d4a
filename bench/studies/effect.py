"""`effect`: does IA2 → SFT beat SFT, and SFT begun again? The paper's claims, with tests, on toy and real tasks.

On one's own model and rows it is `ia2mini run`; here several tasks at several N are put together.
"""

import math
from pathlib import Path
from statistics import fmean

from ia2mini.engine.options import Options
from ia2mini.engine.progress import progress
from ia2mini.engine.select import grouped
from ia2mini.engine.subject import Subject
from ia2mini.report.summary import average, paired
from ia2mini.study.study import compare
from ia2mini.tasks import Task

from ..report import Line, Result, difference
from .reopened import RUNS
from .tasks import tasks_of

METHODS = ("base", "icl", "sft", "sft-sft", "ia2", "ia2-sft")


def about(subject: Subject, options: Options, part: str) -> str:
    """What a study was made of, in words."""
    return f"{subject.name}, {part}: {options.sets} sets, {options.eval_rows} evaluation rows"


def studied(
    result: Result, what: str, tasks: list[Task], subject: Subject, options: Options, **how
) -> dict:
    """The document of a study, which goes on where it was; where it is, and its seconds, are a remark on `what`."""
    document, folder = compare(tasks, subject, options, RUNS, bar=progress, **how)
    seconds = sum(document["seconds"].values())
    result.remarks.append(f"{what}: {folder}, {seconds:.0f} s in all")
    return document


def effect(subject: Subject, options: Options, part: str, data: Path | None = None) -> Result:
    """What IA2 brings on toy tasks ("classification", "sums") or real ones ("relations").

    Goes on where an interrupted call was.
    """
    rates = ", ".join(f"{rate:g}" for rate in options.rates_for(subject.name, options.adapter))
    sizes = f"{subject.name}: {options.sets} sets, {options.eval_rows} evaluation rows"
    said = f"{sizes}, rates {rates} chosen by dev loss; gains in points of accuracy, paired by task and set"
    result = Result("effect", said, [])
    document = studied(result, part, tasks_of(part, data), subject, options)
    cells = [cell for cell in document["cells"] if cell["selected_by"] != "eval"]
    for n in options.n:
        compared(result, part, [cell for cell in cells if cell["n"] == n])
        overlap(
            result, f"{part}, N = {n}", [found for found in document["overlap"] if found["n"] == n]
        )
    return result


def overlap(result: Result, where: str, found: list[dict]) -> None:
    """What the subspaces of two methods have in common, averaged over tasks."""
    pairs: dict[tuple, list[float]] = {}
    for record in found:
        pairs.setdefault(tuple(record["methods"]), []).append(record["mean"])
    for (one, other), values in pairs.items():
        result.ratios[f"{where}: subspace overlap {one} with {other}"] = fmean(values)


def compared(result: Result, part: str, cells: list[dict]) -> None:
    """What `part` at one N says: all methods, the gain of IA2 → SFT over tasks and on each, likeness to ICL."""
    for ood in sorted({cell["ood"] for cell in cells}):
        mine = [cell for cell in cells if cell["ood"] == ood]
        where = f", N = {cells[0]['n']}{', out of distribution' if ood else ''}"
        rows = average(mine)
        listed(result, part + where, rows)
        gains(result, part + where, mine)
        if not ood:
            likeness(result, part + where, rows)
            for (task,), each in grouped(mine, "task").items():
                listed(result, task + where, average(each))
                gain_of_task(result, task + where, each)


def listed(result: Result, what: str, rows: list[dict]) -> None:
    for row in rows:
        rates = {"% accuracy": 100 * row["acc_mean"], "asim": row["asim_mean"]}
        if row["ece_mean"] is not None:
            rates["ECE"] = row["ece_mean"]
        result.lines.append(Line(what, row["method"], rates=rates))


def gains(result: Result, where: str, cells: list[dict]) -> None:
    """IA2 → SFT against its controls, over all tasks."""
    for metric, factor, form in (("acc", 100, ".1f"), ("ece", 1, ".3f")):
        for control in ("sft", "sft-sft", "ia2"):
            gain = paired(cells, metric, "ia2-sft", control)
            if gain is not None:
                said = difference(gain, factor, form)
                result.remarks.append(f"{where}: ia2-sft against {control}: {metric} {said}")
                result.ratios[f"{where}: {metric} gain over {control}"] = factor * gain.mean


def likeness(result: Result, where: str, rows: list[dict]) -> None:
    """The methods by how alike their attention outputs are to ICL's."""
    alike = sorted((row["asim_mean"], row["method"]) for row in rows if row["method"] != "icl")
    order = " < ".join(f"{method} {asim:.2f}" for asim, method in alike)
    result.remarks.append(f"{where}: asim with ICL {order}")


def gain_of_task(result: Result, where: str, cells: list[dict]) -> None:
    """IA2 → SFT against SFT on one task, and how far ICL is ahead of SFT."""
    gain = paired(cells, "acc")
    lead = paired(cells, "acc", "icl", "sft")
    if gain and lead:
        numbers = {"gain": gain.mean, "low": gain.low, "high": gain.high, "lead": lead.mean}
        rates = {f"points {name}": 100 * value for name, value in numbers.items()}
        note = "no test" if math.isnan(gain.p) else f"p {gain.p:.2g}"
        result.lines.append(Line(where, "ia2-sft over sft", rates=rates, note=note))
