"""Score the base, ICL and every trained method on the evaluation rows; every result is kept on disk.

R runs, S sets, Q evaluation rows, C labels, L layers, n rows on which attention outputs are compared, D hidden.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import cache, partial

import torch
from torch import Tensor

from ..adapters import adapted
from ..batch import TokenRow, join_groups, send
from ..engine.experiment import Experiment
from ..engine.merge import Merged
from ..engine.options import UNTRAINED
from ..engine.subject import max_label_tokens
from ..labels import Scoring, label_scores
from ..methods import WITH_DEMONSTRATIONS
from ..metrics import fit_temperature
from ..prefix import share_prefix
from ..scale import ranks
from ..tasks import Example
from ..teacher import TeacherSettings, record_targets
from ..tokenizer import Tokenizer
from ..train import Trained
from .asim import asim_of_responses, summed_asim
from .cells import Cell, evaluation_task
from .evaluation import Evaluation, Reference, Scores
from .texts import score_texts, with_end

ROW_TOKENS = 16384  # of one row under all runs that are scored side by side


def score_all(
    cell: Cell,
    experiment: Experiment,
    trained: dict[str, Trained],
    scored_runs: dict[str, list[int]],
) -> dict:
    """(method, evaluation) -> `Scores` of the method's scored runs."""
    found = {}
    for name, examples in cell.evaluations.items():
        e = Evaluation(
            cell=cell,
            experiment=experiment,
            name=name,
            task=evaluation_task(cell.task, name),
            rows=examples.rows,
            labels=cell.labels.get(name),
            trained=trained,
            scored_runs=scored_runs,
        )
        references: list[Reference] = []
        for method in cell.study.options.methods:
            place = f"{experiment.name}/{method}-on-{name}"
            kept = experiment.store.tensors(place)
            # the references give ICL's scores: their phase counts once, also where ICL is no method
            if kept is None:
                if not references:
                    references = make_references(e)
                if method == "icl":
                    scores = join_runs([reference.scores for reference in references])
                else:
                    scores = score_method(e, method, references)
                kept = experiment.store.keep(place, scores)
            elif method != "icl":
                experiment.progress.kept()
            found[method, name] = kept
        if not references:
            experiment.progress.kept()
    return found


