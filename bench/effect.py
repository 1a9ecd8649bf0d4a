"""`effect`: does IA2 → SFT beat SFT, and SFT begun again, on the embedded model? The paper's claims, with tests."""

from dataclasses import replace
from pathlib import Path
from statistics import fmean

from ia2mini.cli import progress
from ia2mini.options import Options
from ia2mini.report.summary import average, interval, paired
from ia2mini.study import compare
from ia2mini.subject import open_subject
from ia2mini.tasks import find_task

from .report import Line, Result

TASKS = {
    "classification": ("toy-mood", "toy-topic", "toy-mood-flip", "toy-mood-remap"),
    "sums": ("toy-sums", "toy-sums-short"),
}
SIZES = (2, 4, 8, 16)
METHODS = ("base", "icl", "sft", "sft-sft", "ia2", "ia2-sft")


def effect(
    model: str = "tiny",
    sizes: tuple[int, ...] = SIZES,
    sets: int = 10,
    part: str = "all",
    eval_rows: int = 500,
    sum_rows: int = 100,
) -> Result:
    """All toy tasks at every N, or the `part` "classification" or "sums" (on `sum_rows` rows).

    Goes on where an interrupted call was.
    """
    subject = replace(open_subject(model, "cpu", None, None), name="tiny")  # and so with its rates
    about = f"{model}: {sets} sets, {eval_rows} evaluation rows (sums {sum_rows}), rates chosen by dev loss"
    result = Result("effect", f"{about}; gains in points of accuracy, paired by task and set", [])
    for name, rows in (("classification", eval_rows), ("sums", sum_rows)):
        if part in ("all", name):
            options = Options(n=sizes, methods=METHODS, sets=sets, eval_rows=rows)
            tasks = [find_task(task) for task in TASKS[name]]
            document, kept = compare(tasks, subject, options, Path("runs"), bar=progress)
            for n in sizes:
                compared(result, name, document, n)
            result.remarks.append(f"{name}: {kept}")
    return result


def compared(result: Result, part: str, document: dict, n: int) -> None:
    """What `part` at N says: means of all methods, the gain of IA2 → SFT, likeness to ICL and overlaps."""
    for ood in (False, True):
        what = f"{part}, N = {n}{', out of distribution' if ood else ''}"
        cells = [cell for cell in document["cells"] if (cell["n"], cell["ood"]) == (n, ood)]
        rows = average(cells)
        for row in rows:
            rates = {"% accuracy": 100 * row["acc_mean"]}
            rates |= {} if row["ece_mean"] is None else {"ECE": row["ece_mean"]}
            result.lines.append(Line(what, row["method"], rates=rates))
        for metric, factor, form in (("acc", 100, ".1f"), ("ece", 1, ".3f")):
            for control in ("sft", "sft-sft"):
                gain = paired(cells, metric, "ia2-sft", control)
                if gain is not None:
                    mean = factor * gain.mean
                    said = f"{metric} {mean:+{form}}{interval(gain, factor, form)}, {gain.pairs} pairs"
                    result.remarks.append(f"{what}: ia2-sft against {control}: {said}")
                    result.ratios[f"{what}: {metric} gain over {control}"] = mean
        if not ood:
            alike = sorted((row["asim_mean"], row["method"]) for row in rows if row["method"] != "icl")
            order = " < ".join(f"{method} {asim:.2f}" for asim, method in alike)
            result.remarks.append(f"{what}: asim with ICL {order}")
    overlaps: dict[tuple, list[float]] = {}
    for found in (found for found in document["overlap"] if found["n"] == n):
        overlaps.setdefault(tuple(found["methods"]), []).append(found["mean"])
    for (one, other), values in overlaps.items():
        result.ratios[f"{part}, N = {n}: subspace overlap {one} with {other}"] = fmean(values)
