"""`rivals`: what `fit` ships beside what else a person with a few labelled rows would take, on the same rows."""

import hashlib
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory

import click
import torch

from ia2mini import UsageError
from ia2mini.engine.intervals import paired_test
from ia2mini.engine.options import FitOptions
from ia2mini.engine.store import Store, checkpoint_digest, versions
from ia2mini.engine.subject import Subject
from ia2mini.fitting.crossval import candidate_names
from ia2mini.fitting.fit import prepare_fit
from ia2mini.fitting.predictor import Predictor
from ia2mini.methods import METHODS

from ..report import Line, Result, difference
from .embedders import EMBEDDED, check_embedder
from .fit import (
    CALLED,
    POINTS,
    REAL,
    RIVALS,
    SOME,
    about,
    alone,
    called,
    columns_of,
    fit_folds,
    real_rows,
)
from .measured import Measured, costs, folder_mb, judged, measure
from .reopened import RUNS

DATA_SETS = ("sst2", "ag_news", "financial_phrasebank")
PARTS = ("fit", *EMBEDDED)  # what is computed and kept as one
# rivals as they are kept -> as they are called
NAMES = {
    "base": "base",
    "icl": "ICL",
    "probe": "linear probe",
    "sft": "SFT",
    "sft-heated": "SFT, one temperature",
    "ia2-sft": "IA2→SFT",
    "hidden-sft": "hidden→SFT",
    "shipped": "what fit ships",
    "setfit": "SetFit",
    "embedding": "embedding + logistic regression",
}
# of `fit`, shown at temperature 1
CANDIDATES = ("base", "icl", "probe", "sft", "ia2-sft", "hidden-sft")
# how a difference is shown, and how many digits it has
COMPARED = {"% accuracy": ".1f", "% macro-F1": ".1f", "NLL": ".3f", "ECE": ".3f"}
STATED = ("stated % accuracy", "stated low", "stated high")
SOURCES = Path(__file__).parents[2]


@dataclass(frozen=True)
class Cells:
    """Which rows are drawn, and who is asked."""

    tasks: tuple[str, ...] = DATA_SETS
    sizes: tuple[int, ...] = (4, 8, 16)  # rows of each class
    seeds: int = 5  # draws of the rows
    parts: tuple[str, ...] = PARTS


def fitted_rivals(
    subject: Subject,
    options: FitOptions,
    rows: list[dict],
    fresh: list[dict],
) -> dict[str, Measured]:
    """What one fit ships, with the seconds of the whole fit, and its candidates trained on every row.

    A candidate's seconds are those of its last training alone.
    """
    begun = time.perf_counter()
    cv = prepare_fit(rows, subject, options, columns_of(rows))
    fitted, choice = fit_folds(cv)
    seconds = time.perf_counter() - begun
    assert list(cv.task.labels) == sorted({row[cv.task.answer_column] for row in rows})
    needed = folder_mb(subject.folder)
    stated = fitted.report["shipped"]["acc"]
    note = f"ships {fitted.report['chosen']}"
    shipped = asked(fitted, fresh, seconds, needed, note)
    found = {"shipped": replace(shipped, stated=[100 * share for share in stated])}
    tried = candidate_names(cv.task, options)
    names = [name for name in CANDIDATES if name in tried]
    for name in names:
        try:
            begun = time.perf_counter()
            predictor = alone(cv, fitted, choice.candidates[name])
            spent = time.perf_counter() - begun if name in METHODS else 0.0
            found[name] = asked(predictor, fresh, spent, needed)
        except UsageError as error:  # it diverged
            click.echo(f"  {name} is left out: {error}", err=True)
    if "sft" in found:
        found["sft-heated"] = heated(found["sft"], choice.candidates["sft"].temperature)
    return found


