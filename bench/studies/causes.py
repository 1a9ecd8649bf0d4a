"""`causes`: what in the teacher's context does the work, and which of the things that one may match carries it?

The teacher sees the true demonstrations, these with their answers shuffled, another task's, or none. Matched are its
attention outputs (by training, IA2, or in closed form, ridge), its residual stream, or its distribution over the
vocabulary; each is followed by SFT or not. Controls: SFT, and SFT begun again. Of what has learned from the true
demonstrations also: what stays when they are put back, what another task's demonstrations still teach, and what it has
cost.
"""

from collections.abc import Callable
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from statistics import fmean

from ia2mini.engine.intervals import paired_test
from ia2mini.engine.options import UNTRAINED, Options
from ia2mini.engine.select import grouped
from ia2mini.engine.subject import Subject
from ia2mini.episode import draw_episode
from ia2mini.report.summary import average, paired
from ia2mini.tasks import Task, load_examples

from ..cost import Cost
from ..report import Line, Result, difference
from .after import accuracies_with_demonstrations, phases_of, spent
from .controls import TEACHERS, Control
from .effect import about, studied
from .reopened import Reopened, reopen
from .tasks import tasks_of

TRUE = TEACHERS[0]
MATCHED = ("ia2", "ridge", "hidden", "soft")
ALONE = ("ia2", "ridge")  # that are also tried with demonstrations in the prompt without SFT
CONTROLS = ("base", "icl", "sft", "sft-sft")
CALIBRATION = {  # metric -> what it says
    "nll_labels": "NLL among the labels, as it is",
    "nll_dev": "the same with one temperature from the dev rows",
    "nll_left_out": "the same, for each row with the best temperature for the other evaluation rows",
    "nll_oracle": "the same with the best temperature for the evaluation rows",
    "risk_coverage": "area under the risk-coverage curve",
    "smooth_ece": "smooth ECE",
    "ece": "ECE",
}


def causes(
    subject: Subject,
    options: Options,
    part: str,
    data: Path | None = None,
    teachers=TEACHERS,
    matched=MATCHED,
) -> Result:
    """The teacher's demonstrations × what is matched × followed by SFT or not, with paired tests over task and set."""
    result = Result("causes", f"{about(subject, options, part)}; rates chosen by dev loss", [])
    tasks = tasks_of(part, data)
    cells = []
    steps = {}
    for teacher in teachers:
        asked = replace(options, methods=methods_of(teacher, matched))
        draw = drawn_for(teacher, tasks)
        document = studied(result, f"teacher {teacher}", tasks, subject, asked, draw=draw)
        for cell in document["cells"]:
            cells.append(cell | {"method": named(cell["method"], teacher)})
        for (n, method), records in grouped(document["runs"], "n", "method").items():
            steps[n, named(method, teacher)] = fmean(record["steps"] for record in records)
        if teacher == TRUE:
            reopened = reopen(tasks, subject, asked, draw)
            stays(result, part, reopened, document)
            costs(result, part, reopened, document)
    for (n, ood), mine in grouped(cells, "n", "ood").items():
        where = f"{part}, N = {n}{', out of distribution' if ood else ''}"
        for row in average(mine):
            rates = {
                "% accuracy": 100 * row["acc_mean"],
                "steps": steps[n, row["method"]],
                "asim": row["asim_mean"],
            }
            for metric in CALIBRATION:
                if row[f"{metric}_mean"] is not None:
                    rates[metric] = row[f"{metric}_mean"]
            result.lines.append(Line(where, row["method"], rates=rates))
        tests(result, where, mine)
    return result


def methods_of(teacher: str, matched: tuple[str, ...]) -> tuple[str, ...]:
    """What is trained and scored under a teacher; the controls, which have none, only once."""
    methods = list(CONTROLS) if teacher == TRUE else []
    for first in matched:
        methods += [first, f"{first}-sft"]
    return tuple(methods)


