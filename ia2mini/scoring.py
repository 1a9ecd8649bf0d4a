"""Scoring answers, and R adapted models on labelled rows (protocol section 5).

R runs, Q prompts, L layers, D hidden, P answer tokens of the batch.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from .adapters import Adapter, adapted
from .batch import Batch, TokenRow, Watch, by_length, collate, count_positions, join_groups, send
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
    model: Callable, runs: list[list[TokenRow]], budget: int = 4096, by_row: bool = False
) -> Tensor:
    """Mean cosine similarity [R, L] of R runs' attention outputs to the `activations` of each one's rows.

    The mean is over all positions; `by_row` over those of a row, then over rows, as in the released scripts.
    """
    device = device_of(model)
    R = len(runs)
    lengths = [1 + max(map(len, rows)) for rows in zip(*runs)]  # of the same row in all runs
    total = 0
    for group in by_length(lengths, budget // R):
        some = [[rows[i] for i in group] for rows in runs]
        batch = collate(some).to(device)
        taps = Taps(batch.at)
        model(batch.ids, taps=taps, logits=False)
        similar = asim(taps.stack(), batch.activations)
        similar = similar.unflatten(1, (R, -1))  # [L, R, P / R]
        if by_row:
            means = (similar * batch.weights).sum(-1)
            total = total + means * len(group)
        else:
            real = batch.weights > 0
            total = total + (similar * real).sum(-1)
    counts = list(map(len if by_row else count_positions, runs))
    return (total / torch.tensor(counts, device=device)).T.cpu()


@torch.no_grad()
def answer_scores(
    model: Callable,
    rows: list[TokenRow],
    runs: int = 1,
    budget: int = 4096,
    ends: tuple[int, ...] = (),
) -> Tensor:
    """Mean log-probability per answer token of each row, or minus its mean KL with `soft`: [R, Q] float32 on the CPU.

    Every token of `ends` ends a text; an answer token among them counts with the sum of their probabilities.
    """
    device = device_of(model)
    known_ends = torch.tensor(ends, dtype=torch.int64)
    groups = by_length(list(map(len, rows)), max(1, budget // runs))
    parts = []
    for group in groups:
        some = [rows[i] for i in group]
        batch = collate([some] * runs)
        closing = torch.isin(batch.targets, known_ends).nonzero()[:, 0]
        batch = batch.to(device)
        head = partial(answer_loss, batch, send(closing, device), ends)
        loss = model(batch.ids, logits=batch.at, head=head).view(runs, -1)  # [R, P / R]
        sizes = [len(row.answer) for row in some]
        means = [part.mean(1) for part in loss.split(sizes, 1)]
        parts.append(-torch.stack(means, 1))
    return join_groups(parts, groups, dim=1).cpu()


def answer_loss(
    batch: Batch, closing: Tensor, ends: tuple[int, ...], states: Tensor, head: Tensor
) -> Tensor:
    """KL from the teacher's distributions where the batch has them, else cross-entropy on the answers, [P].

    At the places `closing` the answer ends: any of the tokens `ends` is right there.
    """
    if batch.soft is not None:
        return soft_cross_entropy(states, head, batch.soft, batch.soft_ids)
    loss = cross_entropy(states, head, batch.targets)
    if len(ends) > 1 and len(closing):
        each = []
        for end in ends:
            this_end = torch.full_like(closing, end)
            each.append(cross_entropy(states[closing], head, this_end))
        loss[closing] = -torch.stack(each).neg().logsumexp(0)
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
    rows = []
    for prompt, response in zip(prompts, found):
        rows.append(TokenRow(prompt, response.generated))
    confidence = answer_scores(model, rows, ends=tokenizer.eos_ids)[0].exp()
    texts = [tokenizer.decode(response.ids) for response in found]
    return texts, confidence.tolist()


@torch.no_grad()
def last_states(model: Callable, prompts: list[list[int]], budget: int = 4096) -> Tensor:
    """The head's input [Q, D] at the last token of each prompt, float32 on the CPU."""
    groups = by_length(list(map(len, prompts)), budget)
    parts = []
    for group in groups:
        rows = [TokenRow(prompts[i], [0]) for i in group]
        batch = collate([rows]).to(device_of(model))
        states = model(batch.ids, logits=batch.at, head=keep_states)
        parts.append(states.float())
    return join_groups(parts, groups, dim=0).cpu()


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
    if there are any. All prompts must end as the first one does. Raises UsageError for a label that merges with it.

        score(model, tokenizer, examples, ("0", "1"), lora, trained.theta)[0]["acc"]
    """
    prompts = [example.prompt for example in examples]
    label_tokens = tokenizer.label_tokens(prompts[0], labels)
    how = Scoring(ends=tokenizer.eos_ids)
    if theta is None:
        student, ids = share_prefix(model, tokenizer, [list(demonstrations)], prompts)
        scores = label_scores(student, ids, label_tokens, how)
    else:
        ids = tokenizer.encode_all(prompts)
        how = replace(how, runs=len(theta))
        with adapted(model, adapter, theta) as student:
            scores = label_scores(student, ids, label_tokens, how)
    gold = torch.tensor([example.label for example in examples])
    found = []
    for r in range(how.runs):
        correct = scores.top[r] == gold
        found.append(measure(scores.confidence[r], correct, scores.log_probabilities[r], gold))
    return found
