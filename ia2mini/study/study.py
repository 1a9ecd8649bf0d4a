"""A study runs tasks × N on one model, and saves records, results and adapters."""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from .. import __version__
from ..engine.experiment import Experiment, in_order, make_trainer, train_all
from ..engine.options import ICL_SFT, UNTRAINED, Options, phases_of
from ..engine.own_loss import registered
from ..engine.progress import Progress, silent
from ..engine.select import runs_to_score
from ..engine.store import Store, checkpoint_digest, versions
from ..engine.subject import Subject
from ..episode import draw_episode
from ..files import finite, write_json
from ..generate import STOP
from ..models.taps import device_of
from ..scale import ranks
from ..scale.decode import fast_decoding
from ..scale.pack import in_batches, in_one_batch
from ..tasks import Task
from ..teacher import TeacherSettings
from ..train import Settings
from .cells import Cell, make_cells
from .overlap import overlaps
from .records import (
    choose_runs,
    sample,
    save_adapters,
    score_records,
    training_records,
    untrained_runs,
)
from .scoring import dev_temperatures, score_all
from .table import summarise


def compare(
    tasks: list[Task],
    subject: Subject,
    options: Options,
    out: Path,
    data_dir: Path | None = None,
    side_by_side: int | None = None,
    bar: Callable = silent,
    draw: Callable = draw_episode,
) -> tuple[dict, Path]:
    """Run every task at every N and save results and adapters; returns (results document, run folder).

    The folder lies in `out` and is found again by the same options, data, checkpoint and version of this package: an
    interrupted study resumes there. `write_report` makes its tables and figures. Raises UsageError.
    """
    cells = make_cells(tasks, subject, options, data_dir, draw)
    store, config = open_folder(cells, out, draw)
    return carry_out(cells, store, config, side_by_side, bar)


def carry_out(
    cells: list[Cell],
    store: Store,
    config: dict,
    side_by_side: int | None = None,
    bar: Callable = silent,
) -> tuple[dict, Path]:
    """Run every cell of an opened study; returns (results document, run folder)."""
    study = cells[0].study
    trainer = make_trainer(side_by_side)
    found: dict[str, list] = defaultdict(list)
    with registered(study.losses):
        progress = Progress(bar, phases=sum(map(count_phases, cells)))
        for cell in cells:
            experiment = experiment_of(cell, store, progress, trainer)
            for key, records in run_cell(cell, experiment).items():
                found[key] += records
    document = finite(
        {
            "cells": summarise(found["runs"], study.options.select),
            **store.spent,
            **found,
            "config": config,
            "versions": versions(),
        }
    )
    if ranks.chief:
        write_json(store.path / "results.json", document)
    return document, store.path


def run_cell(cell: Cell, experiment: Experiment) -> dict[str, list]:
    """The work of a cell in order: teach and train, choose learning rates, score, save."""
    options = cell.study.options
    store = experiment.store
    trained = train_all(experiment)
    training = training_records(cell, trained)
    scored_runs = {}
    for method, records in training.items():
        scored_runs[method] = runs_to_score(records, options.select)
    scores = score_all(cell, experiment, trained, scored_runs)
    runs = []
    chosen_runs = {}
    adapters = []
    for method in options.methods:
        if method in UNTRAINED:
            described = untrained_runs(cell)
        else:
            described = {run: training[method][run] for run in scored_runs[method]}
        temperatures = dev_temperatures(cell, method, trained, scored_runs) if cell.labels else []
        method_records = []
        for name in cell.evaluations:
            method_records += score_records(
                cell, method, name, scores[method, name], described, temperatures
            )
        runs += method_records
        if method not in UNTRAINED:
            on_own_rows = [record for record in method_records if record["eval"] == cell.task.name]
            chosen_runs[method] = choose_runs(training[method], on_own_rows, options.select)
            adapters += save_adapters(
                cell, store, method, trained[method], chosen_runs[method], training[method]
            )
    return {
        "runs": runs,
        "training": [record for records in training.values() for record in records],
        "overlap": overlaps(cell, trained, chosen_runs),
        "adapters": adapters,
        "samples": [sample(cell, store, scores, chosen_runs, scored_runs)],
    }


