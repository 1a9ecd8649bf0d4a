"""What the base, ICL and every trained method say of the evaluation rows, each kept on disk.

R runs, S sets, Q evaluation rows, C labels, L layers, n rows on which attention outputs are compared, D hidden.
"""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cache, partial

import torch
from torch import Tensor

from ..adapters import Adapter, adapted
from ..batch import Row
from ..engine.experiment import Experiment
from ..engine.merge import Merged
from ..engine.options import UNTRAINED
from ..generate import Decoding, generate
from ..labels import Scoring, label_scores
from ..methods import BEHIND_DEMONSTRATIONS
from ..metrics import fit_temperature
from ..models.taps import device_of
from ..prefix import share_prefix
from ..scale import ranks
from ..scale.decode import fast_decoding
from ..scoring import layer_asim
from ..tasks import Example, Task, same_answer
from ..teacher import Asked, label_tokens_at_most, observe
from ..tokenizer import Tokenizer
from ..train import Trained
from .cells import Cell

# asim [R, L], correct [R, Q]; of labels top, confidence [R, Q] and log_probabilities [R, Q, C]
Scores = dict[str, Tensor]


@dataclass
class Reference:
    """The base with each set's demonstrations: what the others are compared with."""

    scores: Scores
    outputs: Tensor | None = None  # of labels: attention outputs [L, S, n, D]
    # of texts: each set's first n responses with their attention outputs
    rows: list[list[Row]] | None = None

    def of_sets(self, sets: Tensor) -> "Reference":
        """What some of the sets are compared with."""
        if self.outputs is not None:
            return Reference(self.scores, outputs=self.outputs[:, sets])
        return Reference(self.scores, rows=[self.rows[number] for number in sets.tolist()])


@dataclass
class Evaluation:
    """One evaluation of a cell: its rows, and the trained runs that are scored on them."""

    cell: Cell
    x: Experiment
    name: str
    task: Task
    rows: list[Example]
    labels: list[list[int]] | None  # tokens of each label; None of texts
    trained: dict[str, Trained]
    reported: dict[str, list[int]]  # the runs of each method that are scored

    @property
    def prompts(self) -> list[list[int]]:
        return self.x.subject.tokenizer.encode_all([row.prompt for row in self.rows])

    def phase(self, method: str, count: int):
        return self.x.phase("evaluate", f"{method} on {self.name}", count)


def score_all(
    cell: Cell, x: Experiment, trained: dict[str, Trained], reported: dict[str, list[int]]
) -> dict:
    """(method, evaluation) -> `Scores` of the method's reported runs."""
    found = {}
    for name, examples in cell.evaluations.items():
        task = cell.evaluation_task(name)
        e = Evaluation(cell, x, name, task, examples.rows, cell.labels.get(name), trained, reported)
        reference = None
        for method in cell.study.options.methods:
            place = f"{x.name}/{method}-on-{name}"
            kept = x.store.tensors(place)
            if kept is None:
                if reference is None:
                    reference = make_reference(e)
                scores = reference.scores if method == "icl" else score_method(e, method, reference)
                kept = x.store.keep(place, scores)
            elif method != "icl":
                x.progress.kept()
            found[method, name] = kept
        if reference is None:
            x.progress.kept()
    return found


def score_method(e: Evaluation, method: str, reference: Reference) -> Scores:
    """What the base or a method's reported runs say, each compared with its own set's reference."""
    if method == "base":
        with e.phase(method, len(e.rows)) as bar:
            return score_runs(e, method, [0], reference, bar)
    sets = len(e.cell.episodes)
    by_set = torch.tensor(e.reported[method]).view(sets, -1)

    def score_sets(some: Tensor) -> Scores | None:
        if not len(some):
            return None
        if method in BEHIND_DEMONSTRATIONS:
            parts = []
            for number in some.tolist():
                own = reference.of_sets(torch.tensor([number]))
                for run in by_set[number].tolist():
                    parts.append(score_behind_demonstrations(e, method, run, number, own, bar))
            return join_runs(parts)
        return score_runs(e, method, by_set[some].flatten().tolist(), reference.of_sets(some), bar)

    with e.phase(method, by_set.numel() * len(e.rows)) as bar:
        parts = ranks.spread(score_sets, torch.arange(sets).tensor_split(ranks.size))
    return join_runs(parts)


def join_runs(parts: list[Scores | None]) -> Scores:
    parts = [part for part in parts if part is not None]
    return {key: torch.cat([part[key] for part in parts]) for key in parts[0]}


def score_runs(e: Evaluation, method: str, runs: list[int], reference: Reference, bar) -> Scores:
    """What some runs of a method say, side by side."""
    model = e.x.subject.model
    under = nullcontext(model)
    if method not in UNTRAINED:
        under = adapted(model, scored_adapter(e.cell), e.trained[method].theta[runs])
    with under as student:
        if e.labels:
            return score_labels(
                e, student, e.prompts, Scoring(len(runs), like=reference.outputs), bar
            )
        names = [f"{method}-{run}" for run in runs]
        responses, correct = score_texts(e, student, e.prompts, names, bar)
        return {"correct": correct, "asim": likeness(e, student, reference.rows, responses)}


