"""SDFT, a rival's way to keep what demonstrations do: self-distillation on policy (arXiv 2601.19897).

The student answers by itself, by chance; the base model with demonstrations in its prompt says how likely it finds each
token of that answer; the student follows it, by the reverse KL. R runs, P answer tokens, V vocabulary, M weights.
"""

import math

import torch
from ia2mini.models.taps import device_of
from torch import Tensor

from ia2mini.adapters import adapted
from ia2mini.batch import TokenRow, collate
from ia2mini.losses import per_run
from ia2mini.methods import Grid
from ia2mini.train import State, Trained, adam


def sdft(grid: Grid) -> Trained:
    """Train every set at every learning rate on policy; as long as the other methods train, by the dev rows' loss."""
    device = device_of(grid.model)
    settings = grid.settings
    configs = grid.configs("sdft")
    numbers = [number for number, _, _ in configs]
    sets = [grid.sets[number] for number in numbers]
    rates = torch.tensor([rate for _, rate, _ in configs], device=device)
    first = [grid.first_weights(number) for number in numbers]
    state = State.begin(torch.stack(first).to(device))
    draws = torch.Generator(device).manual_seed(grid.seed)
    dev = [taught.dev for taught in sets]
    demonstrated_dev = [taught.demonstrated_dev for taught in sets]
    rows = len(sets[0].train)
    steps_an_epoch = math.ceil(rows / settings.batch_size)
    for step in range(settings.epochs * steps_an_epoch):
        epoch, place = divmod(step, steps_an_epoch)
        start = place * settings.batch_size
        alone = []
        demonstrated = []
        for number, taught in zip(numbers, sets):
            order = grid.order(number, rows, epoch)
            for_this_step = order[start : start + settings.batch_size]
            alone.append([taught.train[i] for i in for_this_step])
            demonstrated.append([taught.demonstrated_train[i] for i in for_this_step])
        loss = on_policy_loss(grid, state.theta, alone, demonstrated, draws)
        (gradient,) = torch.autograd.grad(loss.sum(), state.theta)
        adam(state.theta.detach(), gradient, state.m, state.v, state.t, rates[:, None])
        state.step += 1
        epoch_ends = place == steps_an_epoch - 1
        if step % 2 == 1 or epoch_ends:
            same_draws = torch.Generator(device).manual_seed(grid.seed + 1)
            with torch.no_grad():
                losses = on_policy_loss(grid, state.theta, dev, demonstrated_dev, same_draws)
            state.note(losses, settings)
            if not state.going.any():
                break
    return state.trained()


def on_policy_loss(
    grid: Grid,
    theta: Tensor,
    alone: list[list[TokenRow]],
    demonstrated: list[list[TokenRow]],
    generator: torch.Generator,
) -> Tensor:
    """Mean reverse KL [R] of the student from the teacher over the tokens of answers that the student draws.

    `alone`: each run's rows; `demonstrated`: the same rows with demonstrations.
    """
    model = grid.model
    device = device_of(model)
    with torch.no_grad(), adapted(model, grid.adapter, theta) as student:
        answers = draw_answers(student, alone, generator)
    with torch.no_grad():
        rows = with_answers(demonstrated, answers)
        batch = collate(rows).to(device)
        logits = model(batch.ids, logits=batch.at)
        teacher = logits.float().log_softmax(-1)  # [P, V]
    rows = with_answers(alone, answers)
    batch = collate(rows).to(device)
    with adapted(model, grid.adapter, theta) as student:
        logits = student(batch.ids, logits=batch.at)
        own = logits.float().log_softmax(-1)  # [P, V]
        divergence = own.exp() * (own - teacher)
        return per_run(divergence.sum(-1), batch.weights)


def with_answers(
    runs: list[list[TokenRow]], answers: list[list[list[int]]]
) -> list[list[TokenRow]]:
    """The rows of each run with other answers."""
    found = []
    for rows, said in zip(runs, answers):
        found.append([TokenRow(row.prompt, answer) for row, answer in zip(rows, said)])
    return found


def draw_answers(
    student, runs: list[list[TokenRow]], generator: torch.Generator
) -> list[list[list[int]]]:
    """An answer to each row of each run, drawn token by token from the student's own distribution.

    As long as the longest true answer at most. Where that has several tokens its last one ends a text.
    """
    rows = sum(runs, [])
    longest = max(len(row.answer) for row in rows)
    end = rows[0].answer[-1] if longest > 1 else None
    answers: list[list[int]] = [[] for _ in rows]
    for _ in range(longest):
        so_far = []
        for row, said in zip(rows, answers):
            so_far.append(TokenRow(row.prompt + said, [0]))
        batch = collate([so_far]).to(device_of(student))
        logits = student(batch.ids, logits=batch.at)
        shares = logits.float().softmax(-1)  # [R * B, V]
        drawn = torch.multinomial(shares, 1, generator=generator)
        for said, token in zip(answers, drawn[:, 0].tolist()):
            if end is None or end not in said:
                said.append(token)
        if all(end in said for said in answers):
            break
    by_run = []
    for mine in runs:
        by_run.append(answers[: len(mine)])
        answers = answers[len(mine) :]
    return by_run