def experiment_of(cell: Cell, store: Store, progress: Progress, trainer: Callable) -> Experiment:
    """The experiment of a cell: what to teach and train."""
    study = cell.study
    options = study.options
    own_methods: list[str] = []  # trained first, so that their mistakes show early
    for loss in study.losses:
        own_methods += [method for method in loss.methods() if method in options.methods]
    needed = phases_of(options.methods)
    soft_k = None
    if "soft" in needed or study.losses:  # a loss of one's own is given all that the teacher shows
        soft_k = study.subject.model.config.vocab_size if options.paper_compat else options.soft_k
    teacher_settings = TeacherSettings(
        max_tokens=cell.teacher_tokens,
        soft_k=soft_k,
        layers=study.layers,
        stop=None if options.paper_compat else STOP,
        residual="hidden" in needed or bool(study.losses),
        demonstrated=ICL_SFT in needed,
        hooks=fast_decoding(device_of(study.subject.model), cell.teacher_tokens),
    )
    settings = Settings(
        options.batch_size,
        options.epochs,
        options.patience,
        study.layers,
        keep_last=options.paper_compat,
    )
    return Experiment(
        name=cell.name,
        subject=study.subject,
        adapter=study.adapter,
        episodes=cell.episodes,
        methods=in_order((*own_methods, *options.methods), options.tuned),
        rates=study.rates,
        seed=options.seed,
        settings=settings,
        teacher_settings=teacher_settings,
        store=store,
        progress=progress,
        betas=study.betas,
        labels=options.labels,
        tuned=options.tuned,
        racing=options.race and options.select == "dev",
        collate=in_one_batch if options.paper_compat else in_batches,
        trainer=trainer,
    )


def count_phases(cell: Cell) -> int:
    """The number of phases: collecting, training each method, and scoring ICL and every method on each evaluation."""
    methods = cell.study.options.methods
    trained = len(in_order(methods, cell.study.options.tuned))
    collected = 1 if trained and cell.study.options.learns_from_teacher else 0
    scored = len({"icl", *methods})
    return collected + trained + len(cell.evaluations) * scored


def open_folder(cells: list[Cell], out: Path, draw: Callable = draw_episode) -> tuple[Store, dict]:
    """The folder of a study, and its configuration, which is written to run.json."""
    study = cells[0].study
    options = study.options
    tasks = list({cell.task.name: cell.task for cell in cells}.values())
    config: dict = {
        "ia2mini": __version__,
        "tasks": [task.name for task in tasks],
        "model": study.subject.base,
        **asdict(options),
    }
    del config["loss"]  # a path does not identify a loss; its content does
    if study.losses:
        config["loss"] = {loss.name: loss.digest for loss in study.losses}
    config["dtype"] = study.subject.dtype
    config["device"] = device_of(study.subject.model).type
    config["checkpoint"] = checkpoint_digest(study.subject.folder)
    config["templates"] = {task.name: task.prompt for task in tasks}
    config["pools"] = {name: examples.origin for name, examples in study.pools.items()}
    config["evals"] = {name: examples.origin for name, examples in study.evaluations.items()}
    if draw is not draw_episode:
        config["draw"] = repr(draw)
    about = "+".join(config["tasks"]) if len(tasks) < 4 else f"{len(tasks)}-tasks"
    store = Store(out, f"{about}-{study.subject.name}-n{'-'.join(map(str, options.n))}", config)
    # the folder's name depends on these two as they were given; the file has what they came to
    config["rates"] = study.rates
    config["targets"] = study.adapter.targets
    store.keep_json("run.json", config)
    return store, config
