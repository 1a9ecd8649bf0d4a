"""Scoring answers, and R adapted models on labelled rows (protocol section 5).

R runs, Q prompts, L layers, D hidden, P answer tokens of the batch.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from .adapters import Adapter, adapted
from .batch import Batch, Row, Watch, by_length, collate
from .generate import Decoding, responses
from .labels import Scoring, label_scores
from .losses import cross_entropy, soft_cross_entropy
from .metrics import asim, measure
from .models.taps import Taps, device_of
from .prefix import share_prefix
from .tasks import Example
from .tokenizer import Tokenizer


@torch.no_grad()
def layer_asim(
    model: Callable, runs: list[list[Row]], budget: int = 4096, by_row: bool = False
) -> Tensor:
    """Mean cosine similarity [R, L] of R runs' attention outputs to the `activations` of each one's rows.

    The mean is over all positions; `by_row` over those of a row, then over rows, as in the released scripts.
    """
    device = device_of(model)

    lengths = [max(map(len, rows)) + 1 for rows in zip(*runs)]  # of the same row in all runs
    total = 0
    for group in by_length(lengths, budget // len(runs)):
        some = [[rows[i] for i in group] for rows in runs]
        batch = collate(some).to(device)
        taps = Taps(batch.at)
        model(batch.ids, taps=taps, logits=False)
        # [L, R, P / R]
        similar = asim(taps.stack(), batch.activations).unflatten(1, (len(runs), -1))
        if by_row:
            total = total + (similar * batch.weights).sum(-1) * len(group)
        else:
            total = total + (similar * (batch.weights > 0)).sum(-1)
    if by_row:
        counts = [len(rows) for rows in runs]
    else:
        counts = [sum(len(row.answer) for row in rows) for rows in runs]
    return (total / torch.tensor(counts, device=device)).T.cpu()


@torch.no_grad()
def answer_scores(
    model: Callable, rows: list[Row], runs: int = 1, budget: int = 4096, ends: tuple[int, ...] = ()
) -> Tensor:
    """Mean log-probability of an answer token, of rows with `soft` minus the mean KL, [R, Q] float32 on the CPU.

    An answer token among `ends`, each of which ends a text, counts with the probability of them all.
    """
    groups = by_length([len(row) for row in rows], max(1, budget // runs))
    found = []
    for group in groups:
        some = [rows[i] for i in group]
        batch = collate([some] * runs).to(device_of(model))
        loss = model(batch.ids, logits=batch.at, head=partial(answer_loss, batch, ends))  # [P]
        by_row = loss.view(runs, -1).split([len(row.answer) for row in some], 1)
        found.append(-torch.stack([part.mean(1) for part in by_row], 1).cpu())
    order = torch.tensor(sum(groups, [])).argsort()
    return torch.cat(found, 1)[:, order]


def answer_loss(batch: Batch, ends: tuple[int, ...], states: Tensor, head: Tensor) -> Tensor:
    """KL from the teacher's distributions where the batch has them, else cross-entropy on the answers, [P]."""
    if batch.soft is not None:
        return soft_cross_entropy(states, head, batch.soft, batch.soft_ids)
    loss = cross_entropy(states, head, batch.targets)
    ending = torch.isin(batch.targets, torch.tensor(ends, dtype=torch.int64, device=loss.device))
    if len(ends) > 1 and ending.any():
        there = states[ending]
        each = [
            cross_entropy(there, head, torch.full_like(batch.targets[ending], end)) for end in ends
        ]
        loss[ending] = -torch.stack(each).neg().logsumexp(0)
    return loss


def answer_texts(
    model: Callable,
    tokenizer: Tokenizer,
    prompts: list[list[int]],
    how: Decoding,
    watch: Watch = None,
) -> tuple[list[str], list[float]]:
    """What a model answers to prompts, greedily, and the geometric mean of its tokens' probabilities.

    Every token that was generated counts: an EOS with the probability of all EOS tokens, or those of the stop text.
    """
    found = responses(model, tokenizer, prompts, how, watch)
    said = [Row(prompt, response.generated) for prompt, response in zip(prompts, found)]
    sure = answer_scores(model, said, ends=tokenizer.eos_ids)[0].exp()
    return [tokenizer.decode(response.ids) for response in found], sure.tolist()


@torch.no_grad()
def last_states(model: Callable, prompts: list[list[int]], budget: int = 4096) -> Tensor:
    """The state [Q, D] that the last token of each prompt gives to the head, float32 on the CPU."""
    groups = by_length([len(prompt) for prompt in prompts], budget)
    found = []
    for group in groups:
        batch = collate([[Row(prompts[i], [0]) for i in group]]).to(device_of(model))
        states = model(batch.ids, logits=batch.at, head=keep_states)
        found.append(states.float().cpu())
    order = torch.tensor(sum(groups, [])).argsort()
    return torch.cat(found)[order]


def keep_states(states: Tensor, head: Tensor) -> Tensor:
    """In place of the head: what it reads."""
    return states


def score(
    model: nn.Module,
    tokenizer: Tokenizer,
    examples: list[Example],
    labels: tuple[str, ...],
    adapter: Adapter | None = None,
    theta: Tensor | None = None,
    demonstrations: tuple[Example, ...] = (),
) -> list[dict]:
    """How good R adapted models are on labelled rows: the metrics of `metrics.measure`, a dict a run.

    `theta` [R, M] are weights of `adapter`; without them the base model is scored, with `demonstrations` in its prompt
    if there are any. Raises UsageError for a label that merges with its prompt.

        score(model, tokenizer, examples, ("0", "1"), lora, trained.theta)[0]["acc"]
    """
    prompts = [e.prompt for e in examples]
    tokens = tokenizer.label_tokens(prompts[0], labels)
    how = Scoring(ends=tokenizer.eos_ids)
    if theta is None:
        student, ids = share_prefix(model, tokenizer, [list(demonstrations)], prompts)
        scores = label_scores(student, ids, tokens, how)
    else:
        with adapted(model, adapter, theta) as student:
            scores = label_scores(
                student, tokenizer.encode_all(prompts), tokens, replace(how, runs=len(theta))
            )
    gold = torch.tensor([e.label for e in examples])
    each_run = zip(scores.confidence, scores.top == gold, scores.log_probabilities)
    return [measure(*run, gold) for run in each_run]