def score_method(e: Evaluation, method: str, references: list[Reference]) -> Scores:
    """Score the base or a method's scored runs, each against the reference of its own set."""
    runs = [0] if method == "base" else e.scored_runs[method]
    sets = len(references)
    groups: list[tuple[list[int], list[Reference]]] = []  # runs that are scored side by side
    if method == "base":
        groups.append((runs, references))
    elif method in WITH_DEMONSTRATIONS:
        for r, run in enumerate(runs):
            groups.append(([run], [references[r * sets // len(runs)]]))
    else:
        by_set = torch.tensor(runs).view(sets, -1)  # [S, runs of a set]
        parts = number_of_groups(sets, len(runs) * max(map(len, e.prompts)))
        for numbers in torch.arange(sets).tensor_split(parts):
            group = [references[number] for number in numbers.tolist()]
            if group:
                groups.append((by_set[numbers].flatten().tolist(), group))
    with e.phase(method, len(runs) * len(e.rows)) as bar:

        def score_group(group: tuple[list[int], list[Reference]]) -> Scores:
            mine, of_their_sets = group
            return score_runs(e, method, mine, of_their_sets, bar)

        return join_runs(ranks.spread(score_group, groups))


def number_of_groups(sets: int, tokens: int) -> int:
    """How many groups the sets are divided into, at least one for each process.

    `tokens`: of the longest row, of all runs together; the runs of a group are scored side by side.
    """
    needed = min(sets, math.ceil(tokens / ROW_TOKENS))
    return ranks.size * math.ceil(needed / ranks.size)


def join_runs(parts: list[Scores]) -> Scores:
    return {key: torch.cat([part[key] for part in parts]) for key in parts[0]}


def score_runs(
    e: Evaluation, method: str, runs: list[int], references: list[Reference], bar
) -> Scores:
    """Score some runs of a method side by side; a run that has demonstrations in its prompt is alone."""
    first = references[0].number
    with student_of(e.cell, method, e.trained, runs, e.rows, first) as (student, prompts):
        if e.labels:
            outputs = torch.cat([reference.outputs for reference in references], 1)
            return score_labels(e, student, prompts, len(runs), bar, outputs)
        names = [f"{method}-{run}" for run in runs]
        responses, correct = score_texts(e, student, prompts, names, bar)
        compared = []
        for reference in references:
            rows = zip(reference.rows, prompts)
            compared.append([replace(row, prompt=prompt) for row, prompt in rows])
        return {"correct": correct, "asim": asim_of_responses(e, student, compared, responses)}


@contextmanager
def student_of(
    cell: Cell, method: str, trained: dict, runs: list[int], rows: list[Example], number: int
) -> Iterator[tuple[Callable, list[list[int]]]]:
    """A context with the model as some runs of a method have adapted it, and with the rows' prompts.

    For base and ICL it is the base. If the method sees demonstrations, it has read those of set `number`, and the
    prompts are what follows them. With `--paper-compat` the adapter is merged into bfloat16 weights, as in the released
    scripts.
    """
    study = cell.study
    tokenizer = study.subject.tokenizer
    queries = [row.prompt for row in rows]
    context = nullcontext(study.subject.model)
    if method not in UNTRAINED:
        adapter = Merged(study.adapter) if study.options.paper_compat else study.adapter
        context = adapted(study.subject.model, adapter, trained[method].theta[runs])
    with context as student:
        if method in WITH_DEMONSTRATIONS:
            yield share_prefix(student, tokenizer, cell.episodes[number].icl, queries)
        else:
            yield student, tokenizer.encode_all(queries)


def make_references(e: Evaluation) -> list[Reference]:
    """The base with each set's demonstrations.

    It reads all rows if ICL is one of the methods, else only the rows whose attention outputs are compared.
    """
    if "icl" not in e.options.methods:
        e = replace(e, rows=e.rows[: e.options.asim_rows])
    sets = len(e.cell.episodes)
    with e.phase("icl", sets * len(e.rows)) as bar:
        return ranks.spread(partial(make_reference, e, bar), range(sets))


def make_reference(e: Evaluation, bar, number: int) -> Reference:
    reference = Reference(number)
    with student_of(e.cell, "icl", e.trained, [], e.rows, number) as (model, prompts):
        if e.labels:
            reference.scores = score_labels(e, model, prompts, 1, bar)
            reference.outputs = reference.scores.pop("outputs")
        else:
            (responses,), correct = score_texts(e, model, prompts, [f"icl-{number}"], bar)
            for prompt, response in zip(e.prompts[: e.options.asim_rows], responses):
                reference.rows.append(TokenRow(prompt, with_end(e, response)))
            settings = TeacherSettings(e.cell.max_tokens)
            record_targets(model, reference.rows, prompts[: len(reference.rows)], settings)
            reference.scores = {"correct": correct}
    reference.scores["asim"] = torch.ones(1, e.model.config.num_hidden_layers)
    return reference


def score_labels(
    e: Evaluation,
    model: Callable,
    prompts: list[list[int]],
    runs: int,
    bar,
    reference: Tensor | None = None,
) -> Scores:
    """`label_scores` of R runs on the rows, whether each is right, and `asim` [R, L] to `reference` [L, S, n, D].

    Without a reference it is the attention outputs `outputs` [L, R, n, D] themselves.
    """
    groups = []
    observed = []

    def observe(group: list[int], outputs: Tensor) -> None:
        groups.append(group)
        if reference is not None:
            rows = send(torch.tensor(group), outputs.device)
            outputs = summed_asim(outputs, reference[:, :, rows])
        observed.append(outputs)

    def watch(queries: int) -> None:
        bar.update(queries * runs)

    scoring = Scoring(
        runs,
        top_k=10 if e.options.paper_compat else None,
        ends=e.tokenizer.eos_ids,
        observed=e.options.asim_rows,
        observer=observe,
    )
    scored = label_scores(model, prompts, e.labels, scoring, watch)
    spelled = spelled_labels(e) if e.options.paper_compat else None
    top = scored.top if spelled is None else spelled[scored.first_token]
    scores = {
        "top": top,
        "confidence": scored.confidence,
        "log_probabilities": scored.log_probabilities,
        "correct": top == torch.tensor([row.label for row in e.rows]),
    }
    if reference is None:
        scores["outputs"] = join_groups(observed, groups, dim=2)
    else:
        compared = sum(len(group) for group in groups)
        scores["asim"] = (torch.stack(observed).sum(0) / compared).cpu()
    return scores


def spelled_labels(e: Evaluation) -> Tensor | None:
    """The label that each token counts as in the released scripts; None if a label has several tokens."""
    if max_label_tokens(e.labels) > 1:
        return None
    return spellings(e.tokenizer, e.task.labels, e.model.config.vocab_size)


@cache
def spellings(tokenizer: Tokenizer, labels: tuple[str, ...], size: int) -> Tensor:
    """For each of `size` tokens the label that its text equals without surrounding blanks, else -1, [V] int64.

    The paper's released scripts compare in this way: " Friday" is "Friday".
    """
    places: dict[str, int] = {}
    for place, label in enumerate(labels):
        places.setdefault(label.strip(), place)
    known = min(size, tokenizer.backend.get_vocab_size())
    texts = tokenizer.backend.decode_batch([[token] for token in range(known)])
    found = [places.get(text.strip(), -1) for text in texts]
    return torch.tensor(found + [-1] * (size - known))


def dev_temperatures(
    cell: Cell, method: str, trained: dict[str, Trained], scored_runs: dict[str, list[int]]
) -> list[float]:
    """The temperature that fits the dev rows of a run's set best: one per scored run (base and ICL: per set)."""
    sets = len(cell.episodes)
    runs = range(sets) if method in UNTRAINED else scored_runs[method]
    labels = cell.labels[cell.task.name]
    scoring = Scoring(ends=cell.study.subject.tokenizer.eos_ids)
    found = []
    for place, run in enumerate(runs):
        number = place * sets // len(runs)  # runs come set by set
        dev = cell.episodes[number].dev
        with student_of(cell, method, trained, [run], dev, number) as (student, prompts):
            scores = label_scores(student, prompts, labels, scoring)
        gold = torch.tensor([row.label for row in dev])
        found.append(fit_temperature(scores.log_probabilities[0], gold))
    return found