def asked(
    predictor: Predictor, fresh: list[dict], seconds: float, needed: float, note: str = ""
) -> Measured:
    """What a predictor of ours says of fresh rows; its size is that of the folder that it saves."""

    def answer(rows: list[dict]) -> list[list[float]]:
        return [found["log_probabilities"] for _, found in predictor.full_answers(rows)]

    with TemporaryDirectory() as out:
        predictor.save(Path(out))
        shipped = folder_mb(Path(out))
    return measure(answer, fresh, seconds, (shipped, needed), note)


def heated(measured: Measured, temperature: float) -> Measured:
    """The same answers at another temperature; they cost the same."""
    scores = torch.tensor(measured.log_probabilities, dtype=torch.float64) / temperature
    cooler = scores.log_softmax(-1).tolist()
    return replace(measured, log_probabilities=cooler, note=f"temperature {temperature:.3g}")


def sources_digest() -> str:
    """sha256 over the sources of the library: what was kept by other code is not taken up."""
    digest = hashlib.sha256()
    for folder in ("ia2mini", "models"):
        for file in sorted((SOURCES / folder).rglob("*.py")):
            digest.update(file.read_bytes())
    return digest.hexdigest()


def stores(
    subject: Subject, options: FitOptions, embedder: Path | None, cells: Cells
) -> dict[str, Store]:
    """Where each part is kept: `fit` by model, options and code; the others by embedder and packages, for any model."""
    rows = {"fresh": f"{SOME}, balanced", "threads": torch.get_num_threads()}
    found = {}
    if "fit" in cells.parts:
        what = rows | {"options": asdict(options), "sources": sources_digest()}
        what["checkpoint"] = checkpoint_digest(subject.folder)
        what["columns"] = CALLED
        what["dtype"] = subject.dtype
        found["fit"] = Store(RUNS, f"rivals-{subject.name}", what)
    for part in cells.parts:
        if part != "fit":
            packages = check_embedder((part,), embedder)
            what = rows | {"packages": packages, "torch": torch.__version__}
            what["embedder"] = checkpoint_digest(embedder)
            found[part] = Store(RUNS, f"rivals-{part}", what)
    return found


def rivals(
    subject: Subject,
    options: FitOptions,
    data: Path | None,
    embedder: Path | None = None,
    cells: Cells | None = None,
) -> Result:
    """`ia2mini fit` against base, ICL, SFT, IA2→SFT, SetFit, and an embedding with logistic regression.

    On real rows with words as labels, so many of each; every rival gets the same rows and answers the same others, one
    rival after another. What was measured is kept in runs/ at once, so that the same command goes on.
    """
    cells = cells or Cells()
    if data is None:
        raise UsageError(
            "rivals: name the folder that holds sst2/train.jsonl … with --data-dir or $IA2MINI_DATA"
        )
    check_cells(cells, data)
    packages = check_embedder(cells.parts, embedder)
    kept = stores(subject, options, embedder, cells)
    sizes = ", ".join(map(str, cells.sizes))
    dtype = subject.dtype
    what = f"{subject.name} ({dtype}): {sizes} real rows a class, {cells.seeds} draws"
    result = Result("rivals", f"{what}, {SOME} fresh rows, {about(options)}", [])
    # draw after draw, so that an interrupted command has all sizes and data sets
    for draw, size, task in product(range(cells.seeds), cells.sizes, cells.tasks):
        rows, fresh = real_rows(data, task, size, draw)
        labels = sorted({row["label"] for row in rows})
        gold = [labels.index(row["label"]) for row in fresh]
        where = f"{task}, {size} a class, draw {draw}"
        for part in cells.parts:
            some = called(rows, task)
            make = partial(fitted_rivals, subject, options, some, called(fresh, task))
            if part in EMBEDDED:
                make = partial(embedded, part, embedder, rows, fresh, draw)
            found = once(kept[part], f"{task}-{size}-{draw}.json", make)
            lines = [line(where, name, measured, gold) for name, measured in found.items()]
            result.lines += lines
            said = [f"{each.stack} {each.rates['% accuracy']:.1f} %" for each in lines]
            click.echo(f"  {where}: {', '.join(said)}", err=True)
    result.lines.sort(key=lambda each: place(each, cells))
    used = versions() | packages
    result.remarks.append(", ".join(f"{name} {number}" for name, number in used.items()))
    compare(result)
    promises(result)
    return result


