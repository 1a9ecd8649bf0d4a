"""A study: tasks × N on one model; the records of all runs, and what is saved of them."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from itertools import combinations, groupby, product
from operator import attrgetter
from pathlib import Path
from statistics import fmean

import torch
from tqdm import tqdm

from . import UsageError, __version__, parallel
from .adapters import LoRA, unpack
from .cost import Cell, Cost, gemm_rate
from .episode import with_demonstrations
from .experiment import Experiment, parsed_correct
from .files import finite, read_json, write_json
from .graphs import RATE
from .methods import BEGINS_WITH, METHODS
from .metrics import accuracy, measure, subspace_overlap
from .options import UNTRAINED, Options
from .peft_format import save_adapter
from .report.summary import at_config, chosen, summarise
from .runs import RunFolder, checkpoint_digest, versions
from .sets import Setting
from .subject import Subject
from .tasks import Task, find_task, load_examples

COMPILING = 60  # seconds that compiling is assumed to take on a GPU, to be measured
SHOWN = 10  # right and wrong rows that the page shows of each task


def compare(
    tasks: list[Task],
    subject: Subject,
    options: Options,
    out: Path,
    data_dir: Path | None = None,
    side_by_side: int | None = None,
    bar: Callable = lambda label, total: tqdm(disable=True),
) -> tuple[dict, Path]:
    """Run every task at every N; (results document, run folder), with results and adapters saved in the folder.

    The folder lies in `out` and is found again by the same options, data, checkpoint and version of this package: an
    interrupted study goes on there. `write_report` makes its tables and figures. Raises UsageError.
    """
    return carry_out(*open_study(tasks, subject, options, out, data_dir, side_by_side, bar))


def carry_out(experiments: list[Experiment], config: dict) -> tuple[dict, Path]:
    """Run what `open_study` has opened: `compare`'s document and folder."""
    options, folder = experiments[0].setting.options, experiments[0].setting.folder
    cells = [list(variants) for _, variants in groupby(experiments, attrgetter("name"))]  # what they share is together
    experiments.clear()  # what they hold leaves memory with them

    def run(i: int) -> list[dict[str, list]]:
        variants, cells[i] = cells[i], []
        return [run_experiment(experiment) for experiment in variants]

    order, size = list(range(len(cells))), parallel.size
    if size > 1:
        order.sort(key=lambda i: -cells[i][0].about["n"])  # the long ones first
    everywhere = all(parallel.gather((folder.path / "run.json").is_file()))  # else only the first process can write
    dealt = len(order) // size * size if everywhere else 0
    found = dict(zip(order, parallel.spread(run, order[:dealt]) + [run(i) for i in order[dealt:]]))
    parts = sum((found[i] for i in range(len(found))), [])
    records = {key: sum((part[key] for part in parts), []) for key in parts[0]}
    about = {"config": config, "versions": versions()}
    document = finite({"cells": summarise(records["runs"], options.select), **folder.spent, **records, **about})
    if parallel.chief:
        write_json(folder.path / "results.json", document)
    return document, folder.path


def open_study(
    tasks: list[Task], subject: Subject, options: Options, out: Path, data_dir: Path | None, side_by_side, bar: Callable
) -> tuple[list[Experiment], dict]:
    """The experiments of `compare`, nothing of them computed yet, and what makes their folder."""
    experiments = lay_out(tasks, subject, options, data_dir, side_by_side)
    setting = experiments[0].setting
    weight = next(subject.model.parameters())
    config = {"ia2mini": __version__, "tasks": [task.name for task in tasks], "model": subject.base, **asdict(options)}
    config |= {"dtype": str(weight.dtype).removeprefix("torch."), "device": weight.device.type}
    config |= {"checkpoint": checkpoint_digest(subject.folder), "templates": {t.name: t.prompt for t in tasks}}
    config |= {kind: {k: v.origin for k, v in getattr(setting, kind).items()} for kind in ("pools", "evals")}
    about = "+".join(config["tasks"]) if len(tasks) < 4 else f"{len(tasks)}-tasks"
    folder = RunFolder(out, f"{about}-{subject.name}-n{'-'.join(map(str, options.n))}", config)
    setting.folder, setting.bar = folder, bar
    resolved = {e.kind.name: {"rates": e.rates, "targets": e.adapter.targets} for e in experiments}
    config |= {"adapters": resolved} if len(options.adapters) > 1 else resolved[options.adapters[0].name]
    folder.json_once("run.json", lambda: config)  # every mistake in tasks, sizes and options has shown by now
    return experiments, config


