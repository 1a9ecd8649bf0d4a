"""SDFT, a rival's way to keep what demonstrations do: self-distillation on policy (arXiv 2601.19897).

The student answers by itself, by chance; the base model with demonstrations in its prompt says how likely it finds each
token of that answer; the student follows it, by the reverse KL. R runs, P answer tokens, V vocabulary, M weights.
"""

import math

import torch
from ia2mini.models.taps import device_of
from torch import Tensor

from ia2mini.adapters import adapted
from ia2mini.batch import Row, collate
from ia2mini.losses import per_run
from ia2mini.methods import Grid
from ia2mini.train import State, Trained, adam


def sdft(grid: Grid) -> Trained:
    """Train every set at every learning rate on policy; as long as the other methods train, by the dev rows' loss."""
    device = device_of(grid.model)
    settings = grid.settings
    sets = [number for number, _, _ in grid.configs("sdft")]
    first = torch.stack([grid.first_weights(number) for number in sets]).to(device)
    rates = torch.tensor([[rate] for _, rate, _ in grid.configs("sdft")], device=device)
    state = State.begin(first)
    generator = torch.Generator(device).manual_seed(grid.seed)
    rows = len(grid.sets[0].train)
    steps_an_epoch = math.ceil(rows / settings.batch_size)
    for step in range(settings.epochs * steps_an_epoch):
        epoch, place = divmod(step, steps_an_epoch)
        portion = slice(place * settings.batch_size, (place + 1) * settings.batch_size)
        chosen = [grid.order(number, rows, epoch)[portion] for number in sets]
        alone = [[grid.sets[s].train[i] for i in some] for s, some in zip(sets, chosen)]
        behind = [[grid.sets[s].behind_train[i] for i in some] for s, some in zip(sets, chosen)]
        loss = on_policy_loss(grid, state.theta, alone, behind, generator)
        (gradient,) = torch.autograd.grad(loss.sum(), state.theta)
        adam(state.theta.detach(), gradient, state.m, state.v, state.t, rates)
        state.step += 1
        if step % 2 == 1 or place == steps_an_epoch - 1:
            dev = [grid.sets[number].dev for number in sets]
            behind_dev = [grid.sets[number].behind_dev for number in sets]
            same = torch.Generator(device).manual_seed(grid.seed + 1)  # the same draws each time
            with torch.no_grad():
                state.note(on_policy_loss(grid, state.theta, dev, behind_dev, same), settings)
            if not state.going.any():
                break
    return state.trained()


def on_policy_loss(
    grid: Grid,
    theta: Tensor,
    alone: list[list[Row]],
    behind: list[list[Row]],
    generator: torch.Generator,
) -> Tensor:
    """Mean reverse KL [R] of the student from the teacher over the tokens of answers that the student draws.

    `alone`: each run's rows; `behind`: the same rows behind demonstrations.
    """
    model = grid.model
    device = device_of(model)
    with torch.no_grad(), adapted(model, grid.adapter, theta) as student:
        answers = draw_answers(student, alone, generator)
    prompts = with_answers(behind, answers)
    batch = collate(prompts).to(device)
    with torch.no_grad():
        teacher = model(batch.ids, logits=batch.at).float().log_softmax(-1)  # [P, V]
    batch = collate(with_answers(alone, answers)).to(device)
    with adapted(model, grid.adapter, theta) as student:
        own = student(batch.ids, logits=batch.at).float().log_softmax(-1)  # [P, V]
        divergence = (own.exp() * (own - teacher)).sum(-1)
        return per_run(divergence, batch.weights)


def with_answers(runs: list[list[Row]], answers: list[list[list[int]]]) -> list[list[Row]]:
    """The rows of each run with other answers."""
    found = []
    for rows, said in zip(runs, answers):
        found.append([Row(row.prompt, answer) for row, answer in zip(rows, said)])
    return found


def draw_answers(
    student, runs: list[list[Row]], generator: torch.Generator
) -> list[list[list[int]]]:
    """An answer to each row of each run, drawn token by token from the student's own distribution.

    As long as the longest true answer at most. Where that has several tokens its last one ends a text.
    """
    rows = [row for mine in runs for row in mine]
    longest = max(len(row.answer) for row in rows)
    end = rows[0].answer[-1] if longest > 1 else None
    answers: list[list[int]] = [[] for _ in rows]
    for _ in range(longest):
        batch = collate([[Row(row.prompt + said, [0]) for row, said in zip(rows, answers)]])
        batch = batch.to(device_of(student))
        shares = student(batch.ids, logits=batch.at).float().softmax(-1)  # [R * B, V]
        drawn = torch.multinomial(shares, 1, generator=generator)[:, 0].tolist()
        for said, token in zip(answers, drawn):
            if end is None or end not in said:
                said.append(token)
        if all(end in said for said in answers):
            break
    per_run_rows = len(runs[0])
    return [answers[at : at + per_run_rows] for at in range(0, len(answers), per_run_rows)]
