"""`effect`: does IA2 → SFT beat SFT, and SFT begun again? The paper's claims, with tests, on toy and real tasks.

On one's own model and rows it is `ia2mini run`; here several tasks at several N are put together.
"""

import math
from dataclasses import replace
from pathlib import Path
from statistics import fmean

from ia2mini import UsageError
from ia2mini.cli.main import progress
from ia2mini.engine.options import Options
from ia2mini.report.summary import average, grouped, paired
from ia2mini.study.study import compare
from ia2mini.engine.subject import Subject
from ia2mini.tasks import Task, custom_task, find_task

from .report import Line, Result, difference

TASKS = {
    "classification": ("toy-mood", "toy-topic", "toy-mood-flip", "toy-mood-remap"),
    "sums": ("toy-sums", "toy-sums-short"),
    "relations": (),  # the files of a folder
}
METHODS = ("base", "icl", "sft", "sft-sft", "ia2", "ia2-sft")
RELATION, HELD = "Q: {text}\nA:", 100  # prompt of a relation's rows; how many of them are evaluation rows


def tasks_of(part: str, data: Path | None) -> list[Task]:
    """The tasks of a part; relations are the JSONL files with text and answer in `data`/relations."""
    if part != "relations":
        return [find_task(task) for task in TASKS[part]]
    if not (files := sorted((data / "relations").glob("*.jsonl")) if data else []):
        raise UsageError("relations: name the folder that holds relations/*.jsonl with --data-dir or $IA2MINI_DATA")
    return [replace(custom_task(file, "text", "answer", RELATION), held=HELD) for file in files]


def effect(subject: Subject, options: Options, part: str, data: Path | None = None) -> Result:
    """What IA2 brings on toy tasks ("classification", "sums") or real ones ("relations").

    Goes on where an interrupted call was.
    """
    rates = options.rates_for(subject.name, options.adapters[0].adapter)
    rates = f"rates {', '.join(f'{rate:g}' for rate in rates)} chosen by dev loss"
    about = f"{subject.name}: {options.sets} sets, {options.eval_rows} evaluation rows, {rates}"
    result = Result("effect", f"{about}; gains in points of accuracy, paired by task and set", [])
    document, kept = compare(tasks_of(part, data), subject, options, Path("runs"), bar=progress)
    cells = [cell for cell in document["cells"] if cell["selected_by"] != "eval"]
    for n in options.n:
        compared(result, part, [cell for cell in cells if cell["n"] == n])
        overlaps: dict[tuple, list[float]] = {}
        for found in (found for found in document["overlap"] if found["n"] == n):
            overlaps.setdefault(tuple(found["methods"]), []).append(found["mean"])
        for (one, other), values in overlaps.items():
            result.ratios[f"{part}, N = {n}: subspace overlap {one} with {other}"] = fmean(values)
    result.remarks.append(f"{part}: {kept}, {sum(document['seconds'].values()):.0f} s in all")
    return result


def compared(result: Result, part: str, cells: list[dict]) -> None:
    """What `part` at one N says: all methods, the gain of IA2 → SFT over tasks and on each, likeness to ICL."""
    for ood in sorted({cell["ood"] for cell in cells}):
        mine = [cell for cell in cells if cell["ood"] == ood]
        where = f", N = {cells[0]['n']}{', out of distribution' if ood else ''}"
        rows = average(mine)
        listed(result, part + where, rows)
        for metric, factor, form in (("acc", 100, ".1f"), ("ece", 1, ".3f")):
            for control in ("sft", "sft-sft", "ia2"):
                gain = paired(mine, metric, "ia2-sft", control)
                if gain is not None:
                    said = f"{metric} {difference(gain, factor, form)}"
                    result.remarks.append(f"{part}{where}: ia2-sft against {control}: {said}")
                    result.ratios[f"{part}{where}: {metric} gain over {control}"] = factor * gain.mean
        if ood:
            continue
        alike = sorted((row["asim_mean"], row["method"]) for row in rows if row["method"] != "icl")
        order = " < ".join(f"{method} {asim:.2f}" for asim, method in alike)
        result.remarks.append(f"{part}{where}: asim with ICL {order}")
        for (task,), each in grouped(mine, "task").items():
            listed(result, task + where, average(each))
            gain, lead = paired(each, "acc"), paired(each, "acc", "icl", "sft")
            if gain and lead:
                numbers = {"gain": gain.mean, "low": gain.low, "high": gain.high, "lead": lead.mean}
                rates = {f"points {name}": 100 * value for name, value in numbers.items()}
                note = "no test" if math.isnan(gain.p) else f"p {gain.p:.2g}"
                result.lines.append(Line(task + where, "ia2-sft over sft", rates=rates, note=note))


def listed(result: Result, what: str, rows: list[dict]) -> None:
    for row in rows:
        rates = {"% accuracy": 100 * row["acc_mean"], "asim": row["asim_mean"]}
        rates |= {} if row["ece_mean"] is None else {"ECE": row["ece_mean"]}
        result.lines.append(Line(what, row["method"], rates=rates))