def lay_out(
    tasks: list[Task], subject: Subject, options: Options, data_dir: Path | None, side_by_side: int | None = None
) -> list[Experiment]:
    """The experiments of a study, which share a setting without a folder yet."""
    if unknown := set(options.methods) - {*UNTRAINED, *METHODS}:
        raise UsageError(f"unknown method {min(unknown)!r}; methods: base, icl, {', '.join(METHODS)}")
    pools = {task.name: load_examples(task, "train", data_dir) for task in tasks}
    evals = {name: task if name == task.name else find_task(name) for task in tasks for name in task.evals}
    evals = {name: load_examples(task, "eval", data_dir, options.eval_rows) for name, task in evals.items()}
    setting = Setting(subject, options, side_by_side, pools, evals)
    cells = (Experiment(setting, *cell) for cell in product(tasks, options.n, options.unlabelled))
    experiments = [experiment for cell in cells for experiment in cell.variants()]
    setting.phases = tuple(phase for experiment in experiments for phase in experiment.phases())
    return experiments


def plan(experiments: list[Experiment], device: str) -> str:
    """What each experiment costs by its shapes, as `ia2mini run --dry-run` says it; a matrix product is timed."""
    setting = experiments[0].setting
    config, dtype, total = setting.subject.model.config, next(setting.subject.model.parameters()).dtype, Cost()
    rate, out = gemm_rate(1024, 1024, 1024, device, dtype, seconds=0.2), []
    for experiment in experiments:
        cell, parts = cell_of(experiment), {}
        for stage, cost in cell.stages(config, dtype.itemsize).items():
            kind = stage.partition(" ")[0]
            if kind != "collect" or experiment.first:
                parts[kind] = parts.get(kind, Cost()) + cost
        whole = sum(parts.values(), Cost())
        memory = cell.memory(config, dtype.itemsize, setting.side_by_side) / 1e9
        spent = ", ".join(f"{kind} {cost.seconds(rate):.3g} s" for kind, cost in parts.items())
        shape = f"prompts of {cell.query:.0f} tokens, {cell.shown:.0f} of demonstrations"
        shape += f", answers of up to {cell.answer:.0f}"
        work = f"{whole.tokens / 1e6:.3g} M tokens, {memory:.2g} GB in training, {whole.seconds(rate):.3g} s ({spent})"
        out.append(f"{experiment.trains}: {shape}; {work}")
        total += whole
    out.append(f"in all {total.tokens / 1e6:.3g} M tokens, {total.flops / 1e12:.3g} TFLOP, {total.seconds(rate):.3g} s")
    said = f"seconds if all ran at the {rate / 1e9:,.0f} GFLOP/s of a matrix product here ({device}, {str(dtype)[6:]})"
    return "\n".join([*out, f"{said}, training for all of its epochs; nothing was computed"])


def cell_of(experiment: Experiment) -> Cell:
    """The numbers that an experiment's cost depends on; an answer counts as long as the longest may be."""
    o, encode = experiment.setting.options, experiment.setting.subject.tokenizer.encode_all
    n, more = experiment.about["n"], experiment.about["unlabelled"]

    def tokens(texts: Iterable[str]) -> float:
        return fmean(map(len, encode(list(texts))))

    rows = [row for episode in experiment.episodes for row in episode.train]
    methods, kind = tuple(experiment.methods), experiment.kind
    trained = tuple(dict.fromkeys(m for method in methods for m in (BEGINS_WITH.get(method), method) if m in METHODS))
    query = tokens(row.prompt for row in rows)
    shown = (n - 1) * tokens(f"{row.prompt}{row.answer}\n\n" for row in rows)
    configs = len(experiment.rates) * (len(experiment.betas) if "ia2+sft" in trained else 1)
    scored = o.sets if o.select in ("dev", "kl") else o.sets * configs
    evals, rank = tuple(len(e.rows) for e in experiment.evals.values()), kind.rank * (kind.adapter == "lora")
    found = Cell(query, shown, experiment.max_tokens, n, evals, o.sets, configs, scored, methods, trained)
    return replace(found, epochs=o.epochs, batch=o.batch_size, more=more, rank=rank)


