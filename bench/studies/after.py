"""What an adapted model keeps, loses and has cost: for `causes`."""

import torch

from ia2mini.adapters import adapted
from ia2mini.engine.options import last_phase
from ia2mini.generate import Decoding, generate
from ia2mini.labels import Scoring, label_scores
from ia2mini.methods import STARTS_FROM
from ia2mini.metrics import accuracy
from ia2mini.prefix import share_prefix
from ia2mini.tasks import same_answer

from ..cost import Cost, size_of
from .reopened import Reopened


@torch.no_grad()
def accuracies_with_demonstrations(mine: Reopened, method: str, asked: Reopened) -> list[float]:
    """Accuracy of a method's run of each set on the evaluation rows of `asked`, with that one's demonstrations.

    Where `asked` is the cell itself they are put back; else they teach another task to the adapted model.
    """
    subject = mine.experiment.subject
    theta = mine.trained[method].theta
    found = []
    for number, run in enumerate(mine.scored_runs[method]):
        with adapted(subject.model, mine.experiment.adapter, theta[[run]]) as student:
            found.append(accuracy(answered_rightly(student, asked, number)))
    return found


def answered_rightly(student, asked: Reopened, number: int) -> list[bool]:
    """Which evaluation rows of a cell a model answers rightly with the demonstrations of set `number`."""
    cell = asked.cell
    tokenizer = asked.experiment.subject.tokenizer
    rows = cell.evaluations[cell.task.name].rows
    queries = [row.prompt for row in rows]
    student, prompts = share_prefix(student, tokenizer, cell.episodes[number].icl, queries)
    if cell.labels:
        scores = label_scores(
            student, prompts, cell.labels[cell.task.name], Scoring(ends=tokenizer.eos_ids)
        )
        return [top == row.label for top, row in zip(scores.top[0].tolist(), rows)]
    responses = generate(student, tokenizer, prompts, Decoding(cell.task.max_tokens))
    texts = [tokenizer.decode(response) for response in responses]
    return [same_answer(cell.task.parser, text, row.answer) for text, row in zip(texts, rows)]


def spent(mine: Reopened, method: str) -> Cost:
    """What all runs of a method cost, by their shapes and the steps that they made, with the teacher's pass."""
    model = mine.experiment.subject.model
    size = size_of(mine.cell)
    stages = size.stages(model.config, next(model.parameters()).itemsize)
    phases = phases_of(method)
    total = Cost()
    before = 0.0
    for phase in phases:
        steps = mine.trained[phase].steps.float().mean().item()
        share = (steps - before) / (size.epochs * size.steps_an_epoch)
        if last_phase(phase) == "ridge":  # it makes no steps
            share = 1.0
        before = steps
        for stage in (f"train {phase}", f"look {phase}"):
            total += stages.get(stage, Cost()).times(share)
    if {last_phase(phase) for phase in phases} != {"sft"}:
        total += stages["collect"]
    return total


def phases_of(method: str) -> list[str]:
    """The method that it starts from, where there is one, and itself."""
    return [name for name in (STARTS_FROM.get(method), method) if name]
