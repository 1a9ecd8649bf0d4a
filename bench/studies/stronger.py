"""`stronger`: does a teacher that was fine-tuned with its demonstrations teach more? And who is calibrated afterwards?

The plain teacher is the base with demonstrations in its prompt. The tuned one was trained on the same rows with other
rows as demonstrations (`icl-sft`). Beside the ways to match them: SFT, SFT begun again, and SDFT, which matches the
plain teacher's distribution on answers that the student draws by itself.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from ia2mini.engine.options import METHOD_NAMES, Options
from ia2mini.engine.own_loss import further
from ia2mini.engine.select import grouped
from ia2mini.engine.subject import Subject
from ia2mini.methods import ICL, Grid
from ia2mini.report.summary import average, paired
from ia2mini.train import Trained

from ..report import Line, Result, difference
from .effect import about, studied
from .sdft import sdft
from .tasks import tasks_of

PLAIN = ("base", "icl", "icl-sft", "sft", "sft-sft", "soft", "sdft")
MATCHED = ("ia2", "ia2-sft", "hidden", "hidden-sft", "ridge-sft")  # under both teachers
ITSELF = ("own", "own-sft")  # IA2 from the tuned teacher's own weights
METRICS = {  # metric -> what it says, its factor and its digits
    "acc": ("% accuracy", 100, ".1f"),
    "nll": ("NLL", 1, ".3f"),
    "ece": ("ECE", 1, ".3f"),
    "ece_null": ("ECE, null", 1, ".3f"),
    "overconfidence": ("overconfidence", 1, ".3f"),
    "nll_oracle": ("NLL among the labels, best temperature", 1, ".3f"),
    "risk_coverage": ("area under the risk-coverage curve", 1, ".3f"),
}
COMPARED = ("acc", "nll", "ece", "overconfidence", "nll_oracle", "risk_coverage")
QUESTIONS = (  # method, against
    ("ia2-sft", "sft"),
    ("ia2-sft, tuned", "sft"),
    ("ia2-sft, tuned", "ia2-sft"),
    ("hidden-sft, tuned", "hidden-sft"),
    ("ridge-sft, tuned", "ridge-sft"),
    ("ia2, tuned", "ia2"),
    ("own-sft, tuned", "ia2-sft, tuned"),
    ("icl-sft", "icl"),
    ("icl-sft", "sft"),
    ("ia2-sft, tuned", "icl-sft"),
    ("ia2-sft", "sdft"),
    ("ia2", "sdft"),
    ("hidden", "sdft"),
    ("sdft", "sft"),
    ("sdft", "soft"),
    ("ia2-sft, tuned", "sdft"),
)


def own(grid: Grid, tuned: Trained) -> Trained:
    """IA2 without demonstrations, from the weights with which the teacher answers with them: one adapter both times."""
    return grid.train("own", {"mse": 1.0}, ICL, start=tuned)


def own_sft(grid: Grid, aligned: Trained) -> Trained:
    return grid.train("own-sft", {"ce": 1.0}, grid.labels, start=aligned)


@contextmanager
def further_methods() -> Iterator[None]:
    """Within the block a study knows the methods of this one."""
    names = {"sdft": "SDFT", "own": "IA2, own weights", "own-sft": "IA2→SFT, own weights"}
    methods = {"sdft": sdft, "own": own, "own-sft": own_sft}
    METHOD_NAMES.update(names)
    try:
        with further(methods, {"own": "icl-sft", "own-sft": "own"}):
            yield
    finally:
        for name in names:
            del METHOD_NAMES[name]


def stronger(subject: Subject, options: Options, part: str, data: Path | None = None) -> Result:
    """Plain and tuned teachers, what they teach by activations, SFT, and SDFT, with paired tests over task and set."""
    result = Result("stronger", f"{about(subject, options, part)}; rates chosen by dev loss", [])
    tasks = tasks_of(part, data)
    plain = replace(options, methods=PLAIN + MATCHED)
    tuned = replace(options, methods=MATCHED + ITSELF, teacher="tuned")
    cells = []
    with further_methods():
        for teacher, asked in (("plain", plain), ("tuned", tuned)):
            document = studied(result, f"{teacher} teacher", tasks, subject, asked)
            for cell in document["cells"]:
                cells.append(cell | {"method": named(cell["method"], teacher)})
    for (n, ood), mine in grouped(cells, "n", "ood").items():
        where = f"{part}, N = {n}{', out of distribution' if ood else ''}"
        listed(result, where, mine)
        tests(result, where, mine)
        if not ood:
            for (task,), each in grouped(mine, "task").items():
                listed(result, f"{Path(task).stem}, N = {n}", each)
    return result


def named(method: str, teacher: str) -> str:
    return method if teacher == "plain" else f"{method}, {teacher}"


def listed(result: Result, where: str, cells: list[dict]) -> None:
    """A line for each method: its metrics, averaged over tasks and sets."""
    for row in average(cells):
        rates = {}
        for metric, (name, factor, _) in METRICS.items():
            if row.get(f"{metric}_mean") is not None:
                rates[name] = factor * row[f"{metric}_mean"]
        rates["asim"] = row["asim_mean"]
        result.lines.append(Line(where, row["method"], rates=rates))


def tests(result: Result, where: str, cells: list[dict]) -> None:
    """The paired differences that the questions ask for."""
    for method, against in QUESTIONS:
        for metric in COMPARED:
            gain = paired(cells, metric, method, against)
            if gain is not None:
                name, factor, digits = METRICS[metric]
                said = difference(gain, factor, digits)
                result.remarks.append(f"{where}: {name}: {method} against {against}: {said}")
