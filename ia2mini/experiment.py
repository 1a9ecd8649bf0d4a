"""The paper's comparison: cells one after another, the records of all runs, and what is saved of them."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path

from torch import nn
from tqdm import tqdm

from . import UsageError
from .cell import PARSERS, UNTRAINED, Cell, Lab, Options, find, parsed_correct
from .export import save_adapter
from .metrics import accuracy
from .models.checkpoint import read_json
from .report import figures, html, table
from .runs import RunFolder, checkpoint_digest, finite, versions
from .summary import chosen, measure, summarise
from .tasks import Task, load_examples
from .tokenizer import Tokenizer


def run_cell(cell: Cell) -> list[dict]:
    """A record of every run of every method on every evaluation: rates, losses, scores."""
    lab, records = cell.lab, []
    for method in lab.options.methods:
        grid = [(number, None, None) for number in range(len(cell.episodes))]
        fit = None
        if method not in UNTRAINED:
            fit, grid = cell.fit(method), cell.grid(method)
        for name in cell.evals:
            scores = cell.score(method, name)
            about = {
                "task": cell.task.name,
                "eval": name,
                "ood": name != cell.task.name,
                "model": lab.name,
                "n": cell.n,
            }
            about |= {"method": method, "adapter": fit and lab.options.adapter}
            labels = [e.label for e in cell.evals[name].rows]
            for r, (number, rate, beta) in enumerate(grid):
                one = {key: t[r if len(t) > 1 else 0] for key, t in scores.items()}  # base has one row for all sets
                record = about | {"set": number, "rate": rate, "beta": beta}
                record |= (
                    {"dev_loss": fit.dev_loss[r].item(), "steps": fit.steps[r].item()}
                    if fit
                    else {"dev_loss": None, "steps": 0}
                )
                if not cell.single:
                    record["texts"] = f"{cell.name}/generations/{method}-{r if method != 'base' else 0}-on-{name}.json"
                records.append(record | measure(one, labels, "mass" if lab.options.paper_compat else "width"))
    return records


def save_adapters(cell: Cell, records: list[dict], base: str) -> list[str]:
    """Save each trained method's run at the chosen rate, one a set, in PEFT's format; folder names."""
    saved = []
    for method in (m for m in cell.lab.options.methods if m not in UNTRAINED):
        mine = [r for r in records if r["method"] == method and r["eval"] == cell.task.name and r["n"] == cell.n]
        pick = chosen(mine, cell.lab.options.select)
        fit = cell.fit(method)
        for r, (number, *config) in enumerate(cell.grid(method)):
            if tuple(config) == pick:
                saved.append(f"adapters/{cell.name}-{method}-set{number}")
                save_adapter(
                    cell.lab.model,
                    cell.adapter,
                    fit.theta[r],
                    cell.lab.folder.path / saved[-1],
                    base,
                    cell.lab.tokenizer,
                )
    return saved


@dataclass(frozen=True)
class Subject:
    """The model under study."""

    model: nn.Module
    tokenizer: Tokenizer
    folder: Path  # of its checkpoint
    name: str  # in tables and folder names
    base: str  # what peft shall load the adapters onto: hub id or folder


def compare(
    tasks: list[Task],
    sizes: tuple[int, ...],
    subject: Subject,
    options: Options,
    out: Path,
    data_dir: Path | None = None,
    side_by_side: int | None = None,
    bar: Callable = lambda label, total: tqdm(disable=True),
) -> tuple[dict, Path]:
    """Run every task at every N; (results document, run folder), with results, adapters, tables and figures saved in the folder.

    The folder lies in `out` and is found again by the same options, data and checkpoint: an interrupted comparison goes on there.
    """
    pools = {task.name: load_examples(task, "train", data_dir) for task in tasks}
    evals = {e: load_examples(find(e, task), "eval", data_dir, options.eval_rows) for task in tasks for e in task.evals}
    weight = next(subject.model.parameters())
    config = {"tasks": [task.name for task in tasks], "model": subject.base, "n": sizes, **asdict(options)}
    config |= {"dtype": str(weight.dtype).removeprefix("torch."), "device": weight.device.type}
    config |= {"checkpoint": checkpoint_digest(subject.folder)}
    config |= {"pools": {k: v.origin for k, v in pools.items()}, "evals": {k: v.origin for k, v in evals.items()}}
    about = "+".join(config["tasks"]) if len(tasks) < 4 else f"{len(tasks)}-tasks"
    title = f"{about}-{subject.name}-n{'-'.join(map(str, sizes))}"
    folder = RunFolder(out, title, config)
    lab = Lab(subject.model, subject.tokenizer, subject.name, folder, options, bar, side_by_side=side_by_side)
    cells = [
        Cell(lab, task, n, pools[task.name], {e: evals[e] for e in task.evals}) for task, n in product(tasks, sizes)
    ]
    folder.begin()  # every mistake in tasks, sizes and options has shown by now
    records, adapters = [], []
    while cells:
        cell = cells.pop(0)  # what it holds leaves memory with it
        found = run_cell(cell)
        adapters += save_adapters(cell, found, subject.base)
        records += found
    document = {
        "cells": summarise(records, options.select),
        **folder.spent,
        "config": config,
        "versions": versions(),
        "adapters": adapters,
    }
    return conclude(folder, document | {"runs": records}), folder.path


def conclude(folder: RunFolder, document: dict) -> dict:
    """Save results.json, the tables, figures and the page of a finished comparison; the document as JSON can hold it."""
    folder.save_json("results.json", document := finite(document))
    for suffix, style in (("txt", "terminal"), ("md", "markdown"), ("tex", "latex"), ("csv", "csv")):
        folder.save_text(f"table.{suffix}", table(document, style))
    folder.save_text("report.html", html(document, figures(document, folder.path)))
    return document


def rescore(path: Path) -> dict:
    """Parse the saved generations of a finished run again, without the model, and save its results anew. Raises UsageError."""
    document = read_json(path / "results.json")
    records = [record for record in document["runs"] if "texts" in record]
    if not records:
        raise UsageError(f"{path}: no generated texts there; only tasks whose answers are text can be parsed again")
    for record in records:
        saved = read_json(path / record["texts"])
        record["acc"] = accuracy(parsed_correct(PARSERS[saved["parser"]], saved["texts"], saved["answers"]))
    document["cells"] = summarise(document["runs"], document["config"]["select"])
    return conclude(RunFolder.open(path), document)