def worth_compiling(experiments: list[Experiment]) -> bool:
    """Whether a GPU has more to do, at the least, than compiling takes; what is kept of an earlier run is not known."""
    model = experiments[0].setting.subject.model
    costs = [cost for e in experiments for cost in cell_of(e).stages(model.config).values()]
    return sum(cost.seconds(RATE) for cost in costs) > COMPILING


def run_experiment(experiment: Experiment) -> dict[str, list]:
    """Records of every scored run and of all training; overlaps, saved adapters and samples."""
    o, runs, training, methods = experiment.setting.options, [], [], experiment.methods
    for method in methods:
        training += [] if method in UNTRAINED else experiment.training_records(method)
        heats = experiment.temperatures(method) if experiment.labelled else []
        for name in experiment.evals:
            runs += score_records(experiment, method, name, heats)
    picks = {method: pick(method, training, runs, o.select) for method in methods if method not in UNTRAINED}
    found = {"runs": runs, "training": training, "overlap": overlaps(experiment, picks)}
    adapters = [path for method, numbers in picks.items() for path in save_adapters(experiment, method, numbers)]
    return found | {"adapters": adapters, "samples": [sample(experiment, picks)] * experiment.first}


def pick(method: str, training: list[dict], runs: list[dict], select: str) -> list[int]:
    """A method's runs at the chosen rate (and β), one a set: indices on the R axis."""
    training = [record for record in training if record["method"] == method]
    judged = [r for r in runs if r["method"] == method and r["eval"] == r["task"]] if select == "eval" else training
    return at_config(training, chosen(judged, "dev" if select == "both" else select))


def score_records(experiment: Experiment, method: str, name: str, heats: list[float]) -> list[dict]:
    """A record of each of a method's scored runs on one evaluation: what it is, and its metrics.

    `heats`: the runs' temperatures from dev rows.
    """
    o, task, trained = experiment.setting.options, experiment.find(name), method not in UNTRAINED
    scores, gold = experiment.score(method, name), [e.label for e in experiment.evals[name].rows]
    about = experiment.about | {"eval": name, "ood": name != experiment.task.name, "method": method}
    about |= {"model": experiment.setting.subject.name, "adapter": experiment.kind.name if trained else None}
    sets, records = range(o.sets), []
    untrained = [{"set": number, "rate": None, "beta": None, "dev_loss": None, "steps": 0} for number in sets]
    known = experiment.training_records(method) if trained else untrained
    for r, (run, asim) in enumerate(zip(experiment.reported(method) if trained else sets, scores["asim"].tolist())):
        record = about | known[run] | {"asim": fmean(asim), "asim_layers": asim}
        at = r if len(scores["correct"]) > 1 else 0  # base has one row for all sets
        if task.labels:
            sure, right, labels = (scores[key][at] for key in ("confidence", "correct", "labels"))
            scheme = "mass" if o.paper_compat else "width"
            record |= measure(sure, right, labels, torch.tensor(gold), scheme, heats[r]) | {"temperature": heats[r]}
        else:
            record |= {"acc": accuracy(scores["correct"][at])}
            record["texts"] = experiment.texts_file(f"{method}-{0 if method == 'base' else run}", name)
        records.append(record)
    return records


