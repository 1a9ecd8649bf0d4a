"""`causes`: what in the teacher's context does the work, and which of the things that one may match carries it?

The teacher sees the true demonstrations, these with their answers shuffled, another task's, or none. Matched are its
attention outputs (IA2), its residual stream, its distribution over the vocabulary, or the tokens of its responses; each
is followed by SFT or not. Controls: SFT, and SFT begun again.
"""

from dataclasses import replace
from pathlib import Path
from statistics import fmean

from ia2mini.cli import progress
from ia2mini.options import Options
from ia2mini.report.summary import average, grouped, interval, paired
from ia2mini.study import compare
from ia2mini.subject import Subject

from .effect import tasks_of
from .report import Line, Result

TEACHERS = ("true", "shuffled", "other", "none")
MATCHED = ("ia2", "hidden", "soft", "responses")
CONTROLS = ("base", "icl", "sft", "sft-sft")
CALIBRATION = {  # metric -> what it says
    "nll_labels": "NLL among the labels, as it is",
    "nll_dev": "the same with one temperature from the dev rows",
    "nll_oracle": "the same with the best temperature for the evaluation rows",
    "risk_coverage": "area under the risk-coverage curve",
    "smooth_ece": "smooth ECE",
    "ece": "ECE",
}


def causes(subject: Subject, options: Options, part: str, data: Path | None = None) -> Result:
    """The teacher's demonstrations × what is matched × followed by SFT or not, with paired tests over task and set."""
    about = f"{subject.name}, {part}: {options.sets} sets, {options.eval_rows} evaluation rows"
    result, cells, steps = Result("causes", f"{about}; rates chosen by dev loss", []), [], {}
    for teacher in TEACHERS:
        methods = [name for first in MATCHED for name in (first, f"{first}-sft")]
        methods = [*CONTROLS * (teacher == TEACHERS[0]), *methods]
        asked = replace(options, teacher=teacher, methods=tuple(methods))
        document, kept = compare(tasks_of(part, data), subject, asked, Path("runs"), bar=progress)
        for cell in document["cells"]:
            cells.append(cell | {"method": named(cell["method"], teacher)})
        for (method,), records in grouped(document["runs"], "method").items():
            steps[named(method, teacher)] = fmean(record["steps"] for record in records)
        result.remarks.append(f"teacher {teacher}: {kept}, {sum(document['seconds'].values()):.0f} s in all")
    for (n, ood), mine in grouped(cells, "n", "ood").items():
        where = f"{part}, N = {n}{', out of distribution' if ood else ''}"
        for row in average(mine):
            rates = {"% accuracy": 100 * row["acc_mean"], "steps": steps[row["method"]], "asim": row["asim_mean"]}
            rates |= {name: row[f"{name}_mean"] for name in CALIBRATION if row[f"{name}_mean"] is not None}
            result.lines.append(Line(where, row["method"], rates=rates))
        tests(result, where, mine)
    return result


def named(method: str, teacher: str) -> str:
    """A method's name in the matrix: with what its teacher sees, where it has one."""
    return method if method in CONTROLS else f"{method}, {teacher}"


def tests(result: Result, where: str, cells: list[dict]) -> None:
    """Paired differences: each way to SFT against SFT and SFT → SFT, each teacher against the true one, calibration."""

    def said(metric: str, method: str, against: str, factor: float, form: str) -> None:
        gain = paired(cells, metric, method, against)
        if gain is not None:
            mean = f"{factor * gain.mean:+{form}}{interval(gain, factor, form)}, {gain.pairs} pairs"
            result.remarks.append(f"{where}: {CALIBRATION.get(metric, metric)}: {method} against {against}: {mean}")

    for teacher in TEACHERS:
        for first in MATCHED:
            for against in ("sft", "sft-sft"):
                said("acc", f"{first}-sft, {teacher}", against, 100, ".1f")
            if teacher != TEACHERS[0]:
                said("acc", f"{first}-sft, {TEACHERS[0]}", f"{first}-sft, {teacher}", 100, ".1f")
    for first in MATCHED[1:]:
        said("acc", "ia2-sft, true", f"{first}-sft, true", 100, ".1f")
    for metric in CALIBRATION:
        for against in ("sft", "sft-sft", "soft-sft, true"):
            said(metric, "ia2-sft, true", against, 1, ".3f")