def score_behind_demonstrations(
    e: Evaluation, method: str, run: int, number: int, reference: Reference, bar
) -> Scores:
    """What one run says with the demonstrations of its set, `number`, in the prompt."""
    theta = e.trained[method].theta[[run]]
    with adapted(e.x.subject.model, scored_adapter(e.cell), theta) as student:
        student, prompts = behind_demonstrations(student, e.cell, e.rows, number)
        if e.labels:
            return score_labels(e, student, prompts, Scoring(like=reference.outputs), bar)
        responses, correct = score_texts(e, student, prompts, [f"{method}-{run}"], bar)
        (rows,) = reference.rows
        compared = [replace(row, prompt=prompt) for row, prompt in zip(rows, prompts)]
        return {"correct": correct, "asim": likeness(e, student, [compared], responses)}


def make_reference(e: Evaluation) -> Reference:
    """The base with each set's demonstrations.

    On all rows where ICL is a method, else on those whose attention outputs are compared.
    """
    options = e.cell.study.options
    if "icl" not in options.methods:
        e = replace(e, rows=e.rows[: options.asim_rows])
    sets = len(e.cell.episodes)
    with e.phase("icl", sets * len(e.rows)) as bar:
        score_set = partial(reference_of_labels if e.labels else reference_of_texts, e, bar)
        parts = ranks.spread(score_set, range(sets))
    scores = join_runs([part.scores for part in parts])
    scores["asim"] = torch.ones(sets, e.x.subject.model.config.num_hidden_layers)
    if e.labels:
        return Reference(scores, outputs=torch.cat([part.outputs for part in parts], 1))
    return Reference(scores, rows=[part.rows[0] for part in parts])


def reference_of_labels(e: Evaluation, bar, number: int) -> Reference:
    model, prompts = behind_demonstrations(e.x.subject.model, e.cell, e.rows, number)
    scores = score_labels(e, model, prompts, Scoring(keep=e.cell.study.options.asim_rows), bar)
    return Reference(scores, outputs=scores.pop("outputs"))


def reference_of_texts(e: Evaluation, bar, number: int) -> Reference:
    compared = e.cell.study.options.asim_rows
    model, prompts = behind_demonstrations(e.x.subject.model, e.cell, e.rows, number)
    (responses,), correct = score_texts(e, model, prompts, [f"icl-{number}"], bar)
    rows = []
    for prompt, response in zip(e.prompts[:compared], responses):
        rows.append(Row(prompt, ended(e, response)))
    asked = Asked(e.cell.max_tokens, budget=e.cell.study.budget)
    observe(model, rows, prompts[: len(rows)], asked)
    return Reference({"correct": correct}, rows=[rows])


def behind_demonstrations(
    model: Callable, cell: Cell, rows: list[Example], number: int
) -> tuple[Callable, list[list[int]]]:
    """A model with a set's demonstrations computed once, and what follows them in each row's prompt."""
    queries = [row.prompt for row in rows]
    return share_prefix(model, cell.study.subject.tokenizer, cell.episodes[number].icl, queries)


def score_labels(
    e: Evaluation, model: Callable, prompts: list[list[int]], how: Scoring, bar
) -> Scores:
    """`label_scores` of a model on the rows, and which of them are right."""
    how = replace(how, budget=e.cell.study.budget, ends=e.x.subject.tokenizer.eos_ids)
    if e.cell.study.options.paper_compat:
        how = replace(how, among=10, spelled=spelled_labels(e))
    scores = label_scores(
        model, prompts, e.labels, how, lambda queries: bar.update(queries * how.runs)
    )
    found = {key: value for key, value in vars(scores).items() if value is not None}
    found["correct"] = scores.top == torch.tensor([row.label for row in e.rows])
    return found


def spelled_labels(e: Evaluation) -> Tensor | None:
    """Which tokens count as which label in the released scripts; None where a label has several tokens."""
    if label_tokens_at_most(e.labels) > 1:
        return None
    return spellings(e.x.subject.tokenizer, e.task.labels, e.x.subject.model.config.vocab_size)


@cache
def spellings(tokenizer: Tokenizer, labels: tuple[str, ...], size: int) -> Tensor:
    """For each of `size` tokens the label that its text is but for surrounding blanks, else -1, [V] int64.

    So the paper's released scripts compare: " Friday" is "Friday".
    """
    places = {label.strip(): place for place, label in reversed(list(enumerate(labels)))}
    known = min(size, tokenizer.backend.get_vocab_size())
    texts = tokenizer.backend.decode_batch([[token] for token in range(known)])
    found = [places.get(text.strip(), -1) for text in texts]
    return torch.tensor(found + [-1] * (size - known))