def save_adapters(experiment: Experiment, method: str, numbers: list[int]) -> list[str]:
    """Save a method's chosen runs in PEFT's format; folder names."""
    setting, records = experiment.setting, experiment.training_records(method)
    subject, theta = setting.subject, experiment.trained(method).theta
    names = [f"adapters/{experiment.trains}-{method}-set{records[r]['set']}" for r in numbers]
    for r, name in zip(numbers, names) if parallel.writes() else ():
        path = setting.folder.path / name
        about = subject.base, subject.tokenizer, subject.revision
        save_adapter(subject.model, experiment.adapter, theta[r], path, *about)
    return names


def overlaps(experiment: Experiment, picks: dict[str, list[int]]) -> list[dict]:
    """Share of LoRA's subspace that two chosen methods have in common by set (paper Figure 4), and that of chance."""
    adapter, found = experiment.adapter, []
    if not isinstance(adapter, LoRA):
        return found
    weights = {m: unpack(experiment.trained(m).theta[numbers], adapter.shapes) for m, numbers in picks.items()}
    names = [name for name in adapter.shapes if name.endswith(".B")]
    chance = fmean(adapter.rank / adapter.shapes[name][0] for name in names)
    for one, other in combinations(picks, 2):
        each = [subspace_overlap(weights[one][name], weights[other][name], adapter.rank) for name in names]  # [sets]
        sets = [fmean(values) for values in zip(*(e.tolist() for e in each))]
        shared = {"adapter": experiment.kind.name, "methods": [one, other], "overlap": sets, "mean": fmean(sets)}
        found.append(experiment.about | shared | {"chance": chance})
    return found


def sample(experiment: Experiment, picks: dict[str, list[int]]) -> dict:
    """What the model saw (one whole prompt), and right and wrong rows of the last trained method's first set."""
    name, task, rows = experiment.task.name, experiment.task, experiment.evals[experiment.task.name].rows
    prompt = with_demonstrations(experiment.episodes[0].icl[0], rows[0].prompt)
    shown: dict = experiment.about | {"rows": [], "prompt": prompt}
    if not picks:
        return shown
    method = list(picks)[-1]
    place, scores = experiment.reported(method).index(picks[method][0]), experiment.score(method, name)
    if task.labels:
        said = [task.labels[top] if top >= 0 else "(no label)" for top in scores["top"][place].tolist()]
        sure = scores["confidence"][place].tolist()
    else:
        file = experiment.texts_file(f"{method}-{picks[method][0]}", name)
        said = parallel.first(lambda: read_json(experiment.setting.folder.path / file)["texts"])
        sure = [None] * len(rows)
    shown |= {"method": method, "set": 0}
    right = scores["correct"][place].tolist()
    for verdict in (True, False):
        for i in [i for i, one in enumerate(right) if one == verdict][:SHOWN]:
            row = {"prompt": rows[i].prompt, "answer": rows[i].answer, "said": said[i]}
            shown["rows"].append(row | {"confidence": sure[i], "right": verdict})
    return shown


def rescore(path: Path) -> dict:
    """Parse a finished study's saved texts again, and save its results. Raises UsageError where no answer is text."""
    document = read_json(path / "results.json")
    records = [record for record in document["runs"] if "texts" in record]
    if not records:
        raise UsageError(f"{path}: no generated texts there; only tasks whose answers are text can be parsed again")
    for record in records:
        record["acc"] = accuracy(parsed_correct(read_json(inside(path, record["texts"]))))
    document["cells"] = summarise(document["runs"], document["config"]["select"])
    write_json(path / "results.json", document)
    return document


@contextmanager
def strange_results(path: Path) -> Iterator[None]:
    """Turn whatever comes of a results.json that says anything into a UsageError."""
    try:
        yield
    except (UsageError, OSError):
        raise
    except Exception as error:
        found = f"{type(error).__name__}: {error}"
        raise UsageError(f"{path}/results.json: not what `ia2mini run` writes ({found}); run it again") from None


def inside(folder: Path, name: str) -> Path:
    """The file of that name in a folder. Raises UsageError for a name that leads out of it."""
    path = folder / name
    if not path.resolve().is_relative_to(folder.resolve()):
        raise UsageError(f"{folder}/results.json: names {name!r}, which is outside its folder; run it again")
    return path
