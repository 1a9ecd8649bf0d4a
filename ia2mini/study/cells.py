"""A cell of a study is one task at one N. Its sets are drawn and all lengths checked before any computation."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace

from .. import UsageError
from ..adapters import Adapter
from ..engine.experiment import make_adapter
from ..engine.options import BETAS, ICL_SFT, UNTRAINED, Options
from ..engine.own_loss import OwnLoss, read_losses, with_methods_of
from ..engine.subject import Subject, max_answer_tokens, max_label_tokens
from ..episode import Episode, draw_episode, with_demonstrations
from ..methods import METHODS
from ..tasks import Examples, Task, find_task, load_examples
from ..tasks.rows import labels_after_prompt


@dataclass
class Study:
    """What all cells of a study share."""

    subject: Subject
    options: Options
    adapter: Adapter
    rates: tuple[float, ...]
    betas: tuple[float, ...]
    layers: list[int] | None  # to align; None: all
    losses: list[OwnLoss]
    pools: dict[str, Examples]  # training pool of every task
    evaluations: dict[str, Examples]  # rows of every evaluation


@dataclass
class Cell:
    """One task at one N."""

    study: Study
    task: Task
    n: int
    episodes: list[Episode]  # the few-shot sets
    # tokens of each label, by evaluation; empty where answers are texts
    labels: dict[str, list[list[int]]]
    max_tokens: int  # of a response
    teacher_tokens: int  # of one of the teacher's, in training

    @property
    def name(self) -> str:
        return f"{self.task.name}-n{self.n}"

    @property
    def evaluations(self) -> dict[str, Examples]:
        """The task's own evaluation first, then those out of distribution."""
        return {name: self.study.evaluations[name] for name in self.task.evals}


def evaluation_task(task: Task, name: str) -> Task:
    """The task of one of `task`'s evaluations; one's own task needs no entry in the catalog."""
    return task if name == task.name else find_task(name)


def make_cells(
    tasks: list[Task],
    subject: Subject,
    options: Options,
    data_dir=None,
    draw: Callable = draw_episode,
) -> list[Cell]:
    """The cells of a study, in order. `draw` makes an episode, as `draw_episode` does. Raises UsageError."""
    losses = read_losses(options.loss)
    options = with_methods_of(losses, options)
    known = [*UNTRAINED, *METHODS, *(name for loss in losses for name in loss.methods())]
    for method in options.methods:
        if method not in known:
            raise UsageError(f"unknown method {method!r}; methods: {', '.join(known)}")
    pools = {task.name: load_examples(task, "train", data_dir) for task in tasks}
    evaluations = {}
    for task in tasks:
        for name in task.evals:
            evaluated = evaluation_task(task, name)
            evaluations[name] = load_examples(evaluated, "eval", data_dir, options.eval_rows)
    study = Study(
        subject=subject,
        options=options,
        adapter=make_adapter(subject.model, options, scale_inputs=options.paper_compat),
        rates=options.rates_for(subject.name, options.adapter),
        betas=options.betas or BETAS.get(subject.model.config.model_type, BETAS["llama"]),
        layers=options.layer_numbers(subject.model.config.num_hidden_layers),
        losses=losses,
        pools=pools,
        evaluations=evaluations,
    )
    return [make_cell(study, task, n, draw) for task in tasks for n in options.n]


def make_cell(study: Study, task: Task, n: int, draw: Callable) -> Cell:
    """Draw the training sets of a task at one N and check them. Raises UsageError for rows that cannot be used."""
    options = study.options
    tokenizer = study.subject.tokenizer
    pool = study.pools[task.name].rows
    # the user's own texts: the longest answer limits the length of generated ones
    if task.files and not task.labels:
        answered = pool + study.evaluations[task.name].rows
        task = replace(task, max_tokens=max_answer_tokens(tokenizer, answered))
    queries = 0
    if options.icl_demos == "pool" or options.paper_compat:
        queries = max(len(study.evaluations[name].rows) for name in task.evals)
    episodes = []
    for number in range(options.sets):
        episodes.append(
            draw(pool, n, number, options.seed, pool_demos=queries, reuse=options.paper_compat)
        )
    labels = {}
    max_tokens = task.max_tokens
    if task.labels:  # labels that merge with the prompt are refused before any computation
        for name in task.evals:
            evaluated = evaluation_task(task, name)
            written = labels_after_prompt(evaluated.prompt, evaluated.labels)
            prompt = study.evaluations[name].rows[0].prompt
            labels[name] = tokenizer.label_tokens(prompt, written)
        max_tokens = max_label_tokens(labels[task.name])
    if max_tokens > 1 and not tokenizer.eos_ids:
        lack = "its answers end with EOS, but the checkpoint's config.json names no eos_token_id"
        raise UsageError(f"{task.name}: {lack}; add it there")
    cell = Cell(
        study=study,
        task=task,
        n=n,
        episodes=episodes,
        labels=labels,
        max_tokens=max_tokens,
        teacher_tokens=task.teacher_tokens or max_tokens,
    )
    check_training_rows(cell)
    check_evaluation_rows(cell)
    return cell


def check_training_rows(cell: Cell) -> None:
    """Raises UsageError for a row that is longer than the model reads, by itself or with its demonstrations."""
    subject = cell.study.subject
    count = subject.tokenizer.count
    options = cell.study.options
    demonstrated = options.learns_from_teacher or ICL_SFT in options.methods
    for episode in cell.episodes:
        rows = episode.train + episode.dev
        for row, tokens in zip(rows, count([row.prompt + row.answer for row in rows])):
            subject.check_room(row.prompt, tokens)
        if not demonstrated:
            continue
        full = [
            with_demonstrations(shown, row.prompt)
            for shown, row in zip(episode.demonstrations, rows)
        ]
        for row, tokens in zip(rows, count(full)):
            needed = tokens + cell.teacher_tokens - 1
            subject.check_room(row.prompt, needed, "with its demonstrations: use a smaller --n")


def check_evaluation_rows(cell: Cell) -> None:
    """Raises UsageError for an evaluation row that is too long; warns where only ICL's prompts are."""
    subject = cell.study.subject
    count = subject.tokenizer.count
    for name, examples in cell.evaluations.items():
        answer = evaluation_task(cell.task, name).max_tokens
        if cell.labels:
            answer = max_label_tokens(cell.labels[name])
        lengths = [tokens + answer - 1 for tokens in count([row.prompt for row in examples.rows])]
        for row, tokens in zip(examples.rows, lengths):
            subject.check_room(row.prompt, tokens)
        longest = 0
        for episode in cell.episodes:
            shown = count(
                [with_demonstrations(demonstrations, "") for demonstrations in episode.icl]
            )
            for i, tokens in enumerate(lengths):
                longest = max(longest, shown[i % len(shown)] + tokens)
        if longest > subject.context_length:
            need = f"rows of {name} need up to {longest} tokens with demonstrations"
            warnings.warn(
                f"{cell.name}: {need}; the model reads {subject.context_length}: "
                "ICL is not at its best, a smaller --n would fit",
                stacklevel=2,
            )