def scored_adapter(cell: Cell) -> Adapter:
    """The adapter as it is scored: the released scripts merge it into bfloat16 weights."""
    adapter = cell.study.adapter
    return Merged(adapter) if cell.study.options.paper_compat else adapter


def score_texts(
    e: Evaluation, model: Callable, prompts: list[list[int]], runs: list[str], bar
) -> tuple[list, Tensor]:
    """Greedy responses (ids) of a model's `runs` to the rows, and which are right [R, Q].

    All runs answer side by side; each one's texts are kept.
    """
    files = [texts_file(e.x, run, e.name) for run in runs]
    kept = [e.x.store.json(file) for file in files]
    if None in kept:
        kept = generate_texts(e, model, prompts, len(runs), bar)
        kept = [e.x.store.keep_json(file, texts) for file, texts in zip(files, kept)]
    return [texts["ids"] for texts in kept], torch.stack([parsed_correct(texts) for texts in kept])


def generate_texts(
    e: Evaluation, model: Callable, prompts: list[list[int]], runs: int, bar
) -> list[dict]:
    """What is kept of each run's texts."""
    tokenizer = e.x.subject.tokenizer
    hooks = fast_decoding(device_of(e.x.subject.model), e.task.max_tokens)
    how = Decoding(e.task.max_tokens, runs=runs, budget=4 * e.cell.study.budget, hooks=hooks)
    responses = generate(model, tokenizer, prompts, how, lambda queries: bar.update(queries * runs))
    answers = [row.answer for row in e.rows]
    kept = []
    for r in range(runs):
        ids = responses[r * len(prompts) : (r + 1) * len(prompts)]
        texts = [tokenizer.decode(response) for response in ids]
        kept.append({"texts": texts, "parser": e.task.parser, "ids": ids, "answers": answers})
    return kept


def texts_file(x: Experiment, run: str, name: str) -> str:
    return f"{x.name}/generations/{run}-on-{name}.json"


def parsed_correct(kept: dict) -> Tensor:
    """Whether each of the kept texts parses to the same as its true answer, [Q] bool."""
    parser = kept["parser"]
    pairs = zip(kept["texts"], kept["answers"])
    return torch.tensor([same_answer(parser, text, answer) for text, answer in pairs])


def likeness(e: Evaluation, model: Callable, rows: list[list[Row]], responses: list) -> Tensor:
    """asim of R runs to their set's rows, [R, L]; of one run (the base) to every set's, [S, L].

    As the released scripts have it, on the runs' own responses.
    """
    runs = len(responses)
    if runs == 1:
        compared = rows
        own = responses * len(rows)
    else:
        compared = [rows[r * len(rows) // runs] for r in range(runs)]
        own = responses
    if e.cell.study.options.paper_compat:
        compared = [cut_rows(e, mine, texts) for mine, texts in zip(compared, own)]
    return layer_asim(
        model, compared, e.cell.study.budget, by_row=e.cell.study.options.paper_compat
    )


def cut_rows(e: Evaluation, rows: list[Row], responses: list[list[int]]) -> list[Row]:
    """The rows with other responses in place of their own, both cut to the shorter."""
    found = []
    for row, response in zip(rows, responses):
        cut = ended(e, response)[: len(row.answer)]
        found.append(Row(row.prompt, cut, row.activations[:, : len(cut)]))
    return found


def ended(e: Evaluation, response: list[int]) -> list[int]:
    """A generated response with the end-of-sequence token, unless it was cut."""
    return (response + e.x.subject.tokenizer.closing)[: e.cell.max_tokens]


def temperatures(
    cell: Cell, x: Experiment, method: str, trained: dict, reported: dict
) -> list[float]:
    """For each reported run of a method (of base and ICL for each set) the one that suits its set's dev rows."""
    sets = len(cell.episodes)
    runs = range(sets) if method in UNTRAINED else reported[method]
    found = []
    for place, run in enumerate(runs):
        number = place * sets // len(runs)
        dev = cell.episodes[number].dev
        under = nullcontext(x.subject.model)
        if method not in UNTRAINED:
            theta = trained[method].theta[[run]]
            under = adapted(x.subject.model, scored_adapter(cell), theta)
        with under as student:
            prompts = x.subject.tokenizer.encode_all([row.prompt for row in dev])
            if method in BEHIND_DEMONSTRATIONS:
                student, prompts = behind_demonstrations(student, cell, dev, number)
            how = Scoring(ends=x.subject.tokenizer.eos_ids)
            scores = label_scores(
                student, prompts, cell.labels[cell.task.name], how
            ).log_probabilities[0]
        found.append(fit_temperature(scores, torch.tensor([row.label for row in dev])))
    return found
