"""What an adapted model keeps, loses and has cost: for `causes`."""

import math
from dataclasses import astuple

import torch

from ia2mini.adapters import adapted
from ia2mini.cost import Cost
from ia2mini.scoring import Scoring, label_scores, share_prefix
from ia2mini.experiment import Experiment
from ia2mini.generate import Decoding, generate
from ia2mini.methods import BEGINS_WITH
from ia2mini.metrics import accuracy
from ia2mini.engine.options import last_phase
from ia2mini.study.study import cell_of
from ia2mini.tasks import same_answer


@torch.no_grad()
def behind_demonstrations(experiment: Experiment, method: str, asked: Experiment) -> list[float]:
    """Accuracy of a method's run of each set on the evaluation rows of `asked`, behind that one's demonstrations.

    Where `asked` is the experiment itself they are put back; else they teach another task to the adapted model.
    """
    model, task, rows, found = experiment.setting.subject.model, asked.task, asked.evals[asked.task.name].rows, []
    tokenizer = experiment.setting.subject.tokenizer
    for number, run in enumerate(experiment.reported(method)):
        with adapted(model, experiment.adapter, experiment.trained(method).theta[[run]]) as student:
            shown = asked.episodes[number].icl
            student, prompts = share_prefix(student, tokenizer, shown, [row.prompt for row in rows])
            if asked.labelled:
                scores = label_scores(student, prompts, asked.labels[task.name], Scoring(ends=tokenizer.eos_ids))
                top = scores.top[0].tolist()
                right = [said == row.label for said, row in zip(top, rows)]
            else:
                said = map(tokenizer.decode, generate(student, tokenizer, prompts, Decoding(task.max_tokens)))
                right = [same_answer(task.parser, text, row.answer) for text, row in zip(said, rows)]
        found.append(accuracy(right))
    return found


def spent(experiment: Experiment, method: str) -> Cost:
    """What all runs of a method cost, by their shapes and the steps that they made, with the teacher's pass."""
    cell, subject, total, before = cell_of(experiment), experiment.setting.subject, Cost(), 0.0
    stages = cell.stages(subject.model.config, next(subject.model.parameters()).itemsize)
    phases = [name for name in (BEGINS_WITH.get(method), method) if name]
    for phase in phases:
        rows = cell.n + cell.more * (last_phase(phase) != "sft")
        steps = experiment.trained(phase).steps.float().mean().item()
        share = (steps - before) / (cell.epochs * math.ceil(rows / cell.batch)) if last_phase(phase) != "ridge" else 1.0
        before = steps
        for stage in ("train", "look"):
            total += Cost(*(share * value for value in astuple(stages.get(f"{stage} {phase}", Cost()))))
    return total + (stages["collect"] if {last_phase(phase) for phase in phases} != {"sft"} else Cost())
