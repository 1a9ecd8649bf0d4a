"""The records of a cell: description and metrics of every scored run, and sample answers."""

from statistics import fmean

import torch

from ..engine.experiment import troubles
from ..engine.options import UNTRAINED
from ..engine.peft import save_adapter
from ..engine.select import at_config, chosen
from ..engine.store import Store
from ..episode import with_demonstrations
from ..methods import WITH_DEMONSTRATIONS, configs
from ..metrics import accuracy, measure
from ..scale import ranks
from ..train import Trained
from .cells import Cell, evaluation_task
from .evaluation import Scores
from .texts import texts_file

ROWS_SHOWN = 10  # right and wrong ones that the page shows of each task


def cell_fields(cell: Cell) -> dict:
    """The fields that all records of a cell have."""
    return {"task": cell.task.name, "n": cell.n}


def training_records(cell: Cell, trained: dict[str, Trained]) -> dict[str, list[dict]]:
    """For each method one record per run: its set, learning rate, β, dev loss and steps."""
    found = {}
    for method in cell.study.options.methods:
        if method in UNTRAINED:
            continue
        runs = trained[method]
        records = []
        each = configs(method, len(cell.episodes), cell.study.rates, cell.study.betas)
        for r, ((number, rate, beta), trouble) in enumerate(zip(each, troubles(runs))):
            record = cell_fields(cell)
            record["method"] = method
            record["adapter"] = cell.study.options.adapter_name
            record["set"] = number
            record["rate"] = rate
            record["beta"] = beta
            record["dev_loss"] = runs.dev_loss[r].item()
            record["steps"] = int(runs.steps[r])
            record["trouble"] = trouble
            records.append(record)
        found[method] = records
    return found


def score_records(
    cell: Cell,
    method: str,
    name: str,
    scores: Scores,
    runs: dict[int, dict],
    temperatures: list[float],
) -> list[dict]:
    """One record for each scored run of a method on one evaluation: its description and metrics.

    `runs`: run -> its training record; `temperatures`: of each run, from dev rows.
    """
    options = cell.study.options
    task = evaluation_task(cell.task, name)
    tokens = query_tokens(cell, name, demonstrated=method in WITH_DEMONSTRATIONS)
    if task.labels:
        gold = torch.tensor([row.label for row in cell.evaluations[name].rows])
        scheme = "scripts" if options.paper_compat else "width"
    records = []
    for r, (run, training) in enumerate(runs.items()):
        asim = scores["asim"][r].tolist()
        at = r if len(scores["correct"]) > 1 else 0  # base has one row for all sets
        record = cell_fields(cell)
        record["eval"] = name
        record["ood"] = name != cell.task.name
        record["method"] = method
        record["model"] = cell.study.subject.name
        record["adapter"] = None if method in UNTRAINED else options.adapter_name
        record.update(training)
        record["tokens"] = tokens[training["set"]]
        record["asim"] = fmean(asim)
        record["asim_layers"] = asim
        if task.labels:
            measured = measure(
                scores["confidence"][at],
                scores["correct"][at],
                scores["log_probabilities"][at],
                gold,
                scheme,
                temperatures[r],
            )
            record.update(measured)
            record["temperature"] = temperatures[r]
        else:
            record["acc"] = accuracy(scores["correct"][at])
            number = 0 if method == "base" else run
            record["texts"] = texts_file(cell, f"{method}-{number}", name)
        records.append(record)
    return records


def query_tokens(cell: Cell, name: str, demonstrated: bool) -> list[float]:
    """Mean tokens of the prompts of an evaluation, a number for each set; `demonstrated`: with its demonstrations."""
    count = cell.study.subject.tokenizer.count
    rows = cell.evaluations[name].rows
    query = fmean(count([row.prompt for row in rows]))
    if not demonstrated:
        return [query] * len(cell.episodes)
    found = []
    for episode in cell.episodes:
        shown = count([with_demonstrations(demonstrations, "") for demonstrations in episode.icl])
        found.append(query + fmean(shown))
    return found


def untrained_runs(cell: Cell) -> dict[int, dict]:
    """In place of the training records of base and ICL: one per set."""
    nothing = {"rate": None, "beta": None, "dev_loss": None, "steps": 0}
    return {number: {"set": number, **nothing} for number in range(len(cell.episodes))}


def choose_runs(records: list[dict], scored: list[dict], select: str) -> list[int]:
    """A method's runs at the chosen rate (and β), one a set: indices on the R axis.

    `records`: of its training; `scored`: of its runs on the task's own evaluation.
    """
    if select == "eval":
        return at_config(records, chosen(scored, "eval"))
    return at_config(records, chosen(records, "dev"))


def save_adapters(
    cell: Cell, store: Store, method: str, trained: Trained, runs: list[int], records
) -> list[str]:
    """Save a method's chosen runs in PEFT's format; returns the folder names."""
    adapter = cell.study.adapter
    subject = cell.study.subject
    names = []
    for r in runs:
        name = f"adapters/{cell.name}-{method}-set{records[r]['set']}"
        names.append(name)
        if ranks.chief:
            folder = store.path / name
            save_adapter(adapter, trained.theta[r], folder, subject.base, subject.revision)
    return names


def sample(
    cell: Cell,
    store: Store,
    scores: dict,
    chosen_runs: dict[str, list[int]],
    scored_runs: dict,
) -> dict:
    """One whole prompt as the model saw it, and right and wrong rows of the last trained method's first set."""
    name = cell.task.name
    rows = cell.evaluations[name].rows
    found = cell_fields(cell)
    found["rows"] = []
    found["prompt"] = with_demonstrations(cell.episodes[0].icl[0], rows[0].prompt)
    if not chosen_runs:
        return found
    method = list(chosen_runs)[-1]
    run = chosen_runs[method][0]
    found["method"] = method
    found["set"] = 0
    said, confidence, right = answers_of_run(
        cell, store, scores[method, name], scored_runs[method].index(run), method, run
    )
    for wanted in (True, False):
        places = [i for i, correct in enumerate(right) if correct == wanted]
        for i in places[:ROWS_SHOWN]:
            row = {"prompt": rows[i].prompt, "answer": rows[i].answer, "said": said[i]}
            row["confidence"] = confidence[i]
            row["right"] = wanted
            found["rows"].append(row)
    return found


def answers_of_run(cell: Cell, store: Store, scores: Scores, place: int, method: str, run: int):
    """One run's answers to the task's own evaluation: the texts, their confidence, and whether they are right."""
    right = scores["correct"][place].tolist()
    if cell.labels:
        labels = cell.task.labels
        said = [labels[top] if top >= 0 else "(no label)" for top in scores["top"][place].tolist()]
        return said, scores["confidence"][place].tolist(), right
    texts = store.json(texts_file(cell, f"{method}-{run}", cell.task.name))["texts"]
    return texts, [None] * len(texts), right