def drawn_for(teacher: str, tasks: list[Task]) -> Callable:
    """What draws the sets of a study under a teacher; under the true one those of `ia2mini run`."""
    if teacher == TRUE:
        return draw_episode
    return Control(teacher, [load_examples(task, "train").rows for task in tasks])


def named(method: str, teacher: str) -> str:
    """A method's name in the matrix: with what its teacher sees, where it has one."""
    return method if method in CONTROLS else f"{method}, {teacher}"


def stays(result: Result, part: str, reopened: list[Reopened], document: dict) -> None:
    """What adapted models do with demonstrations: their task's, against ICL; the next task's, against ICL there."""
    own = [cell for cell in document["cells"] if cell["method"] == "icl" and not cell["ood"]]
    for (n,), icl_cells in grouped(own, "n").items():
        tasks = [one for one in reopened if one.cell.n == n]
        icl = [cell["acc"] for cell in icl_cells]  # [tasks][sets]
        for method in document["config"]["methods"]:
            if method.endswith("sft") or method in ALONE:
                rates = {}
                for what, ahead, against in (
                    ("demonstrations put back", 0, "% ICL"),
                    ("the next task's demonstrations", 1, "% ICL there"),
                ):
                    ours, theirs = with_others_demonstrations(tasks, icl, method, ahead)
                    rates[f"% {what}"] = 100 * fmean(ours)
                    rates[against] = 100 * fmean(theirs)
                    said = difference(paired_test(ours, theirs), 100, ".1f")
                    result.remarks.append(f"{part}, N = {n}: {what}: {method} against ICL: {said}")
                result.lines.append(
                    Line(f"{part}, N = {n}, with demonstrations", method, rates=rates)
                )


def with_others_demonstrations(
    tasks: list[Reopened], icl: list[list[float]], method: str, ahead: int
) -> tuple[list[float], list[float]]:
    """Accuracies of a method with the demonstrations of the task so many places ahead, and ICL's there."""
    ours = []
    theirs = []
    for place, mine in enumerate(tasks):
        asked = (place + ahead) % len(tasks)
        ours += accuracies_with_demonstrations(mine, method, tasks[asked])
        theirs += icl[asked]
    return ours, theirs


def costs(result: Result, part: str, reopened: list[Reopened], document: dict) -> None:
    """What each method's training has cost over all N, by shapes and steps, and in seconds as one process took them."""
    seconds = document["seconds_by_phase"]
    for method in document["config"]["methods"]:
        if method in UNTRAINED:
            continue
        cost = sum((spent(one, method) for one in reopened), Cost())
        phases = [f"training {phase}" for phase in phases_of(method)]
        if method not in ("sft", "sft-sft"):
            phases.append("collecting")
        rates = {"TFLOP": cost.flops / 1e12, "million tokens": cost.tokens / 1e6}
        rates["s"] = sum(seconds.get(phase, float("nan")) for phase in phases)
        result.lines.append(Line(f"{part}, cost of training", method, rates=rates))


def tests(result: Result, where: str, cells: list[dict]) -> None:
    """Paired differences: ways to SFT against controls and one another, teachers against the true one, calibration."""

    def said(metric: str, method: str, against: str, factor: float, form: str) -> None:
        gain = paired(cells, metric, method, against)
        if gain is not None:
            mean = difference(gain, factor, form)
            result.remarks.append(
                f"{where}: {CALIBRATION.get(metric, metric)}: {method} against {against}: {mean}"
            )

    for teacher in TEACHERS:
        for first in MATCHED:
            for against in ("sft", "sft-sft"):
                said("acc", f"{first}-sft, {teacher}", against, 100, ".1f")
            if teacher != TRUE:
                said("acc", f"{first}-sft, {TRUE}", f"{first}-sft, {teacher}", 100, ".1f")
    for one, other in combinations(MATCHED, 2):
        said("acc", f"{one}-sft, {TRUE}", f"{other}-sft, {TRUE}", 100, ".1f")
    for metric in CALIBRATION:
        for against in ("sft", "sft-sft", f"soft-sft, {TRUE}"):
            said(metric, f"ia2-sft, {TRUE}", against, 1, ".3f")
