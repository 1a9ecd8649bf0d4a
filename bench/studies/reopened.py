"""The cells of a study whose results are there already: their sets and trained weights, to ask more of them."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ia2mini.engine.experiment import Experiment, make_trainer, train_all
from ia2mini.engine.options import Options
from ia2mini.engine.progress import Progress, progress
from ia2mini.engine.select import runs_to_score
from ia2mini.engine.subject import Subject
from ia2mini.episode import draw_episode
from ia2mini.study.cells import Cell, make_cells
from ia2mini.study.records import training_records
from ia2mini.study.study import count_phases, experiment_of, open_folder
from ia2mini.tasks import Task
from ia2mini.train import Trained

RUNS = Path("runs")  # where every study is kept


@dataclass
class Reopened:
    """A cell with what was trained of it."""

    cell: Cell
    experiment: Experiment
    trained: dict[str, Trained]
    training: dict[str, list[dict]]  # a record a run of each method
    scored_runs: dict[str, list[int]]  # of each method


def reopen(
    tasks: list[Task], subject: Subject, options: Options, draw: Callable = draw_episode
) -> list[Reopened]:
    """The cells of a study in order; what was not trained yet is trained."""
    cells = make_cells(tasks, subject, options, draw=draw)
    store, _ = open_folder(cells, RUNS, draw)
    bars = Progress(progress, phases=sum(map(count_phases, cells)))
    trainer = make_trainer(None)
    return [reopen_cell(cell, experiment_of(cell, store, bars, trainer)) for cell in cells]


def reopen_cell(cell: Cell, experiment: Experiment) -> Reopened:
    trained = train_all(experiment)
    training = training_records(cell, trained)
    scored_runs = {}
    for method, records in training.items():
        scored_runs[method] = runs_to_score(records, cell.study.options.select)
    return Reopened(cell, experiment, trained, training, scored_runs)
