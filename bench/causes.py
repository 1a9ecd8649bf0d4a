"""`causes`: what in the teacher's context does the work, and which of the things that one may match carries it?

The teacher sees the true demonstrations, these with their answers shuffled, another task's, or none. Matched are its
attention outputs (by training, IA2, or in closed form, ridge), its residual stream, its distribution over the
vocabulary, or the tokens of its responses; each is followed by SFT or not. Controls: SFT, and SFT begun again. Of what
has learned from the true demonstrations also: what stays when they are put back, what another task's demonstrations
still teach, and what it has cost.
"""

from dataclasses import replace
from itertools import combinations
from pathlib import Path
from statistics import fmean

from ia2mini.cli.main import progress
from ia2mini.cost import Cost
from ia2mini.experiment import Experiment
from ia2mini.methods import BEGINS_WITH
from ia2mini.metrics import paired_test
from ia2mini.engine.options import UNTRAINED, Options
from ia2mini.report.summary import average, grouped, paired
from ia2mini.study.study import carry_out, open_study
from ia2mini.engine.subject import Subject

from .after import behind_demonstrations, spent
from .effect import tasks_of
from .report import Line, Result, difference

TEACHERS = ("true", "shuffled", "other", "none")
MATCHED = ("ia2", "ridge", "hidden", "soft", "responses")
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
    subject: Subject, options: Options, part: str, data: Path | None = None, teachers=TEACHERS, matched=MATCHED
) -> Result:
    """The teacher's demonstrations × what is matched × followed by SFT or not, with paired tests over task and set."""
    about = f"{subject.name}, {part}: {options.sets} sets, {options.eval_rows} evaluation rows"
    result, cells, steps = Result("causes", f"{about}; rates chosen by dev loss", []), [], {}
    for teacher in teachers:
        methods = [name for first in matched for name in (first, f"{first}-sft")]
        methods = [*CONTROLS * (teacher == TEACHERS[0]), *methods]
        asked = replace(options, teacher=teacher, methods=tuple(methods))
        experiments, config = open_study(tasks_of(part, data), subject, asked, Path("runs"), None, None, progress)
        document, kept = carry_out(list(experiments), config)
        for cell in document["cells"]:
            cells.append(cell | {"method": named(cell["method"], teacher)})
        for (n, method), records in grouped(document["runs"], "n", "method").items():
            steps[n, named(method, teacher)] = fmean(record["steps"] for record in records)
        result.remarks.append(f"teacher {teacher}: {kept}, {sum(document['seconds'].values()):.0f} s in all")
        if teacher == TEACHERS[0]:
            stays(result, part, experiments, document)
            costs(result, part, experiments, document)
    for (n, ood), mine in grouped(cells, "n", "ood").items():
        where = f"{part}, N = {n}{', out of distribution' if ood else ''}"
        for row in average(mine):
            rates = {"% accuracy": 100 * row["acc_mean"], "steps": steps[n, row["method"]], "asim": row["asim_mean"]}
            rates |= {name: row[f"{name}_mean"] for name in CALIBRATION if row[f"{name}_mean"] is not None}
            result.lines.append(Line(where, row["method"], rates=rates))
        tests(result, where, mine)
    return result


def stays(result: Result, part: str, experiments: list[Experiment], document: dict) -> None:
    """What adapted models do behind demonstrations: their task's, against ICL; the next task's, against ICL there."""
    for (n,), own in grouped([c for c in document["cells"] if c["method"] == "icl" and not c["ood"]], "n").items():
        tasks, icl = [e for e in experiments if e.about["n"] == n], [cell["acc"] for cell in own]  # [tasks][sets]
        for method in (m for m in document["config"]["methods"] if m.endswith("sft") or m in MATCHED[:2]):
            rates = {}
            for what, ahead in (("demonstrations put back", 0), ("the next task's demonstrations", 1)):
                places = [(place + ahead) % len(tasks) for place in range(len(tasks))]
                found = [behind_demonstrations(e, method, tasks[p]) for e, p in zip(tasks, places)]
                ours, theirs = sum(found, []), sum((icl[place] for place in places), [])
                rates |= {f"% {what}": 100 * fmean(ours), "% ICL" + " there" * ahead: 100 * fmean(theirs)}
                said = difference(paired_test(ours, theirs), 100, ".1f")
                result.remarks.append(f"{part}, N = {n}: {what}: {method} against ICL: {said}")
            result.lines.append(Line(f"{part}, N = {n}, behind demonstrations", method, rates=rates))


def costs(result: Result, part: str, experiments: list[Experiment], document: dict) -> None:
    """What each method's training has cost over all N, by shapes and steps, and in seconds as one process took them."""
    seconds = document["seconds_by_phase"]
    for method in (m for m in document["config"]["methods"] if m not in UNTRAINED):
        cost = sum((spent(experiment, method) for experiment in experiments), Cost())
        phases = [f"training {m}" for m in (BEGINS_WITH.get(method), method) if m]
        phases += ["collecting"] * (phases != ["training sft"] and method != "sft-sft")
        rates = {"TFLOP": cost.flops / 1e12, "million tokens": cost.tokens / 1e6}
        rates["s"] = sum(seconds.get(phase, float("nan")) for phase in phases)
        result.lines.append(Line(f"{part}, cost of training", method, rates=rates))


def named(method: str, teacher: str) -> str:
    """A method's name in the matrix: with what its teacher sees, where it has one."""
    return method if method in CONTROLS else f"{method}, {teacher}"


def tests(result: Result, where: str, cells: list[dict]) -> None:
    """Paired differences: ways to SFT against controls and one another, teachers against the true one, calibration."""

    def said(metric: str, method: str, against: str, factor: float, form: str) -> None:
        gain = paired(cells, metric, method, against)
        if gain is not None:
            mean = difference(gain, factor, form)
            result.remarks.append(f"{where}: {CALIBRATION.get(metric, metric)}: {method} against {against}: {mean}")

    for teacher in TEACHERS:
        for first in MATCHED:
            for against in ("sft", "sft-sft"):
                said("acc", f"{first}-sft, {teacher}", against, 100, ".1f")
            if teacher != TEACHERS[0]:
                said("acc", f"{first}-sft, {TEACHERS[0]}", f"{first}-sft, {teacher}", 100, ".1f")
    for one, other in combinations(MATCHED, 2):
        said("acc", f"{one}-sft, true", f"{other}-sft, true", 100, ".1f")
    for metric in CALIBRATION:
        for against in ("sft", "sft-sft", "soft-sft, true"):
            said(metric, "ia2-sft, true", against, 1, ".3f")