def check_cells(cells: Cells, data: Path) -> None:
    """Raises UsageError where a list is empty, a file is missing or a class has too few rows."""
    for name in ("tasks", "sizes", "parts"):
        if not getattr(cells, name):
            raise UsageError(f"--{name}: give at least one")
    most = max(cells.sizes)
    for task in cells.tasks:
        rows, _ = real_rows(data, task, most, 0)
        words = REAL[task][2]
        if len(rows) < most * len(words):
            raise UsageError(f"--sizes {most}: a class of {task} has fewer rows; give less")


def embedded(
    part: str, embedder: Path, rows: list[dict], fresh: list[dict], seed: int
) -> dict[str, Measured]:
    return {part: EMBEDDED[part](embedder, rows, fresh, seed)}


def once(store: Store, name: str, make: Callable[[], dict[str, Measured]]) -> dict[str, Measured]:
    """What was measured before, else measured now and kept."""
    kept = store.json(name)
    if kept is None:
        kept = store.keep_json(name, {rival: asdict(one) for rival, one in make().items()})
    return {rival: Measured(**one) for rival, one in kept.items()}


def line(where: str, name: str, measured: Measured, gold: list[int]) -> Line:
    rates = judged(measured.log_probabilities, gold) | costs(measured)
    if measured.stated is not None:
        rates.update(zip(STATED, measured.stated))
    return Line(where, NAMES[name], rates=rates, note=measured.note)


def place(line: Line, cells: Cells) -> tuple[int, int, int, int]:
    """Where a line stands: by data set, size, draw and rival."""
    task, size, draw = cell_of(line.what)
    return cells.tasks.index(task), size, draw, list(NAMES.values()).index(line.stack)


def cell_of(what: str) -> tuple[str, int, int]:
    """Data set, rows a class and draw of a line."""
    task, size, draw = what.split(", ")
    return task, int(size.split()[0]), int(draw.split()[1])


def compare(result: Result) -> None:
    """The paired differences of what `fit` ships from SetFit over all cells that have both."""
    ours = {line.what: line.rates for line in result.lines if line.stack == NAMES["shipped"]}
    theirs = {line.what: line.rates for line in result.lines if line.stack == NAMES["setfit"]}
    both = [what for what in ours if what in theirs]
    if not both:
        return
    for rate, form in COMPARED.items():
        test = paired_test([ours[w][rate] for w in both], [theirs[w][rate] for w in both])
        result.ratios[f"{rate}, what fit ships minus SetFit"] = test.mean
        said = difference(test, 1, form)
        result.remarks.append(f"what fit ships minus SetFit, {rate}: {said}")


def promises(result: Result) -> None:
    """How often what `fit` ships is as good as the best of base, ICL and SFT, and its stated interval holds."""
    cells: dict[str, dict[str, dict]] = {}
    for each in result.lines:
        cells.setdefault(each.what, {})[each.stack] = each.rates
    near = []
    held = []
    for rates in cells.values():
        if NAMES["shipped"] not in rates:
            continue
        ours = rates[NAMES["shipped"]]
        right = ours["% accuracy"]
        others = [rates[NAMES[name]]["% accuracy"] for name in RIVALS if NAMES[name] in rates]
        near.append(right >= max(others) - POINTS)
        held.append(ours[STATED[1]] <= right <= ours[STATED[2]])
    if near:
        best = f"within {POINTS:g} points of the best of base, ICL and SFT"
        result.remarks.append(f"what fit ships is {best} in {sum(near)} of {len(near)} cells")
        interval = "its stated interval holds the accuracy on the fresh rows"
        result.remarks.append(f"{interval} in {sum(held)} of {len(held)} cells")
